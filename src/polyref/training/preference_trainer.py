"""Direct preference training against one or many references, on transformers' Trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from polyref.data.sources import load_preferences
from polyref.data.tokenize import TokenizedPreferences, tokenize_records
from polyref.errors import ConfigError, DataError, ModelError, TrainingDivergedError
from polyref.files import write_bytes, write_errors
from polyref.objectives.metrics import preference_accuracy
from polyref.objectives.pairwise import dr_dpo
from polyref.references.compose import implied_difference
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.references.score import Progress, ReferenceScores, check_fit, score_references
from polyref.scoring.logprobs import ScoringPlan, causal_lm, completion_logps, probe
from polyref.scoring.models import ModelSource, cache_home, check_config, load_causal_lm, load_tokenizer, refuse_prompt_learning
from polyref.training.config import PreferenceConfig
from polyref.training.dataset import GroupedSampler, PairCollator, ScoredPairs
from polyref.training.guards import FallingChosenWarning, WholeWindows, check_starts_at_reference, mean_loss
from polyref.types import PreferenceRecord, TokenBatch

logger = logging.getLogger(__name__)

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
"""What a log line adds to the loss, each a mean over pairs: rewards in reward units, log-probabilities in nats."""

BATCH_FIELDS = ("input_ids", "position_ids", "segment_ids", "source_index", "target_ids", "completion_index")


class PreferenceTrainer(Trainer):
    """Trains a policy on preference pairs: mean over pairs of loss(h), h the reward difference the policy implies.

    Reverse KL: h = beta [log pi/anchor (chosen) - log pi/anchor (rejected)]; forward KL: h = beta [M_a/pi (rejected) - M_a/pi
    (chosen)]; anchor the geometric or arithmetic composition of the references at the sequence level [DPO; arXiv 2502.01203].
    References are scored once, before training, through a cache: a step calls the policy alone, however many there are.

    Args:
        model: the policy: hub id, folder, or causal language model (a PEFT model too).
        references: a `ReferenceSet`, a `Reference`, or None: the starting policy (its adapters off under PEFT).
        args: a `PreferenceConfig`.
        train_dataset: what `load_preferences` takes (a name, a file, a datasets.Dataset, rows) or records.
        eval_dataset: the same, or a dict of them.
        processing_class: the policy's tokenizer; by default the one kept with the model.
        peft_config: wraps the policy in a fresh adapter.
        reference_progress: called as (label, tokens done, tokens in all) while references are scored.

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
    ) -> None:
        args = args if args is not None else PreferenceConfig(output_dir="runs/preference")
        self.references = ReferenceSet((references,)) if isinstance(references, Reference) else references
        self.difference = implied_difference(self.references.composition if self.references else "geometric", args.divergence)
        self.pair_loss = args.pair_loss()
        _check_parallelism(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError("eval_strategy is set, but there is nothing to evaluate on", fix="give an eval_dataset")

        tokenizer = processing_class
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(ModelSource(str(model)))
            model = load_causal_lm(ModelSource(str(model)))
        model = _prepared_policy(model, args, peft_config)
        tokenizer = tokenizer or _tokenizer_of(model)

        self.reference_scores: dict[str, ReferenceScores] = {}
        self._reference_progress = reference_progress
        self._sums = {"train": torch.zeros(len(METRICS) + 1), "eval": torch.zeros(len(METRICS) + 1)}
        self._evaluated: Any = None
        self._checked_start = self.references is not None
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(_pad_token_id(tokenizer)),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[WholeWindows(), FallingChosenWarning(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: accumulation divides it
        with torch.no_grad(), self.compute_loss_context_manager():
            self.plan: ScoringPlan = probe(self.model)
        self.data_collator = PairCollator(_pad_token_id(tokenizer), self.plan.layout)
        if train_dataset is not None:
            self.train_dataset = self._prepare(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: self._prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare(eval_dataset, "eval")

    def _prepare(self, source: Any, name: str) -> ScoredPairs:
        """Rows -> records -> tokens -> scored pairs. Refuses a set with nothing left to train on."""
        records = _records(source, self.args.prompt_format)
        data = tokenize_records(
            records, self.processing_class, max_length=self.args.max_length, truncation_mode=self.args.truncation_mode
        )
        if not data.pairs:
            raise DataError(
                f"no pair of the {name} set has a completion left within {self.args.max_length} tokens", fix="raise max_length"
            )
        logger.info("%s set: %s", name, data.report)
        check_fit(causal_lm(self.model).config, data.pairs, data.records, "the policy")
        scores = self._score(data)
        self.reference_scores[name] = scores
        chosen, rejected = torch.from_numpy(scores.chosen), torch.from_numpy(scores.rejected)
        references = self.references or ReferenceSet((Reference(self.model),))
        weights = _prompt_weights(data.records, references)
        anchor = torch.stack([references.anchor(chosen, weights), references.anchor(rejected, weights)], 1)
        return ScoredPairs(data.pairs, data.records, anchor)

    def _score(self, data: TokenizedPreferences) -> ReferenceScores:
        """Score `data` under the references, or under the starting policy with its adapters off."""
        references = self.references
        off: AbstractContextManager[Any] = nullcontext()
        if references is None:
            references = ReferenceSet((Reference(self.model, name="the starting policy"),))
            off = getattr(self.model, "disable_adapter", nullcontext)()
        with off, self.compute_loss_context_manager():
            return score_references(
                data,
                references,
                self.processing_class,
                cache_dir=Path(self.args.cache_dir) if self.args.cache_dir else cache_home() / "logprobs",
                batch_size=self.args.precompute_ref_batch_size,
                device=self.args.device,
                progress=self._reference_progress,
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean pair loss of a batch; its rewards, margins, accuracies and log-probs are added up for the next log line."""
        batch = TokenBatch(
            **{name: inputs[name] for name in BATCH_FIELDS}, completions=2 if self.plan.layout == "shared" else 1
        )
        scored = completion_logps(model, batch, self.plan)
        logps, tokens, anchor = scored.total.view(-1, 2), scored.tokens.view(-1, 2), inputs["anchor"]
        if not self._checked_start and self.model.training and self.state.global_step == 0:
            check_starts_at_reference(logps, anchor, next(model.parameters()).dtype)
            self._checked_start = True
        policy, reference = (logps / tokens, anchor / tokens) if self.args.length_normalise else (logps, anchor)
        beta = self.args.beta
        h = self.difference(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta)
        losses = self.pair_loss(h - inputs["margin"], inputs["chosen_probability"])
        loss = dr_dpo(losses, self.args.dr_beta) if self.args.dr_beta is not None else losses.mean()
        if not torch.isfinite(loss):
            self._stop_diverged(inputs["index"])
        with torch.no_grad():
            zero = torch.zeros_like(h)
            rewards = [self.difference(policy[:, i], zero, reference[:, i], zero, beta) for i in (0, 1)]
            self._add("train" if self.model.training else "eval", [*rewards, h, preference_accuracy(h), *logps.unbind(1)])
        return (loss, {"implied_difference": h.detach()}) if return_outputs else loss

    def _add(self, mode: str, values: list[Tensor]) -> None:
        """Add METRICS (B,) of a batch, and their number, to what the next line averages."""
        sums = torch.stack([value.detach().sum() for value in values]).cpu().double()
        self._sums[mode] = self._sums[mode] + torch.cat([sums, sums.new_tensor([len(values[0])])])

    def _means(self, mode: str) -> dict[str, float]:
        """Means over all pairs of all processes since the last call."""
        sums, self._sums[mode] = self._sums[mode], torch.zeros(len(METRICS) + 1)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum")
        *totals, count = sums.tolist()
        return {name: total / count for name, total in zip(METRICS, totals, strict=True)} if count else {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training means to a line about training; lines about evaluation carry theirs already.

        `train_loss` of the last line becomes the mean over all steps, those before a resume included.
        """
        if "loss" in logs:
            logs = logs | self._means("train")
        if "train_loss" in logs:
            logs["train_loss"] = mean_loss(self.state.log_history, otherwise=logs["train_loss"])
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with the preference metrics among the returned ones, so that `metric_for_best_model` can name them."""
        self._evaluated, self._sums["eval"] = dataloader.dataset, torch.zeros(len(METRICS) + 1)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of a batch, and the implied reward difference h of its pairs as its prediction: `predict` returns (N,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["implied_difference"].float(), None

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedSampler(dataset.lengths, self._train_batch_size * self.args.world_size, seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with write_errors(self.args.output_dir or "."):
            super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        vars(self)["_signature_columns"] = []

    def _stop_diverged(self, index: Tensor) -> None:
        """Save which rows the loss broke on, and stop before the optimiser sees it."""
        dataset: Any = self.train_dataset if self.model.training else self._evaluated
        rows = [{"source": p.record.source, "row": p.record.row} for p in map(dataset.__getitem__, index.tolist())]
        file = Path(self.args.output_dir or ".") / "nonfinite_batch.json"
        write_bytes(file, json.dumps({"step": self.state.global_step, "rows": rows}, indent=2).encode())
        raise TrainingDivergedError(
            f"the loss is not finite at step {self.state.global_step}; its rows are in {file}; "
            "lower learning_rate, set max_grad_norm, or train in float32"
        )


def _prepared_policy(model: nn.Module, args: PreferenceConfig, peft_config: Any) -> nn.Module:
    """The policy with its adapter, dropout off and inputs ready for gradient checkpointing."""
    check_config(causal_lm(model).config, "policy")
    if peft_config is not None:
        from peft import PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            raise ConfigError("peft_config is given for a model that is a PEFT model already", fix="give one or the other")
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ConfigError(str(error), where="peft_config", fix="name layers of this model in target_modules") from error
    refuse_prompt_learning(model, "policy")
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("no parameter of the policy is trainable", fix="load the adapter with is_trainable=True")
    if args.activation_checkpointing:
        causal_lm(model).enable_input_require_grads()
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            vars(module).update({k: 0.0 for k, v in vars(module).items() if "drop" in k and isinstance(v, float)})
    return model


def _records(source: Any, prompt_format: Any) -> list[PreferenceRecord]:
    if isinstance(source, ScoredPairs):
        return [pair.record for pair in source.pairs]
    if isinstance(source, Sequence) and source and isinstance(source[0], PreferenceRecord):
        return list(source)
    return load_preferences(source, prompt_format=prompt_format)


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


def _tokenizer_of(model: nn.Module) -> PreTrainedTokenizerBase:
    """The tokenizer kept with the model's weights."""
    name = causal_lm(model).config._name_or_path
    if not name:
        raise ModelError("the policy was made in memory and brings no tokenizer", fix="pass processing_class")
    return load_tokenizer(ModelSource(name))


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in candidates if i is not None)


def _check_parallelism(args: PreferenceConfig) -> None:
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs are visible to one process", fix="start with torchrun or accelerate launch")
    if args.dr_beta is not None and args.world_size > 1:
        raise ConfigError("dr_beta needs the whole effective batch in one process", fix="train in one process")
