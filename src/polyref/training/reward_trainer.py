"""Reward models from preference pairs, on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from polyref.errors import ConfigError
from polyref.files import write_errors
from polyref.objectives.metrics import preference_accuracy
from polyref.rewards.classifier import fresh_classifier, with_head
from polyref.scoring.logprobs import ScoringPlan
from polyref.scoring.models import ModelSource, load_tokenizer
from polyref.scoring.score_head import completion_rewards, probe_rewards, score_head, settle_padding
from polyref.training.arguments import check_processes
from polyref.training.auxiliary import plain_records
from polyref.training.dataset import GroupedSampler, PairCollator, ScoredPairs
from polyref.training.guards import WholeWindows, mean_loss, stop_diverged
from polyref.training.means import PairMeans
from polyref.training.policy import prepare_policy, tokenizer_of
from polyref.training.prepare import grouped_sampler, records_of, step_batch, tokens_of
from polyref.training.reward_config import RewardConfig

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""What a log line adds to the loss: means over pairs, in reward units; the share of pairs where chosen has more reward."""

WHO = "reward model"


class RewardTrainer(Trainer):
    """Trains a reward model on pairs: mean over pairs of loss(r_c - r_r - margin) + c (r_c + r_r)^2.

    r is the score head's number at the end of each completion, both completions of a pair in one row that passes their prompt
    once; loss is the pair loss at the pair's `chosen_probability`, the Bradley-Terry likelihood by default; c centres rewards,
    which the loss alone leaves free up to a constant a prompt [arXiv 2312.09244 eq. 2].

    Args:
        model: hub id or folder of a language model, which gets a fresh head drawn from `args.seed`, or of a reward model; or a
            sequence classifier with one logit (a PEFT model too).
        args: a `RewardConfig`.
        train_dataset: what `load_preferences` takes (a name, a file, a datasets.Dataset, rows) or records.
        eval_dataset: the same, or a dict of them.
        processing_class: the model's tokenizer; by default the one kept with it.
        peft_config: wraps the model in a fresh adapter; the score head, and a pooler before it, is trained and saved whole.

    Raises a `PolyrefError` that says in one line what is wrong with model, data or settings.
    """

    args: RewardConfig
    model: nn.Module
    train_dataset: ScoredPairs
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | Path | nn.Module,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        args = args if args is not None else RewardConfig(output_dir="runs/reward")
        self.pair_loss = args.pair_loss()
        check_processes(args)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ConfigError("eval_strategy is set, but there is nothing to evaluate on", fix="give an eval_dataset")

        tokenizer = processing_class
        if isinstance(model, str | Path):
            tokenizer = tokenizer or load_tokenizer(ModelSource(str(model)))
            model = fresh_classifier(ModelSource(str(model)), seed=args.seed)
        tokenizer = tokenizer or tokenizer_of(model, WHO)
        settle_padding(model, tokenizer, WHO)
        if peft_config is not None:
            score_head(model, WHO)
            peft_config = with_head(peft_config, model)
        model = prepare_policy(model, args, peft_config, who=WHO)

        self.means = PairMeans({"train": METRICS, "eval": (*METRICS, "loss")})
        self._evaluated: Any = None
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[WholeWindows(), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: accumulation divides it
        with self.accelerator.autocast():
            self.plan: ScoringPlan = probe_rewards(self.model, row_limit=args.max_length)
        self.data_collator = PairCollator(self.plan.layout)
        if train_dataset is not None:
            self.train_dataset = self._prepare(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: self._prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare(eval_dataset, "eval")

    def _prepare(self, source: Any, name: str) -> ScoredPairs:
        """Rows -> records -> tokens. There is no anchor to score: zeros stand in its place."""
        records = plain_records(records_of(source, self.args.prompt_format))
        data = tokens_of(records, name, self.args, self.processing_class, self.model, f"the {WHO}")
        return ScoredPairs(data.pairs, data.records, torch.zeros(len(data.pairs), 2))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch; its rewards, margins and accuracies are added up for the next log line."""
        with self.accelerator.autocast():
            rewards = completion_rewards(model, step_batch(inputs, self.plan.layout), self.plan).view(-1, 2)
        h = rewards[:, 0] - rewards[:, 1]
        losses = self.pair_loss(h - inputs["margin"], inputs["chosen_probability"])
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * rewards.sum(1) ** 2
        loss = losses.mean()
        if not torch.isfinite(loss):
            dataset = self.train_dataset if self.model.training else self._evaluated
            stop_diverged(self.args.output_dir, self.state.global_step, dataset, inputs["index"])
        metrics = [*rewards.unbind(1), h, preference_accuracy(h)]
        if self.model.training:
            self.means.add("train", torch.stack(metrics, 1))
        else:
            self.means.add("eval", self.accelerator.gather_for_metrics(torch.stack([*metrics, losses], 1)))
        return (loss, {"reward_difference": h.detach()}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training means to a line about training; `train_loss` of the last line is the mean over all steps."""
        if "loss" in logs:
            shared = self.args.world_size > 1
            logs = logs | self.means.take("train", self._over_processes if shared else None)[0]
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
        """Loss of a batch, and the reward differences r_c - r_r of its pairs as its prediction: `predict` returns (N,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["reward_difference"].float(), None

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return grouped_sampler(dataset, self.args, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's, for prepared pairs, the name of a set, or preference rows of any kind."""
        return super().get_eval_dataloader(self._prepared(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As Trainer's, for prepared pairs or preference rows of any kind."""
        return super().get_test_dataloader(self._prepared(test_dataset))

    def _prepared(self, rows: Any) -> Any:
        named = isinstance(rows, str) and isinstance(self.eval_dataset, Mapping) and rows in self.eval_dataset
        return rows if rows is None or named or isinstance(rows, ScoredPairs) else self._prepare(rows, "eval")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with write_errors(self.args.output_dir or "."):
            super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        vars(self)["_signature_columns"] = []
