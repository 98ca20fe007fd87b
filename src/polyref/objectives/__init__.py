"""Log-probs to one loss per pair: pure functions of tensors, with no model and no reduction inside."""

from polyref.objectives.metrics import Interval, mean_interval, preference_accuracy
from polyref.objectives.pairwise import LOSSES, PairLoss, dr_dpo, hinge, ipo, pair_loss, robust, sigmoid, smoothed

__all__ = [
    "LOSSES",
    "Interval",
    "PairLoss",
    "dr_dpo",
    "hinge",
    "ipo",
    "mean_interval",
    "pair_loss",
    "preference_accuracy",
    "robust",
    "sigmoid",
    "smoothed",
]
