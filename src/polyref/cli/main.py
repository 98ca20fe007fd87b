"""`polyref VERB [--config file.yaml] [--flag value ...]`: parse, run one verb, and end with an exit code that means something.

0 done; 2 the input is wrong (one line: what, where, how to mend); 1 anything else. Ctrl-C leaves a resumable run.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from io import TextIOWrapper
from itertools import pairwise
from typing import Any

from polyref.errors import ConfigError, PolyrefError, one_line
from polyref.files import unwritable

VERBS = {
    "quickstart": "train a small model against two references on packaged human preferences, and show the result",
    "validate": "check preference data: counts, lengths, duplicates, and every bad row",
    "score": "score preference data under K references, into the cache",
    "train": "train a policy on preference data against K references",
    "reward": "train a reward model on preference data, and say how far its rewards are to be believed",
    "auxiliary": "draw more pairs and have a preference model judge all, for variance-reduced training",
    "sample": "draw from references, exactly composed and tilted by a reward, and say how sure that is",
    "fit": "train a policy on weighted samples, by maximum likelihood",
    "label": "ask a person which completions are better, on a page or in a file, and write the pairs with these labels",
    "multistep": "lead a policy to the references' tilt by a reward, by rejection sampling in several steps",
    "iterate": "train a policy in rounds on pairs of its own completions, online or with offline pairs too",
    "lab": "measure what theory claims, on exact bandits whose optimum is known",
    "plan": "say how many preference pairs a target gap needs, by the bounds and as measured",
}
"""What the command line can do. Each verb is a module of this package with `add_arguments(parser)` and `run(settings)`."""

_USAGE = 2
_UNREADABLE = "cannot be read"
_LONGEST = 2000

# What jsonargparse writes around the one line of an error that says what is wrong.
_UNTELLING = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Unable to load|Problem with|Expected a (dot import|<class 'NoneType')"
)
_PLAIN_WORDS = (
    (re.compile(r"<class '([\w.]+)'>"), r"\1"),
    (re.compile(r"typing\.Literal\[(.*?)\]"), r"one of \1"),
    (re.compile(r"Expected an? (.*?)\. Got value: (.*)"), r"expected \1, got \2"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"polyref {metadata.version('polyref')}\n")
        return 0
    verb = words.pop(0)
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}; use one of {', '.join(VERBS)}", _USAGE)
    _quiet_libraries()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a report may hold characters that the terminal has not
    try:
        module = import_module(f"polyref.cli.{verb}")
        settings = _parse(module, verb, words)
        if settings is not None:
            module.run(settings)
    except PolyrefError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 1)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        refusal = unwritable(error)
        if refusal is None:
            raise
        return _fail(str(refusal), refusal.exit_code)
    return 0


def _parse(module: Any, verb: str, words: list[str]) -> Any:
    """The verb's settings, or None when --help or --print_config was all that was asked for."""
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    purpose = VERBS[verb][0].upper() + VERBS[verb][1:] + "."
    parser = ArgumentParser(prog=f"polyref {verb}", description=purpose, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags win over it.")
    module.add_arguments(parser)
    parser.usage = _usage(parser)
    try:
        return parser.instantiate(parser.parse_args(_files_first(words)))
    except PolyrefError:
        raise
    except SystemExit as stop:  # --help and --print_config; whatever is wrong is raised, as exit_on_error is off
        if stop.code:
            raise
        return None
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        cause = _polyref_cause(error)
        if cause is not None:
            raise cause from error
        reason = _reason(str(error))
        group = reason.partition(":")[0]
        if reason == f"{group}: {_UNREADABLE}" and any(name.startswith(f"{group}.") for name in _names(parser)):
            reason = f"{group}: takes settings of its own, as in {group}.NAME or {{NAME: VALUE}}"
        shown = f"{group}.help" if f"{group}.help" in _names(parser) else "help"
        fix = f"{_meant(reason, parser)}see polyref {verb} --{shown}"
        raise ConfigError(reason, where=_where(verb, words), fix=fix) from error


def _usage(parser: Any) -> str:
    """One line: what has to be given. Help explains all flags below it."""

    def value(action: Any) -> str:
        return str(action.metavar or action.dest.rpartition(".")[2].upper())

    named = [f"{action.option_strings[-1]} {value(action)}" for action in parser._actions if action.required]
    bare = [f"[{value(action)} ...]" for action in parser._actions if not action.option_strings]
    return " ".join([parser.prog, "[--config FILE]", *named, *bare, "[--flag value ...]"])


def _meant(reason: str, parser: Any) -> str:
    """The setting that an unknown one is nearest to, as a question."""
    unknown = re.match(r"(?:unrecognized arguments: --|Option ')([\w.-]+)", reason)
    near = get_close_matches(unknown[1].replace("-", "_"), _names(parser), 1, 0.75) if unknown else []
    return f"did you mean {near[0]}? " if near else ""


def _names(parser: Any) -> list[str]:
    return [flag.removeprefix("--") for action in parser._actions for flag in action.option_strings]


def _files_first(words: Sequence[str]) -> list[str]:
    """`words` with the settings file before all else: the parser lets the last win, and flags are to win over the file."""
    of_file = [word.startswith("--config=") or "--config" in (word, before) for before, word in pairwise(["", *words])]
    marked = list(zip(words, of_file, strict=True))
    return [word for word, is_file in marked if is_file] + [word for word, is_file in marked if not is_file]


def _where(verb: str, words: Sequence[str]) -> str:
    """The command, with the settings file it was given."""
    after = [value for word, value in zip(words, words[1:], strict=False) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return " ".join([f"polyref {verb}", *(f"--config {file}" for file in after + joined)])


def _polyref_cause(error: BaseException | None) -> PolyrefError | None:
    """The PolyrefError a settings class raised, under what the parser wrapped around it."""
    while error is not None:
        if isinstance(error, PolyrefError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(text: str) -> str:
    """A parser's many lines as one: the dotted name of the setting, and what is wrong with its value."""
    if text.startswith("Unexpected config"):
        return "the file holds no mapping of settings"
    lines = [line.strip(" -") for line in text.replace('in "<unicode string>", ', "").splitlines()]
    if text.startswith("Problems parsing config"):
        return " ".join(lines)
    name = ""
    for key in re.findall(r'Parser key "([^"]*)"', text):
        name = key if key.startswith(name) else f"{name}.{key}"
    told = (re.sub(r'^Parser key "[^"]*":\s*', "", line) for line in lines)
    reason = " or ".join(dict.fromkeys(line for line in told if line and not _UNTELLING.match(line))) or _UNREADABLE
    for pattern, plain in _PLAIN_WORDS:
        reason = pattern.sub(plain, reason)
    return f"{name}: {reason}" if name else reason


def _fail(line: str, code: int) -> int:
    sys.stderr.write(f"polyref: {one_line(line, _LONGEST)}\n")
    return code


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: polyref VERB [--config file.yaml] [--flag value ...]\n\n"
        "Align language models with human preferences against many references at once.\n\n"
        f"verbs:\n{verbs}\n\n"
        "polyref VERB --help explains every setting; --print_config shows the settings as YAML; --version.\n"
        "Exit codes: 0 done; 2 the input is wrong (one line says how to mend it); 1 anything else.\n"
    )


class _OneLine(logging.Formatter):
    """A message as one printable line: names and texts in it may come from whoever wrote the data or the recipe."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(record.getMessage(), _LONGEST)


def _quiet_libraries() -> None:
    """polyref's own log lines at INFO, the libraries' at ERROR, progress bars ours alone."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each of its many attempts to reach the hub is a line otherwise
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(transformers|torch|peft|datasets|accelerate)(\..*)?")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("polyref").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
