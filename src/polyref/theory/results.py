"""What an experiment hands over: curves, a table, slopes, and one sentence; plain numbers that JSON takes and gives back.

Drawing is in `polyref.report.lab`; writing files is in `polyref.cli.lab`. Sequences, arrays and tensors given to these classes
become tuples of floats, rounded to ten significant digits, so that one seed gives the same bytes again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np

from polyref.errors import ConfigError
from polyref.theory.regression import Estimates, Numbers, SlopeFit

Agreement = Literal["agrees", "beats the claim", "misses the claim", "undecided", "no claim"]
"""Of what was measured with what is claimed; "undecided" where intervals hold the claim and its contrary both."""

SLOPE_TOLERANCE: Final = 0.05
NEXT_RATE: Final = 0.5
"""Between the slopes that theory tells apart: 0, -1/2, -1."""


class Estimate(NamedTuple):
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float


Cell = str | int | float | Estimate | None


@dataclass(frozen=True, slots=True)
class Curve:
    """`y` (P,) over `x` (P,), and the ends `low` and `high` (P,) of its 95% interval where there is one."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None

    def __post_init__(self) -> None:
        for key in ("x", "y", "low", "high"):
            given = getattr(self, key)
            if given is not None:
                object.__setattr__(self, key, tuple(rounded(v) for v in np.asarray(given, dtype=np.float64).reshape(-1)))
                if len(getattr(self, key)) != len(self.x):
                    raise ConfigError(f"{key} has {len(getattr(self, key))} values for {len(self.x)} x", where=self.name)

    @classmethod
    def of(cls, name: str, x: Numbers, estimates: Estimates) -> Curve:
        """The curve of a statistic with its intervals."""
        return cls(name, x, estimates.value, estimates.low, estimates.high)


@dataclass(frozen=True, slots=True)
class Guide:
    """A claimed rate: the dashed line of `slope` on log-log axes through the point `through` (x, y).

    Without a point it goes through the middle of the panel's first curve. On axes that are not both logarithmic it is the
    power law of that exponent, drawn all the same; slope 0 is a level.
    """

    slope: float
    label: str
    through: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: curves on one pair of axes.

    `categories`, where given, name the x values 0, 1, ... (log_x is then False): one marker with its interval each, no lines.
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    guides: tuple[Guide, ...] = ()
    log_x: bool = True
    log_y: bool = True
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under `columns`: text, whole numbers, floats, or an Estimate, which is shown with its interval."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(f"{len(row)} cells for {len(self.columns)} columns", where=f"table row {index}")
        object.__setattr__(self, "rows", tuple(tuple(_cell(cell) for cell in row) for row in self.rows))


@dataclass(frozen=True, slots=True)
class Measured:
    """A constant that `polyref plan` may use: `value` with its 95% interval, at `confidence` (share of runs it holds for)."""

    name: str
    confidence: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """All that an experiment says.

    `question` is what a reader wants to know, `claim` what the papers state (with the source), `finding` one sentence: what was
    claimed, what was measured, agreement or not. `settings` holds replicates, seed and sizes; `notes` what qualifies the
    finding (assumptions, points left out). The order of everything is the order in which it is shown.
    """

    name: str
    title: str
    question: str
    claim: str
    finding: str
    agreement: Agreement
    panels: tuple[Panel, ...]
    table: Table
    slopes: tuple[SlopeFit, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if self.agreement not in get_args(Agreement):
            known = ", ".join(map(repr, get_args(Agreement)))
            raise ConfigError(f"agreement is {self.agreement!r}", where=self.name, fix=f"say one of {known}")


def agreement_of(fit: SlopeFit) -> Agreement:
    """What a fitted slope says of a claimed UPPER bound: its interval is steeper (beats it), flatter (misses it), or neither.

    An interval that ends within SLOPE_TOLERANCE of the claim agrees with it: at finite n, terms of higher order bend a line by
    as much, and with enough replicates the interval would tell such a bend from any rate. One that reaches from the claim to
    NEXT_RATE on either side is undecided, as is a slope that could not be fitted.
    """
    if fit.claimed is None:
        return "no claim"
    if fit.high < fit.claimed - SLOPE_TOLERANCE:
        return "beats the claim"
    if fit.low > fit.claimed + SLOPE_TOLERANCE:
        return "misses the claim"
    return "agrees" if fit.claimed - NEXT_RATE < fit.low and fit.high < fit.claimed + NEXT_RATE else "undecided"


def rounded(value: float) -> float:
    """Ten significant digits: more than any experiment has, fewer than the order of a sum changes."""
    return float(f"{float(value):.10g}")


def to_dict(result: ExperimentResult) -> dict[str, Any]:
    """`result` as JSON's own types; numbers that are not finite are None, an Estimate is {value, low, high}."""
    plain: dict[str, Any] = _plain(result)
    return plain


def from_dict(plain: Mapping[str, Any]) -> ExperimentResult:
    """The result that `to_dict` made `plain` of (None for a number is NaN again). ConfigError where it is not one."""
    try:
        panels = tuple(
            Panel(
                **panel
                | {
                    "curves": tuple(Curve(**{k: _numbers(v) for k, v in curve.items()}) for curve in panel["curves"]),
                    "categories": tuple(panel["categories"]),
                    "guides": tuple(Guide(**g | {"through": g["through"] and tuple(g["through"])}) for g in panel["guides"]),
                }
            )
            for panel in plain["panels"]
        )
        rows = tuple(tuple(_estimate(cell) for cell in row) for row in plain["table"]["rows"])
        own = {
            "panels": panels,
            "table": Table(tuple(plain["table"]["columns"]), rows),
            "slopes": tuple(_slope(fit) for fit in plain["slopes"]),
            "notes": tuple(plain["notes"]),
            "measured": tuple(Measured(**one) for one in plain["measured"]),
        }
        names = {entry.name for entry in dataclasses.fields(ExperimentResult)}
        if not all(isinstance(plain[name], str) for name in _WORDS) or not isinstance(plain["settings"], Mapping):
            raise TypeError("words or settings are of another type")
        return ExperimentResult(**{key: value for key, value in plain.items() if key in names} | own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"not the result of an experiment: {error!r}", fix="run the experiment again") from error


_WORDS: Final = ("name", "title", "question", "claim", "finding", "agreement")


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {key: _plain(number) for key, number in value._asdict().items()}
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if isinstance(value, Sequence):
        return [_plain(inner) for inner in value]
    if isinstance(value, int):
        return int(value)
    return rounded(value) if math.isfinite(value) else None


def _cell(cell: Any) -> Cell:
    if isinstance(cell, Estimate):
        return Estimate(*(rounded(number) for number in cell))
    return rounded(cell) if isinstance(cell, float) else cell


def _estimate(cell: Any) -> Cell:
    return Estimate(*_numbers([cell["value"], cell["low"], cell["high"]])) if isinstance(cell, dict) else cell


def _numbers(value: Any) -> Any:
    return tuple(math.nan if number is None else number for number in value) if isinstance(value, list) else value


def _slope(plain: Mapping[str, Any]) -> SlopeFit:
    numbers = {key: math.nan if plain[key] is None else plain[key] for key in ("slope", "low", "high", "intercept")}
    return SlopeFit(**dict(plain) | numbers | {"used": tuple(plain["used"])})
