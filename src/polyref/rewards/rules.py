"""Rewards that are rules on the text of a completion, each by its name for the command line: rule:length, rule:matches:^Yes.

RULES maps the name to the function that makes the reward; the `fingerprint` of a rule says all that its values depend on
besides the texts, so that `cached` can keep them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polyref.errors import ConfigError, ModelError
from polyref.rewards.exact_answer import exact_answer
from polyref.rewards.functions import NamedReward, from_function, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFIX = "rule:"


def length(
    unit: str = "words", *, target: float | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> NamedReward:
    """How long a completion is, in `unit`: characters, words (what white space separates), or tokens of `tokenizer`.

    With a `target` T it is -|length - T|. ConfigError for another unit, a T that is negative or not finite, or tokens without
    a tokenizer.
    """
    units: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
    fingerprint = f"length 1 in {unit}, target {target}"
    if tokenizer is not None:
        from polyref.data.tokenize import tokenizer_fingerprint

        units["tokens"] = lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        fingerprint += f", tokenizer {tokenizer_fingerprint(tokenizer)}"
    if unit not in units:
        fix = "give a tokenizer" if unit == "tokens" else "choose characters, words or tokens"
        raise ConfigError(f"length in {unit!r}", where="rule:length", fix=fix)
    if target is not None and not 0 <= target < float("inf"):
        raise ConfigError(f"target is {target}", where="rule:length", fix="give a length of at least 0")
    count = units[unit]

    def reward(_: object, completion: Any) -> float:
        found = count(plain_text(completion))
        return found if target is None else -abs(found - target)

    return from_function(reward, f"length in {unit}" + ("" if target is None else f" near {target:g}"), fingerprint)


def matches(pattern: str) -> NamedReward:
    """1 where the regular expression `pattern` is found anywhere in the completion, else 0.

    (?i) in front ignores case, and \\A and \\Z hold it to the ends. ConfigError if it is no regular expression.
    """
    try:
        search = re.compile(pattern).search
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{pattern!r} is no regular expression ({error})", where="rule:matches", fix="mend it") from None

    def reward(_: object, completion: Any) -> float:
        return float(search(plain_text(completion)) is not None)

    return from_function(reward, f"matches {pattern}", f"matches 1 {pattern}")


def sentiment() -> NamedReward:
    """VADER's compound sentiment of a completion, by lexicon and rules: from -1, most negative, to 1; 0 for no word it knows.

    ModelError where vaderSentiment (the extra `sentiment`) is not installed. Source: Hutto and Gilbert, ICWSM 2014.
    """
    from importlib.metadata import version

    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        fix = "pip install 'polyref[sentiment]'"
        raise ModelError("needs the package vaderSentiment", where="rule:sentiment", fix=fix) from None
    analyser = SentimentIntensityAnalyzer()

    def reward(_: object, completion: Any) -> float:
        return float(analyser.polarity_scores(plain_text(completion))["compound"])

    return from_function(reward, "sentiment", f"sentiment 1 vaderSentiment {version('vaderSentiment')}")


RULES: dict[str, Callable[..., NamedReward]] = {
    "exact_answer": exact_answer,
    "length": length,
    "matches": matches,
    "sentiment": sentiment,
}


def rule(spec: str, **options: Any) -> NamedReward:
    """The rule that "rule:NAME" or "rule:NAME:ARGUMENT" names; ARGUMENT is the first of its arguments, `options` the others.

    rule:exact_answer:FILE, rule:length:UNIT, rule:matches:PATTERN, rule:sentiment. ConfigError for any other.
    """
    name, given, argument = spec.removeprefix(_PREFIX).partition(":")
    if not spec.startswith(_PREFIX) or name not in RULES:
        fix = f"choose one of {', '.join(_PREFIX + known for known in RULES)}"
        raise ConfigError(f"there is no rule {spec!r}", fix=fix)
    arguments = [argument] if given else []
    try:
        inspect.signature(RULES[name]).bind(*arguments, **options)
    except TypeError as error:
        signature = ", ".join(inspect.signature(RULES[name]).parameters) or "nothing"
        raise ConfigError(str(error), where=spec, fix=f"the rule {name} takes {signature}") from None
    return RULES[name](*arguments, **options)
