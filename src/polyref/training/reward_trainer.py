"""Reward models from preference pairs, on transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from polyref.data.tokenize import TokenizedPreferences
from polyref.objectives.metrics import preference_accuracy
from polyref.rewards.classifier import fresh_classifier, with_head
from polyref.scoring.logprobs import ScoringPlan
from polyref.scoring.models import ModelSource, load_tokenizer
from polyref.scoring.score_head import completion_rewards, probe_rewards, score_head, settle_padding
from polyref.training.arguments import check_run
from polyref.training.dataset import PairCollator, ScoredPairs
from polyref.training.pair_trainer import PairTrainer
from polyref.training.policy import prepare_policy, tokenizer_of
from polyref.training.prepare import step_batch
from polyref.training.reward_config import RewardConfig
from polyref.training.step_objective import Step

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""What a log line adds to the loss: means over pairs, in reward units; the share of pairs where chosen has more reward."""

WHO = "reward model"


class RewardTrainer(PairTrainer):
    """Trains a reward model on pairs: mean over pairs of loss(r_c - r_r - margin) + c (r_c + r_r)^2.

    r is the score head's number at the end of each completion, both completions of a pair in one row that passes their prompt
    once; loss is the pair loss at the pair's `chosen_probability`, the Bradley-Terry likelihood by default; c centres rewards,
    which the loss alone leaves free up to a constant a prompt [arXiv 2312.09244 eq. 2].
    Under objective variance_reduced the pair loss is `objectives.variance_reduced` of it [arXiv 2504.03784]: training rows hold
    auxiliary pairs of their prompt, which pass in the row of their pair. Centring is of the data pair alone. Evaluation is
    always of the plain loss, and reads no auxiliary column.

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

    who = WHO
    args: RewardConfig

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
        check_run(args, eval_dataset)

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

        super().__init__(
            model,
            args,
            eval_dataset,
            tokenizer,
            callbacks or (),
            optimizers,
            metrics=METRICS,
            step_objective=args.step_objective(),
        )
        row_limit = 2 * args.max_length if args.max_length and self.step_objective is None else None
        with self.accelerator.autocast():
            self.plan: ScoringPlan = probe_rewards(self.model, row_limit=row_limit)
        self.data_collator = PairCollator(self.plan.layout)
        self._prepare_sets(train_dataset, eval_dataset)

    def _scored(self, data: TokenizedPreferences, name: str) -> ScoredPairs:
        """There is no anchor to score: zeros stand in its place."""
        return ScoredPairs(data.pairs, data.records, torch.zeros(len(data.pairs), len(data.pairs[0].completions)))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a batch; its rewards, margins and accuracies are added up for the next log line."""
        count = inputs["anchor"].shape[1]
        with self.accelerator.autocast():
            rewards = completion_rewards(model, step_batch(inputs, self.plan.layout, count), self.plan).view(-1, count)
        pair, h = rewards[:, :2], rewards[:, 0] - rewards[:, 1]
        if self.step_objective is not None and self.model.training:
            losses, terms = self.step_objective(Step(h, rewards[:, 2::2] - rewards[:, 3::2], inputs))
        else:
            losses, terms = self.pair_loss(h - inputs["margin"], inputs["chosen_probability"]), None
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * pair.sum(1) ** 2
        loss = losses.mean()
        self._count(loss, losses, [*pair.unbind(1), h, preference_accuracy(h)], inputs["index"], terms)
        return (loss, {"reward_difference": h.detach()}) if return_outputs else loss
