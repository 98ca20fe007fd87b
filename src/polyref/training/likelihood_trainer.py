"""Policies from weighted samples, on transformers' Trainer: maximum likelihood, each completion with its weight."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from polyref.data.sample_tokens import tokenize_samples
from polyref.data.samples import SampleRecord, load_samples
from polyref.errors import DataError
from polyref.references.score import check_fit
from polyref.scoring.logprobs import ScoringPlan, causal_lm, completion_logps, probe
from polyref.scoring.models import ModelSource, load_causal_lm, load_tokenizer
from polyref.training.arguments import check_run
from polyref.training.likelihood_config import LikelihoodConfig
from polyref.training.pair_trainer import PairTrainer
from polyref.training.policy import prepare_policy, tokenizer_of
from polyref.training.prepare import step_batch
from polyref.training.sample_rows import RowCollator, SampleRows

logger = logging.getLogger(__name__)

METRICS = ("logps/weighted", "logps/even")
"""What a log line adds to the loss, each a mean over prompts in nats: log-probabilities by the weights, and counted alike."""


class LikelihoodTrainer(PairTrainer):
    """Trains a policy on weighted samples: minimises the mean over prompts of sum_j w_j (-log pi(y_j | x)) / sum_j w_j.

    log pi(y | x) is the sum over completion tokens, the end of the turn included where the completion ended; one that was cut
    is an atom without it. The optimum is the law that samples were drawn from, times the weights: with w = beta/(lambda - r) on
    samples of the mixture of the references, pi~ = beta M_a/(lambda - r), the optimum under forward KL [arXiv 2502.01203]; with
    w = exp(r/beta), that of reverse KL to what they were drawn from. A row holds a prompt once, and samples of it.

    Args:
        model: the policy: hub id, folder, or causal language model (a PEFT model too).
        args: a `LikelihoodConfig`.
        train_dataset: what `load_samples` takes (a file, a hub id, a datasets.Dataset, rows) or its records.
        eval_dataset: the same, or a dict of them.
        processing_class: the policy's tokenizer; by default the one kept with the model.
        peft_config: wraps the policy in a fresh adapter.

    Raises a `PolyrefError` that says in one line what is wrong with model, data or settings.
    """

    who = "policy"
    args: LikelihoodConfig
    train_dataset: SampleRows  # type: ignore[assignment]

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: LikelihoodConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args if args is not None else LikelihoodConfig(output_dir="runs/fit")
        check_run(args, eval_dataset)
        tokenizer = processing_class
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(ModelSource(str(model)))
            model = load_causal_lm(ModelSource(str(model)))
        model = prepare_policy(model, args, peft_config)
        tokenizer = tokenizer or tokenizer_of(model)
        super().__init__(model, args, eval_dataset, tokenizer, callbacks or (), optimizers, metrics=METRICS)
        with self.accelerator.autocast():
            self.plan: ScoringPlan = probe(self.model)
        self.data_collator = RowCollator(self.plan.layout)
        self._prepare_sets(train_dataset, eval_dataset)

    def _prepare(self, source: Any, name: str, *, with_auxiliary: bool = False) -> SampleRows:  # type: ignore[override]
        """Rows -> samples -> tokens -> rows of one prompt. Refuses a set with nothing left to train on."""
        given = isinstance(source, Sequence) and source and isinstance(source[0], SampleRecord)
        samples = list(source) if given else load_samples(source, prompt_format=self.args.prompt_format)
        cutting: dict[str, Any] = {"max_length": self.args.max_length, "truncation_mode": self.args.truncation_mode}
        prompts = tokenize_samples(samples, self.processing_class, **cutting)
        if not prompts:
            what = f"no sample of the {name} set has a completion left within {self.args.max_length} tokens"
            raise DataError(what, fix="raise max_length")
        told = (sum(len(each.records) for each in prompts), len(samples), len(prompts), sum(sum(each.cuts) for each in prompts))
        logger.info(f"{name} set: %d of %d samples kept, of %d prompts; %d completions without their end", *told)
        records: Any = [each.records[0] for each in prompts]
        check_fit(causal_lm(self.model).config, cast(Any, prompts), records, f"the {self.who}")
        return SampleRows(prompts, self.args.samples_per_row)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over rows of their weighted negative log-likelihoods; what they add up to is kept for the next log line."""
        weights = inputs["weights"]
        with self.accelerator.autocast():
            scored = completion_logps(model, step_batch(inputs, self.plan.layout, weights.shape[1]), self.plan)
        logps, tokens = scored.total.view(weights.shape), scored.tokens.view(weights.shape)
        losses = -(weights * (logps / tokens if self.args.length_normalise else logps)).sum(1)
        loss = losses.mean()
        self._count(loss, losses, [(inputs[name] * logps).sum(1) for name in ("weights", "even")], inputs["index"])
        return (loss, {"loss": losses.detach()}) if return_outputs else loss

    def _prepared(self, rows: Any) -> Any:
        named = isinstance(rows, str) and isinstance(self.eval_dataset, Mapping) and rows in self.eval_dataset
        return rows if rows is None or named or isinstance(rows, SampleRows) else self._prepare(rows, "eval")
