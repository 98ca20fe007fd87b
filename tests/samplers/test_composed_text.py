"""Members with different tokenizers: whole texts, by canonical encodings, against enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from transformers import PreTrainedTokenizerFast

from enumerable_lm import END, OnlyAllowed
from fakes import CHATML, byte_tokenizer, tiny_llama
from polyref.errors import ModelError, ReferenceSetError
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.samplers.composed import draw_composed
from polyref.samplers.composed_values import Drawn
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.members import Member, Members, load_members
from polyref.samplers.members_scores import member_logps

WEIGHTS, LENGTH = (0.4, 0.6), 4
CHAT = ({"role": "user", "content": "hi"},)
PROMPTS = pytest.mark.parametrize("prompt", ["ab", CHAT], ids=["text", "chat"])


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for EF, next to those of E and F."""
    return byte_tokenizer([("E", "F")])


@pytest.fixture(scope="module")
def members(tiny_tokenizer: PreTrainedTokenizerFast) -> Members:
    """One member writes E and F, the other E, F and EF: what it writes as E, F is not canonical."""
    other = merging()
    merged = other.convert_tokens_to_ids("EF")
    assert tiny_tokenizer.encode("EF", add_special_tokens=False) == [40, 41]
    pair = [
        (tiny_tokenizer, OnlyAllowed(tiny_llama(tiny_tokenizer, seed=1).double(), spread=2.0)),
        (other, OnlyAllowed(tiny_llama(other, seed=6).double(), (END, 40, 41, merged), spread=2.0)),
    ]
    return load_members(ReferenceSet(tuple(Reference(m, tokenizer=t, system_prompt="s") for t, m in pair), WEIGHTS))


def exact(members: Members, prompt: object) -> dict[str, tuple[float, float]]:
    """(log pi_1, log pi_2) of every text that ends within LENGTH tokens of the drawing member; -inf where one takes more."""
    texts = ["".join(body) for size in range(2 * LENGTH) for body in itertools.product("EF", repeat=size)]
    table = {}
    with members.drawing():
        for text in texts:
            logps = []
            for member in members.members:
                assert isinstance(member, Member)
                ids = (*member.encoder.tokenizer.encode(text, add_special_tokens=False), END)
                before = member.encoder.encode_prompt(prompt, "s")  # type: ignore[arg-type]
                logps.append(member_logps(member, [(before, ids)], 1)[0] if len(ids) <= LENGTH else -math.inf)
            if max(logps) > -math.inf:
                table[text] = (logps[0], logps[1])
    return table


def p_value(drawn: Drawn, masses: dict[str, float]) -> float:
    counts = Counter(sample.text for sample in drawn.samples)
    assert counts.keys() <= {text for text, mass in masses.items() if mass > 0} and all(s.ended for s in drawn.samples)
    observed = np.array([counts[text] for text in masses])
    expected = len(drawn.samples) * np.array(list(masses.values())) / sum(masses.values())
    rising = np.argsort(expected)
    small = rising[: int((np.cumsum(expected[rising]) < 5).sum()) + 1]
    large = np.setdiff1d(rising, small)
    return float(chisquare(*(np.append(values[large], values[small].sum()) for values in (observed, expected))).pvalue)


@PROMPTS
def test_rejection_draws_the_product_of_text_probabilities(members, prompt):
    table = exact(members, prompt)
    masses = {text: math.exp(0.4 * a + 0.6 * b) for text, (a, b) in table.items()}
    (drawn,) = draw_composed(
        members, [prompt], 1500, SamplingParameters(LENGTH), seed=0, method="rejection", fixed=True, batch_size=500
    )
    assert not members.one_tokenizer and len(drawn.samples) > 100
    assert p_value(drawn, masses) > 0.001
    assert p_value(drawn, {text: 0.4 * math.exp(a) + 0.6 * math.exp(b) for text, (a, b) in table.items()}) < 1e-6
    assert binomtest(drawn.accepted, drawn.proposals, sum(masses.values())).pvalue > 0.001
    for sample in drawn.samples[:50]:
        assert sample.logps == pytest.approx(table[sample.text], abs=1e-9)


def test_the_mixture_rejects_what_is_not_canonical(members):
    table = exact(members, "ab")
    masses = {text: 0.4 * math.exp(a) + 0.6 * math.exp(b) for text, (a, b) in table.items()}
    arithmetic = replace(members, composition="arithmetic")
    (drawn,) = draw_composed(
        arithmetic, ["ab"], 1500, SamplingParameters(LENGTH), seed=2, method="mixture", fixed=True, batch_size=500
    )
    assert p_value(drawn, masses) > 0.001
    assert 0 < drawn.acceptance < 1 and drawn.mass.low < sum(masses.values()) < drawn.mass.high


def test_methods_of_tokens_are_refused_and_a_choice_is_of_whole_texts(members):
    for method in ("tokens", "smc"):
        with pytest.raises(ReferenceSetError, match=f"method {method} .*different tokenizers; use rejection, which"):
            draw_composed(members, ["ab"], 1, SamplingParameters(LENGTH), seed=0, method=method)
    (drawn,) = draw_composed(members, ["ab"], 2, SamplingParameters(LENGTH), seed=0)
    assert drawn.method == "rejection" and len(drawn.samples) == 2 and drawn.exact


def test_a_template_without_an_end_is_refused(tiny_tokenizer):
    endless = byte_tokenizer(chat_template=CHATML.replace("<eos>", ""))
    models = [(tokenizer, tiny_llama(tokenizer)) for tokenizer in (tiny_tokenizer, endless)]
    members = load_members(ReferenceSet(tuple(Reference(m, tokenizer=t) for t, m in models)))
    with pytest.raises(ModelError, match="does not end with what ends completions"), torch.no_grad():
        draw_composed(members, [CHAT], 1, SamplingParameters(4), seed=0, method="rejection")


def test_a_text_that_a_template_would_trim_has_no_probability_there(tiny_tokenizer):
    """Else the trimming member would give each of " E", "E " and "E" what it gives "E", and draw only the last."""
    trimming = byte_tokenizer([("E", "F")], chat_template=CHATML.replace("message['content']", "message['content'] | trim"))
    (blank,) = tiny_tokenizer.encode(" ", add_special_tokens=False)
    assert trimming.encode(" ", add_special_tokens=False) == [blank]
    members = load_members(
        ReferenceSet(
            tuple(
                Reference(OnlyAllowed(tiny_llama(tokenizer, seed=seed).double(), (END, 40, blank), 2.0), tokenizer=tokenizer)
                for seed, tokenizer in ((1, tiny_tokenizer), (6, trimming))
            ),
            WEIGHTS,
        )
    )
    masses = {}
    for text in map("".join, itertools.chain(*(itertools.product("E ", repeat=size) for size in range(3)))):
        ids = (*tiny_tokenizer.encode(text, add_special_tokens=False), END)
        with members.drawing():
            first, second = (
                math.exp(member_logps(member, [(member.encoder.encode_prompt(CHAT), ids)], 1)[0]) for member in members.members
            )
        masses[text] = (first, second if text == text.strip() else 0.0)
    settings = {"fixed": True, "batch_size": 400}
    for method, composed in (
        ("rejection", {text: first**0.4 * second**0.6 for text, (first, second) in masses.items()}),
        ("mixture", {text: 0.4 * first + 0.6 * second for text, (first, second) in masses.items()}),
    ):
        same = replace(members, composition="geometric" if method == "rejection" else "arithmetic")
        (drawn,) = draw_composed(same, [CHAT], 400, SamplingParameters(3), seed=0, method=method, **settings)
        assert p_value(drawn, composed) > 0.001
        for sample in drawn.samples:
            assert math.isfinite(sample.logps[1]) == (sample.text == sample.text.strip())
