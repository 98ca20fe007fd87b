"""Cross-fitting: no pair is predicted by a model that saw its prompt, and what is there is not done again."""

from __future__ import annotations

import json
import random

import pytest
import torch

from polyref.data.sources import prompt_key
from polyref.errors import ConfigError, DataError, ModelError, RunFolderError
from polyref.objectives import sigmoid, variance_reduced
from polyref.rewards.cross_fit import Comparison, cross_fit, prompt_folds
from polyref.rewards.preference_model import NamedPreferences
from polyref.types import PreferenceRecord

SETTINGS = {"fit": "spy"}


def some_records(prompts: int = 11, seed: int = 0) -> list[PreferenceRecord]:
    """Up to four pairs a prompt, those of a prompt not next to each other."""
    draw = random.Random(seed)
    records = [
        PreferenceRecord(f"prompt {p}", f"answer {p}.{i}", f"reply {p}.{i}", row=i)
        for p in range(prompts)
        for i in range(draw.randint(1, 4))
    ]
    draw.shuffle(records)
    return records


class Spy:
    """A fit whose model knows which prompts it saw, and says a number that depends on them."""

    def __init__(self) -> None:
        self.fitted: list[int] = []
        self.leaks: list[str] = []

    def __call__(self, records, fold):
        self.fitted.append(fold)
        seen = {prompt_key(record.prompt) for record in records}
        share = len(records) / 1000

        def model(prompts, first, second):
            self.leaks += [prompt for prompt in prompts if prompt_key(prompt) in seen]
            pairs = zip(map(prompt_key, first), map(prompt_key, second), strict=True)
            return torch.tensor([0.5 + share if a < b else 0.5 - share for a, b in pairs])

        return NamedPreferences("spy", model)


def test_no_model_is_asked_about_a_prompt_it_saw():
    records, spy = some_records(), Spy()
    auxiliary = [Comparison(f"prompt {p}", "x", "y") for p in range(15)]  # four of them nobody labelled
    found = cross_fit(records, spy, folds=3, seed=0, pairs=[*auxiliary, *(Comparison(r.prompt, "u", "v") for r in records)])
    assert spy.fitted == [0, 1, 2] and not spy.leaks
    of_prompt = prompt_folds(records, [pair.prompt for pair in auxiliary], folds=3, seed=0)
    assert found.fold[:15].tolist() == [of_prompt[prompt_key(pair.prompt)] for pair in auxiliary]
    for fold, probability in zip(found.fold.tolist(), found.probability.tolist(), strict=True):
        others = sum(of_prompt[prompt_key(r.prompt)] != fold for r in records)
        assert probability == pytest.approx(0.5 + others / 1000)


def test_the_default_pairs_are_the_records_own_with_chosen_first():
    records = some_records()
    found = cross_fit(records, Spy(), folds=2, seed=0)
    assert found.probability.dtype == torch.float64 and (found.probability > 0.5).all()
    swapped = [Comparison(r.prompt, r.rejected, r.chosen) for r in records]
    back = cross_fit(records, Spy(), folds=2, seed=0, pairs=swapped)
    torch.testing.assert_close(back.probability, 1 - found.probability, rtol=0, atol=1e-7)


@pytest.mark.parametrize("folds", [2, 3, 5, 11])
def test_folds_hold_whole_prompts_and_nearly_equal_numbers_of_pairs(folds):
    records = some_records()
    of_prompt = prompt_folds(records, folds=folds, seed=3)
    sizes = [sum(of_prompt[prompt_key(r.prompt)] == fold for r in records) for fold in range(folds)]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 4 and sum(sizes) == len(records)


def test_folds_depend_on_prompts_and_seed_alone():
    records = some_records()
    found = prompt_folds(records, ["new"], folds=4, seed=1)
    assert prompt_folds(records[::-1], ["new"], folds=4, seed=1) == found
    without = prompt_folds(records, folds=4, seed=1)
    assert without == {prompt: fold for prompt, fold in found.items() if prompt != prompt_key("new")}
    assert prompt_folds(records, ["new"], folds=4, seed=2) != found


def test_a_killed_call_goes_on_where_it_was_and_ends_alike(tmp_path):
    records, spy = some_records(), Spy()
    whole = cross_fit(records, spy, folds=4, seed=0, folder=tmp_path / "whole", settings=SETTINGS)

    class Killed(Spy):
        def __call__(self, records, fold):
            if fold == 2:
                raise KeyboardInterrupt
            return super().__call__(records, fold)

    killed, resumed = Killed(), Spy()
    with pytest.raises(KeyboardInterrupt):
        cross_fit(records, killed, folds=4, seed=0, folder=tmp_path / "run", settings=SETTINGS)
    found = cross_fit(records, resumed, folds=4, seed=0, folder=tmp_path / "run", settings=SETTINGS)
    assert (killed.fitted, resumed.fitted) == ([0, 1], [2, 3])
    assert torch.equal(found.probability, whole.probability) and torch.equal(found.fold, whole.fold)
    assert torch.equal(found.probability, cross_fit(records, Spy(), folds=4, seed=0).probability)
    for file in (tmp_path / "whole").rglob("*.json"):
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(tmp_path / "whole")).read_bytes()
    again = Spy()
    cross_fit(records, again, folds=4, seed=0, folder=tmp_path / "run", settings=SETTINGS)
    assert not again.fitted


def test_a_torn_fold_is_fitted_again(tmp_path):
    records, spy = some_records(), Spy()
    found = cross_fit(records, Spy(), folds=3, seed=0, folder=tmp_path, settings=SETTINGS)
    (tmp_path / "stages" / "fold-1" / "probabilities.json").write_text(json.dumps([0.1]))
    again = cross_fit(records, spy, folds=3, seed=0, folder=tmp_path, settings=SETTINGS)
    assert spy.fitted == [1] and torch.equal(again.probability, found.probability)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"learning_rate": 2}}, "learning_rate 1 -> 2"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"folds": 4}, "folds 3 -> 4"),
        ({"pairs": [Comparison("prompt 0", "x", "y")]}, "pairs"),
    ],
)
def test_another_fit_does_not_take_over_a_folder(tmp_path, change, named):
    records, usual = some_records(), {"folds": 3, "seed": 0, "settings": {"learning_rate": 1}}
    cross_fit(records, Spy(), folder=tmp_path, **usual)
    with pytest.raises(RunFolderError, match=named):
        cross_fit(records, Spy(), folder=tmp_path, **usual | change)
    flipped = [*records[1:], PreferenceRecord(records[0].prompt, records[0].rejected, records[0].chosen)]
    with pytest.raises(RunFolderError, match="records"):
        cross_fit(flipped, Spy(), folder=tmp_path, **usual)


def test_a_folder_without_settings_is_refused_before_anything_is_fitted(tmp_path):
    spy = Spy()
    for settings in (None, {}):
        with pytest.raises(ConfigError, match="^cross_fit: a folder is given without settings, .*; name in settings what fit"):
            cross_fit(some_records(), spy, folds=3, seed=0, folder=tmp_path / "run", settings=settings)
    assert not spy.fitted and not (tmp_path / "run").exists()


def test_equal_prompts_are_equal_to_a_folder_however_they_are_held(tmp_path):
    """Messages as a tuple or a list, their keys in either order."""
    usual = {"folds": 2, "seed": 0, "folder": tmp_path, "settings": {"learning_rate": 1}}

    def asked(make):
        records = [PreferenceRecord(make("user", p), make("assistant", "a"), make("assistant", "b")) for p in "xyz"]
        return records, [Comparison(r.prompt, r.rejected, r.chosen) for r in records]

    records, pairs = asked(lambda role, text: ({"role": role, "content": text},))
    found = cross_fit(records, Spy(), pairs=pairs, **usual)
    again, same = Spy(), asked(lambda role, text: [{"content": text, "role": role}])
    assert torch.equal(cross_fit(same[0], again, pairs=same[1], **usual).probability, found.probability)
    assert not again.fitted


def test_too_few_folds_or_prompts_and_no_probability_are_refused():
    records = some_records(prompts=3)
    for folds in (1, 0, True, 2.0):
        with pytest.raises(ConfigError, match="folds is"):
            cross_fit(records, Spy(), folds=folds, seed=0)
    with pytest.raises(DataError, match="3 prompts cannot be split into 4 folds"):
        cross_fit(records, Spy(), folds=4, seed=0)
    with pytest.raises(ModelError, match="broken.*row 1"):
        cross_fit(records, lambda *_: NamedPreferences("broken", lambda p, a, b: torch.full((len(p),), 1.5)), folds=2, seed=0)


def test_a_g_fitted_on_its_own_labels_cancels_them_and_a_cross_fitted_one_does_not():
    """Five votes a prompt, without signal: a g that memorises them takes the labels out of the gradient."""
    draw = random.Random(0)
    pair = ("a", "b")
    records = [PreferenceRecord(f"{p}", *(pair if draw.random() < 0.5 else pair[::-1])) for p in range(400) for _ in range(5)]

    def fit(training, fold):
        """The share of a prompt's own votes; where it has none, of all."""
        votes: dict[str, list[bool]] = {}
        for record in training:
            votes.setdefault(record.prompt, []).append(record.chosen == "a")
            votes.setdefault("", []).append(record.chosen == "a")
        means = {prompt: sum(of_prompt) / len(of_prompt) for prompt, of_prompt in votes.items()}
        return NamedPreferences("shares", lambda p, a, b: torch.tensor([means.get(x, means[""]) for x in p]))

    asked = [Comparison(r.prompt, "a", "b") for r in records]
    z = torch.tensor([float(r.chosen == "a") for r in records], dtype=torch.float64)

    def slope(g):
        """The gradient of the data parts in a reward difference of each prompt."""
        h = torch.zeros(len(records), dtype=torch.float64, requires_grad=True)
        terms = variance_reduced(h, z, g.double(), h.detach()[:, None], g.double()[:, None], sigmoid)
        return torch.autograd.grad(terms.loss.sum(), h)[0].view(400, 5).sum(1)

    own = fit(records, -1)(*zip(*asked, strict=True))
    assert slope(own).abs().max() < 1e-6  # what the labels say is gone
    crossed = cross_fit(records, fit, folds=5, seed=0, pairs=asked).probability
    plain = (0.5 - z).view(400, 5).sum(1)
    assert torch.corrcoef(torch.stack([slope(crossed), plain]))[0, 1] > 0.99
