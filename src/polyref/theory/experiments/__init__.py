"""The named experiments of the theory lab: one file each, with `EXPERIMENT = Experiment(...)`, loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Final

from polyref.errors import ConfigError
from polyref.theory.results import ExperimentResult

Progress = Callable[[int, int], None]
"""Called with (done, total) as the work goes on."""

SMALLEST, ENOUGH = 20, 100
"""Replicates from which the 95% interval of a mean of exponential values holds it 88, and 94 times in 100."""

LARGEST: Final = 100_000
"""Replicates beyond which an experiment may need more memory than there is."""

FEW = "With {} replicates, fewer than {}, intervals are too narrow; of 20, those of skewed means miss 12 times in 100, not 5."


@dataclass(frozen=True, slots=True)
class Experiment:
    """`run(replicates, seed, progress)` makes the result; `seconds` is what that takes at `default_replicates` on two cores."""

    name: str
    title: str
    run: Callable[[int, int, Progress], ExperimentResult]
    default_replicates: int
    seconds: float

    def __call__(self, replicates: int | None = None, seed: int = 0, progress: Progress | None = None) -> ExperimentResult:
        """The result at `replicates` (None: the default) from `seed`: the same numbers for the same seed.

        Fewer than ENOUGH replicates get a note. Raises ConfigError for fewer than SMALLEST, more than LARGEST, and a negative
        seed.
        """
        check(replicates, seed)
        size = replicates or self.default_replicates
        result = self.run(size, seed, progress or _silent)
        return result if size >= ENOUGH else replace(result, notes=(*result.notes, FEW.format(size, ENOUGH)))


def check(replicates: int | None, seed: int) -> None:
    """Refuse, with ConfigError, what no experiment can run with."""
    if replicates is not None and replicates < SMALLEST:
        raise ConfigError(f"replicates is {replicates}", fix=f"give at least {SMALLEST}, or intervals mean nothing")
    if replicates is not None and replicates > LARGEST:
        raise ConfigError(f"replicates is {replicates}", fix=f"give at most {LARGEST}, which have to fit in memory")
    if seed < 0:
        raise ConfigError(f"seed is {seed}", fix="give a whole number of at least 0")


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


class _Registry(Mapping[str, Experiment]):
    """name -> Experiment, in the order of `names`; a module is imported when its experiment is first looked at."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Experiment:
        if name not in self._names:
            raise KeyError(name)
        found: Experiment = import_module(f"{__name__}.{name.replace('-', '_')}").EXPERIMENT
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


EXPERIMENTS: Final[Mapping[str, Experiment]] = _Registry(
    "reverse-gap",
    "unregularised-gap",
    "forward-gap",
    "coverage",
    "pessimism",
    "online",
    "settings",
    "multistep",
    "variance-reduction",
    "auxiliary-pairs",
    "doubly-robust",
    "references",
    "composition",
)
"""What `polyref lab` can run. The module of NAME is its name with underscores."""
