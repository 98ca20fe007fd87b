"""Direct preference training against one or many references, on transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from polyref.data.tokenize import TokenizedPreferences
from polyref.errors import ConfigError, DataError, ModelError
from polyref.files import write_errors
from polyref.objectives.metrics import preference_accuracy
from polyref.objectives.pairwise import dr_dpo
from polyref.references.compose import implied_difference
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.references.score import Progress, ReferenceScores, score_references
from polyref.scoring.logprobs import ScoringPlan, causal_lm, completion_logps, probe
from polyref.scoring.models import ModelSource, cache_home, load_causal_lm, load_tokenizer
from polyref.training.arguments import check_processes
from polyref.training.auxiliary import auxiliary_records, check_sampling_policy, plain_records
from polyref.training.config import PreferenceConfig
from polyref.training.dataset import GroupedSampler, PairCollator, ScoredPairs
from polyref.training.guards import FallingChosenWarning, WholeWindows, check_starts_at_reference, mean_loss, stop_diverged
from polyref.training.means import PairMeans
from polyref.training.policy import prepare_policy, tokenizer_of
from polyref.training.prepare import grouped_sampler, records_of, step_batch, tokens_of
from polyref.training.step_objective import Step
from polyref.types import PreferenceRecord, TokenBatch

logger = logging.getLogger(__name__)

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
"""What a log line adds to the loss, each a mean over pairs: rewards in reward units, log-probabilities in nats."""

MEANS = {"train": METRICS, "eval": (*METRICS, "loss")}
"""What is averaged over pairs here, besides what an objective logs. transformers averages the training loss over steps."""


class PreferenceTrainer(Trainer):
    """Trains a policy on preference pairs: mean over pairs of loss(h), h the reward difference the policy implies.

    Reverse KL: h = beta [log pi/anchor (chosen) - log pi/anchor (rejected)]; forward KL: h = beta [M_a/pi (rejected) - M_a/pi
    (chosen)]; anchor the geometric or arithmetic composition of the references at the sequence level [DPO; arXiv 2502.01203].
    References are scored once, before training, through a cache: a step calls the policy alone, however many there are.
    With an `objective` other than plain, training pairs carry auxiliary pairs of the same prompt, which pass through the policy
    in the row of their pair; evaluation is always of the plain pair loss, and reads no auxiliary column.

    Args:
        model: the policy: hub id, folder, or causal language model (a PEFT model too).
        references: a `ReferenceSet`, a `Reference`, or None: the starting policy (its adapters off under PEFT).
        args: a `PreferenceConfig`.
        train_dataset: what `load_preferences` takes (a name, a file, a datasets.Dataset, rows) or records.
        eval_dataset: the same, or a dict of them.
        processing_class: the policy's tokenizer; by default the one kept with the model.
        peft_config: wraps the policy in a fresh adapter.
        reference_progress: called as (label, tokens done, tokens in all) while references are scored.
        sampling_policy: for objective doubly_robust, the law that all completions were drawn from: a `Reference`, or an
            arithmetic `ReferenceSet`. Scored as references are.

    Raises a `PolyrefError` that says in one line what is wrong with model, data, references or settings.
    """

    args: PreferenceConfig
    model: nn.Module
    train_dataset: ScoredPairs
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | Path | nn.Module,
        references: ReferenceSet | Reference | None = None,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        reference_progress: Progress | None = None,
        sampling_policy: ReferenceSet | Reference | None = None,
    ) -> None:
        args = args if args is not None else PreferenceConfig(output_dir="runs/preference")
        self.references = ReferenceSet((references,)) if isinstance(references, Reference) else references
        self.sampling_policy = ReferenceSet((sampling_policy,)) if isinstance(sampling_policy, Reference) else sampling_policy
        check_sampling_policy(args.objective, self.sampling_policy)
        self.difference = implied_difference(self.references.composition if self.references else "geometric", args.divergence)
        self.pair_loss = args.pair_loss()
        self.step_objective = args.step_objective()
        _check_parallelism(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError("eval_strategy is set, but there is nothing to evaluate on", fix="give an eval_dataset")

        tokenizer = processing_class
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(ModelSource(str(model)))
            model = load_causal_lm(ModelSource(str(model)))
        model = prepare_policy(model, args, peft_config)
        tokenizer = tokenizer or tokenizer_of(model)

        self.reference_scores: dict[str, ReferenceScores] = {}
        self._reference_progress = reference_progress
        logged = self.step_objective.columns if self.step_objective is not None else ()
        self.means = PairMeans(MEANS | {"train": (*METRICS, *logged)})
        self._evaluated: Any = None
        self._start_check = _start_check(model, self.references)
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[WholeWindows(), FallingChosenWarning(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: accumulation divides it
        with self.accelerator.autocast():
            self.plan: ScoringPlan = probe(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("weights may be sharded outside the model's own forward pass; scoring with its full logits")
            self.plan = replace(self.plan, fused=False)
        self.data_collator = PairCollator(self.plan.layout)
        if train_dataset is not None:
            self.train_dataset = self._prepare(train_dataset, "train", with_auxiliary=self.step_objective is not None)
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: self._prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare(eval_dataset, "eval")

    def _prepare(self, source: Any, name: str, *, with_auxiliary: bool = False) -> ScoredPairs:
        """Rows -> records -> tokens -> scored pairs. Refuses a set with nothing left to train on."""
        records = records_of(source, self.args.prompt_format)
        records = auxiliary_records(records, self.args.objective) if with_auxiliary else plain_records(records)
        data = tokens_of(records, name, self.args, self.processing_class, self.model, "the policy")
        references = self.references or ReferenceSet((Reference(self.model),))
        weights = _prompt_weights(data.records, references)
        scores = self._score(data, self.references, weights)
        self.reference_scores[name] = scores
        sampling = None
        if with_auxiliary and self.sampling_policy is not None:
            sampling = _anchor(self.sampling_policy, self._score(data, self.sampling_policy, None), None)
        return ScoredPairs(data.pairs, data.records, _anchor(references, scores, weights), sampling)

    def _score(self, data: TokenizedPreferences, references: ReferenceSet | None, weights: Tensor | None) -> ReferenceScores:
        """Score `data` under the references of positive weight, or under the starting policy with its adapters off."""
        with ExitStack() as stack:
            if references is None:
                references = ReferenceSet((Reference(self.model, name="the starting policy"),))
                stack.enter_context(getattr(self.model, "disable_adapter", nullcontext)())
                stack.enter_context(self.accelerator.autocast())
            return score_references(
                data,
                references,
                self.processing_class,
                cache_dir=Path(self.args.cache_dir) if self.args.cache_dir else cache_home() / "logprobs",
                batch_size=self.args.precompute_ref_batch_size,
                device=self.args.device,
                progress=self._reference_progress,
                needed=references.needed(weights),
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean pair loss of a batch; its rewards, margins, accuracies and log-probs are added up for the next log line."""
        count = inputs["anchor"].shape[1]
        batch = step_batch(inputs, self.plan.layout, count)
        if self._start_check and self.model.training and self.state.global_step == 0:
            self._check_start(model, batch, inputs["anchor"])
        with self.accelerator.autocast():
            scored = completion_logps(model, batch, self.plan)
        logps, tokens = scored.total.view(-1, count), scored.tokens.view(-1, count)
        h, rewards = self._implied(logps, tokens, inputs["anchor"])
        if self.step_objective is not None and self.model.training:
            losses, terms = self.step_objective(self._step(h, logps, tokens, inputs))
        else:
            losses, terms = self.pair_loss(h - inputs["margin"], inputs["chosen_probability"]), None
        loss = dr_dpo(losses, self.args.dr_beta) if self.args.dr_beta is not None else losses.mean()
        if not torch.isfinite(loss):
            dataset = self.train_dataset if self.model.training else self._evaluated
            stop_diverged(self.args.output_dir, self.state.global_step, dataset, inputs["index"])
        metrics = [*rewards, h, preference_accuracy(h), *logps[:, :2].unbind(1)]
        if self.model.training:
            values = torch.stack(metrics, 1)
            self.means.add("train", values if terms is None else torch.cat([values.detach().cpu().double(), terms], 1))
        else:
            counted = loss.expand_as(losses) if self.args.dr_beta is not None else losses
            self.means.add("eval", self.accelerator.gather_for_metrics(torch.stack([*metrics, counted], 1)))
        return (loss, {"implied_difference": h.detach()}) if return_outputs else loss

    def _implied(self, logps: Tensor, tokens: Tensor, anchor: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The implied reward difference h (B,) and, for the log, the reward of each completion, 0 where policy is anchor."""
        policy, reference = self._normalised(logps, tokens, anchor)
        h = self.difference(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], self.args.beta)
        zero = torch.zeros_like(h)
        rewards = [self.difference(policy[:, i], zero, reference[:, i], zero, self.args.beta) for i in (0, 1)]
        return h, rewards

    def _step(self, h: Tensor, logps: Tensor, tokens: Tensor, inputs: dict[str, Tensor]) -> Step:
        """What a step objective reads: the implied reward differences of pair and auxiliary pairs, and all log-probs."""
        policy, reference = self._normalised(logps, tokens, inputs["anchor"])
        first, second = (slice(start, None, 2) for start in (2, 3))
        drawn = self.difference(policy[:, first], policy[:, second], reference[:, first], reference[:, second], self.args.beta)
        return Step(h, drawn, logps, inputs["anchor"], inputs)

    def _normalised(self, logps: Tensor, tokens: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Policy and anchor log-probs as the implied rewards take them: sums, or means over tokens."""
        return (logps / tokens, anchor / tokens) if self.args.length_normalise else (logps, anchor)

    def _check_start(self, model: nn.Module, batch: TokenBatch, anchor: Tensor) -> None:
        """Compare policy and reference on the first batch, as they are scored: in evaluation mode, without gradient."""
        refuse, self._start_check = self._start_check == "refuse", None
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            logps = completion_logps(model, batch, self.plan).total.view(anchor.shape)
            half = torch.is_autocast_enabled(logps.device.type)
        model.train()
        dtype = next(self.model.parameters()).dtype
        try:
            check_starts_at_reference(logps, anchor, torch.get_autocast_dtype(logps.device.type) if half else dtype)
        except ModelError as error:
            if refuse:
                raise
            logger.warning("the reference names the policy's own model, but %s", error)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training means to a line about training; lines about evaluation carry theirs already.

        `train_loss` of the last line becomes the mean over all steps, those before a resume included.
        """
        if "loss" in logs:
            means, pairs = self.means.take("train", self._over_processes if self.args.world_size > 1 else None)
            if pairs and self.step_objective is not None:
                means = {name: means[name] for name in METRICS} | self.step_objective.summary(means, pairs)
            logs = logs | means
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history, otherwise=logs["train_loss"])
        super().log(logs, start_time)

    def _over_processes(self, sums: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return total

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with the preference metrics among the returned ones, so that `metric_for_best_model` can name them."""
        self._evaluated = dataloader.dataset
        self.means.reset("eval")
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self.means.take("eval")[0].items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of a batch, and the implied reward difference h of its pairs as its prediction: `predict` returns (N,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["implied_difference"].float(), None

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return grouped_sampler(dataset, self.args, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's, for scored pairs, the name of a set, or preference rows of any kind."""
        return super().get_eval_dataloader(self._scored(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As Trainer's, for scored pairs or preference rows of any kind."""
        return super().get_test_dataloader(self._scored(test_dataset))

    def _scored(self, rows: Any) -> Any:
        named = isinstance(rows, str) and isinstance(self.eval_dataset, Mapping) and rows in self.eval_dataset
        return rows if rows is None or named or isinstance(rows, ScoredPairs) else self._prepare(rows, "eval")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with write_errors(self.args.output_dir or "."):
            super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        vars(self)["_signature_columns"] = []


def _start_check(model: nn.Module, references: ReferenceSet | None) -> str | None:
    """What to do should log-ratios not be 0 at step 0: refuse where the policy is its own reference, warn where it seems so."""
    if references is None:
        return "refuse"
    only = references.members[0]
    same = not only.in_memory and str(only.model) == str(causal_lm(model).config._name_or_path)
    return "warn" if same and len(references) == 1 and not only.adapter and not only.system_prompt else None


def _anchor(references: ReferenceSet, scores: ReferenceScores, weights: Tensor | None) -> Tensor:
    """(N, 2 + 2M): the log-probabilities of all completions under the composition of `references`."""
    completions = np.concatenate([scores.chosen[:, None], scores.rejected[:, None], scores.auxiliary], 1)
    return torch.stack([references.anchor(logps, weights) for logps in torch.from_numpy(completions).unbind(1)], 1)


def _prompt_weights(records: list[PreferenceRecord], references: ReferenceSet) -> Tensor | None:
    """(N, K) weights where any prompt has its own, the set's weights standing in for the others."""
    if all(record.reference_weights is None for record in records):
        return None
    rows = [record.reference_weights or references.weights for record in records]
    for record, row in zip(records, rows, strict=True):
        if row is not None and len(row) != len(references):
            raise DataError(
                f"{len(row)} reference weights for {len(references)} references",
                where=f"{record.source}, row {record.row}, column reference_weights",
                fix="give one weight a reference",
            )
    return torch.tensor(rows, dtype=torch.float64)


def _check_parallelism(args: PreferenceConfig) -> None:
    check_processes(args)
    if args.dr_beta is not None and args.world_size > 1:
        raise ConfigError("dr_beta needs the whole effective batch in one process", fix="train in one process")
