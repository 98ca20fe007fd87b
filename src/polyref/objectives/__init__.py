"""Log-probs to one loss per pair: pure functions of tensors, with no model and no reduction inside.

`pairwise` holds the losses of an implied reward difference; `variance_reduced` puts an auxiliary preference model beside any of
them as a control variate; `doubly_robust` estimates how often a policy beats the law of the data, to be maximised; `metrics`
summarises pairs.
"""

from polyref.objectives.doubly_robust import (
    ImportanceDiagnostics,
    direct_value,
    doubly_robust_value,
    importance_diagnostics,
    kl_penalty,
)
from polyref.objectives.metrics import Interval, mean_interval, preference_accuracy
from polyref.objectives.pairwise import LOSSES, PairLoss, dr_dpo, hinge, ipo, pair_loss, robust, sigmoid, smoothed
from polyref.objectives.variance_reduced import (
    VarianceReduced,
    control_moments,
    estimated_control,
    optimal_control,
    realised_factor,
    term_variances,
    variance_reduced,
)

__all__ = [
    "LOSSES",
    "ImportanceDiagnostics",
    "Interval",
    "PairLoss",
    "VarianceReduced",
    "control_moments",
    "direct_value",
    "dr_dpo",
    "doubly_robust_value",
    "estimated_control",
    "hinge",
    "importance_diagnostics",
    "ipo",
    "kl_penalty",
    "mean_interval",
    "optimal_control",
    "pair_loss",
    "preference_accuracy",
    "realised_factor",
    "robust",
    "sigmoid",
    "smoothed",
    "term_variances",
    "variance_reduced",
]
