"""Direct preference training against one or many references, on transformers' Trainer."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from polyref.data.tokenize import TokenizedPreferences
from polyref.errors import ConfigError, DataError, ModelError
from polyref.objectives.metrics import preference_accuracy
from polyref.objectives.pairwise import dr_dpo
from polyref.references.compose import implied_difference
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.references.score import Progress, ReferenceScores, score_references
from polyref.scoring.logprobs import ScoringPlan, causal_lm, completion_logps, probe
from polyref.scoring.models import ModelSource, cache_home, load_causal_lm, load_tokenizer
from polyref.training.arguments import check_run
from polyref.training.auxiliary import check_same_tokens, check_sampling_policy
from polyref.training.config import PreferenceConfig
from polyref.training.dataset import PairCollator, ScoredPairs
from polyref.training.guards import FallingChosenWarning, check_starts_at_reference
from polyref.training.pair_trainer import PairTrainer
from polyref.training.policy import prepare_policy, tokenizer_of
from polyref.training.prepare import step_batch
from polyref.training.step_objective import Step
from polyref.types import PreferenceRecord, TokenBatch

logger = logging.getLogger(__name__)

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
"""What a log line adds to the loss, each a mean over pairs: rewards in reward units, log-probabilities in nats."""


class PreferenceTrainer(PairTrainer):
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

    who = "policy"
    args: PreferenceConfig

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
        check_run(args, eval_dataset)
        if args.dr_beta is not None and args.world_size > 1:
            raise ConfigError("dr_beta needs the whole effective batch in one process", fix="train in one process")

        tokenizer = processing_class
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(ModelSource(str(model)))
            model = load_causal_lm(ModelSource(str(model)))
        model = prepare_policy(model, args, peft_config)
        tokenizer = tokenizer or tokenizer_of(model)

        self.reference_scores: dict[str, ReferenceScores] = {}
        self._reference_progress = reference_progress
        self._start_check = _start_check(model, self.references)
        super().__init__(
            model,
            args,
            eval_dataset,
            tokenizer,
            [FallingChosenWarning(), *(callbacks or [])],
            optimizers,
            metrics=METRICS,
            step_objective=args.step_objective(),
        )
        with self.accelerator.autocast():
            self.plan: ScoringPlan = probe(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("weights may be sharded outside the model's own forward pass; scoring with its full logits")
            self.plan = replace(self.plan, fused=False)
        self.data_collator = PairCollator(self.plan.layout)
        self._prepare_sets(train_dataset, eval_dataset)

    def _scored(self, data: TokenizedPreferences, name: str) -> ScoredPairs:
        """`data` with its anchor and, where auxiliary pairs need it, what its completions were drawn from."""
        if self.state.global_step and _moves(self.model, self.references):
            what = f"the {name} set is to be scored under the policy as it was before training, which is gone"
            raise ConfigError(what, fix="give them as eval_dataset when the trainer is made, or name the reference")
        sampled = self.sampling_policy if data.pairs[0].auxiliary_ids else None
        if sampled is not None:
            check_same_tokens(sampled, data, self.processing_class)
        references = self.references or ReferenceSet((Reference(self.model),))
        weights = _prompt_weights(data.records, references)
        scores = self._score(data, self.references, weights)
        self.reference_scores[name] = scores
        told = "%s set: %d log-probabilities under the references made now, %d found in the cache"
        logger.info(told, name, scores.misses, scores.hits)
        places = [f"{record.source}, row {record.row}" for record in data.records]
        sampling = _anchor(sampled, self._score(data, sampled, None), None, places) if sampled is not None else None
        return ScoredPairs(data.pairs, data.records, _anchor(references, scores, weights, places), sampling)

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
        counted = loss.expand_as(losses) if self.args.dr_beta is not None else losses
        metrics = [*rewards, h, preference_accuracy(h), *logps[:, :2].unbind(1)]
        self._count(loss, counted, metrics, inputs["index"], terms)
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
        return Step(h, drawn, inputs | {"logps": logps})

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


def _start_check(model: nn.Module, references: ReferenceSet | None) -> str | None:
    """What to do should log-ratios not be 0 at step 0: refuse where the policy is its own reference, warn where it seems so."""
    if references is None:
        return "refuse"
    only = references.members[0]
    same = not only.in_memory and str(only.model) == str(causal_lm(model).config._name_or_path)
    return "warn" if same and len(references) == 1 and not only.adapter and not only.system_prompt else None


def _moves(model: nn.Module, references: ReferenceSet | None) -> bool:
    """Whether training moves a reference: the policy itself, when none is given, or one in memory that shares its weights."""
    if references is None:
        return not hasattr(model, "disable_adapter")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    kept = (reference.model for reference in references.members if reference.in_memory)
    return any(id(parameter) in trained for each in kept for parameter in each.parameters())


def _anchor(references: ReferenceSet, scores: ReferenceScores, weights: Tensor | None, places: list[str]) -> Tensor:
    """(N, 2 + 2M): the log-probabilities of all completions under the composition of `references`."""
    completions = np.concatenate([scores.chosen[:, None], scores.rejected[:, None], scores.auxiliary], 1)
    logps = torch.from_numpy(completions).unbind(1)
    return torch.stack([references.anchor(each, weights, places=places) for each in logps], 1)


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
