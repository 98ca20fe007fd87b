"""What both trainers add to transformers' Trainer: scored pairs in, means over pairs on the log, differences as predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from polyref.data.tokenize import TokenizedPreferences
from polyref.errors import ConfigError
from polyref.files import write_errors
from polyref.training.arguments import as_settings, check_optimiser
from polyref.training.auxiliary import auxiliary_records, plain_records
from polyref.training.dataset import GroupedSampler, PairCollator, ScoredPairs
from polyref.training.guards import WholeWindows, mean_loss, stop_diverged
from polyref.training.means import PairMeans
from polyref.training.prepare import grouped_sampler, records_of, tokens_of
from polyref.training.step_objective import StepObjective


class PairTrainer(Trainer):
    """transformers' Trainer for pairs of completions: all but the model, the loss, and what pairs are scored with beforehand.

    A trainer on top of it has `who`, what errors call its model; `_scored`; and `compute_loss`, which hands the values of its
    pairs to `_count` and returns, where outputs are asked for, the reward difference h (B,) of each pair and no other.

    Args:
        metrics: names of the values that every batch gives for each pair: means over pairs in every log line.
        step_objective: what a training step minimises instead of the pair loss, if anything; training rows then have the
            auxiliary columns, which no other rows are read for.
    """

    who: ClassVar[str]
    args: Any
    model: nn.Module
    train_dataset: ScoredPairs
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        eval_dataset: Any,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback],
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
        *,
        metrics: Sequence[str],
        step_objective: StepObjective | None = None,
    ) -> None:
        self.metrics, self.step_objective = tuple(metrics), step_objective
        logged = step_objective.columns if step_objective is not None else ()
        informed = step_objective.callbacks if step_objective is not None else ()
        self.means = PairMeans({"train": (*metrics, *logged), "eval": (*metrics, "loss")})
        self._evaluated: Any = None
        with as_settings():
            super().__init__(
                model=model,
                args=args,
                data_collator=PairCollator(),
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=[WholeWindows(), *informed, *callbacks],
                optimizers=optimizers,
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs: accumulation divides it
        check_optimiser(self)

    def _prepare_sets(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Make the data sets that training and evaluation read."""
        self._check_metric(eval_dataset)
        if train_dataset is not None:
            self.train_dataset = self._prepare(train_dataset, "train", with_auxiliary=self.step_objective is not None)
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {name: self._prepare(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare(eval_dataset, "eval")

    def _check_metric(self, eval_dataset: Any) -> None:
        """ConfigError for a best model by a number that no evaluation says."""
        sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
        known, asked = [name + metric for name in sets for metric in ("loss", *self.metrics)], self.args.metric_for_best_model
        if asked is not None and eval_dataset is not None and asked.removeprefix("eval_") not in known:
            raise ConfigError(f"unknown metric_for_best_model {asked!r}", fix=f"use one of {', '.join(known)}")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, for push_to_hub; what the hub refuses is one line."""
        try:
            super().init_hf_repo(token, private)
        except (OSError, ValueError) as error:
            fix = "check the network, set HF_TOKEN to one that may write, or leave push_to_hub out"
            raise ConfigError(f"there can be no repository on the hub: {error}", where="push_to_hub", fix=fix) from error

    def _prepare(self, source: Any, name: str, *, with_auxiliary: bool = False) -> ScoredPairs:
        """Rows -> records -> tokens -> scored pairs. Refuses a set with nothing left to train on."""
        records = records_of(source, self.args.prompt_format)
        records = auxiliary_records(records, self.args.objective) if with_auxiliary else plain_records(records)
        return self._scored(tokens_of(records, name, self.args, self.processing_class, self.model, f"the {self.who}"), name)

    def _scored(self, data: TokenizedPreferences, name: str) -> ScoredPairs:
        """`data`, the set called `name`, with what is computed of it once, before training."""
        raise NotImplementedError

    def _count(
        self, loss: Tensor, losses: Tensor, metrics: Sequence[Tensor], index: Tensor, terms: Tensor | None = None
    ) -> None:
        """Add a batch's values to the means: `metrics`, each (B,), with `terms` in training, with `losses` in evaluation.

        A `loss` that is not finite stops training, and the rows at `index` are saved.
        """
        if not torch.isfinite(loss):
            dataset = self.train_dataset if self.model.training else self._evaluated
            stop_diverged(self.args.output_dir, self.state.global_step, dataset, index)
        if not self.model.training:
            self.means.add("eval", self.accelerator.gather_for_metrics(torch.stack([*metrics, losses], 1)))
            return
        values = torch.stack([*metrics], 1)
        self.means.add("train", values if terms is None else torch.cat([values.detach().cpu().double(), terms], 1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training means to a line about training; lines about evaluation carry theirs already.

        `train_loss` of the last line becomes the mean over all steps, those before a resume included.
        """
        if "loss" in logs:
            means, pairs = self.means.take("train", self._over_processes if self.args.world_size > 1 else None)
            if pairs and self.step_objective is not None:
                means = {name: means[name] for name in self.metrics} | self.step_objective.summary(means, pairs)
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
        """Loss of a batch, and the reward difference h of its pairs as its prediction: `predict` returns (N,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        (h,) = outputs.values()
        return loss.detach(), None if prediction_loss_only else h.float(), None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's; settings that none can be made of are one line."""
        with as_settings(LookupError, RuntimeError, TypeError):
            return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return grouped_sampler(dataset, self.args, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's, for scored pairs, the name of a set, or preference rows of any kind. No row is dropped."""
        rows = self._prepared(eval_dataset)
        with self._whole():
            return super().get_eval_dataloader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As Trainer's, for scored pairs or preference rows of any kind. No row is dropped."""
        rows = self._prepared(test_dataset)
        with self._whole():
            return super().get_test_dataloader(rows)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """`dataloader_drop_last` is about training."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop

    def _prepared(self, rows: Any) -> Any:
        named = isinstance(rows, str) and isinstance(self.eval_dataset, Mapping) and rows in self.eval_dataset
        return rows if rows is None or named or isinstance(rows, ScoredPairs) else self._prepare(rows, "eval")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with write_errors(self.args.output_dir or "."):
            super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        vars(self)["_signature_columns"] = []
