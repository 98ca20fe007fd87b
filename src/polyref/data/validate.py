"""Read preference data to the end, and say everything about it that training would trip over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyref.data.auxiliary import auxiliary_completions
from polyref.data.encode import Encoder, Encoding, checked_boundary, render_record
from polyref.data.prompts import IDENTICAL
from polyref.data.records import RowError, column_names, read_record, to_messages
from polyref.data.sources import ALIKE, check_alike, has_splits, prompt_key, read_rows, source_name
from polyref.data.truncate import check_truncation, truncate_pair
from polyref.errors import DataError, one_line
from polyref.types import PreferenceRecord, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
"""The shares of completions or prompts that `ValidationReport.lengths` gives lengths for; 0 is the shortest, 1 the longest."""


@dataclass(frozen=True, slots=True)
class RowProblem:
    """One thing wrong with one row. Every text is one printable line; `row` and `column` are None where they do not apply."""

    file: str
    row: int | None
    column: str | None
    what: str
    fix: str | None

    def __str__(self) -> str:
        places = [self.file, self.row and f"row {self.row}", self.column and f"column {self.column}"]
        return ", ".join(str(place) for place in places if place) + f": {self.what}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What was found. Counts are of usable pairs, of all splits together, unless said otherwise.

    `rows`: rows read, by split; `pairs` and `prompts`: usable pairs and distinct prompts, by split. `duplicates` repeat an
    earlier pair; `reversals` repeat an earlier pair with chosen and rejected exchanged. `ties` have a `chosen_probability` of
    1/2; `empty_replies` an empty or blank completion; `identical` rows, unusable, one reply twice. `unended` counts completions
    that were cut when drawn; `implicit` pairs whose prompt is what chosen and rejected begin with; `shared_prompts` prompts in
    more than one split. `columns` are those of any row, and whether they are read. `lengths[what]` holds the length at each of
    `QUANTILES`, in `unit`. With a tokenizer: `moved_boundaries` (see `tokenize_record`), and `special_texts`, pairs whose own
    text spells special tokens; with `max_length` too, `cut` and `dropped` count pairs.
    """

    rows: dict[str, int]
    pairs: dict[str, int]
    prompts: dict[str, int]
    duplicates: int
    reversals: int
    identical: int
    ties: int
    empty_replies: int
    unended: int
    implicit: int
    columns: dict[str, bool]
    shared_prompts: int
    unit: str
    lengths: dict[str, tuple[int, ...]]
    moved_boundaries: int | None
    special_texts: int | None
    cut: int | None
    dropped: int | None
    problems: tuple[RowProblem, ...]

    @property
    def bad_rows(self) -> int:
        """The number of rows that cannot be used."""
        return sum(self.rows.values()) - sum(self.pairs.values())


def validate_preferences(
    source: Any,
    *,
    splits: Sequence[str] = ("train",),
    prompt_format: str = "as_is",
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    revision: str | None = None,
) -> ValidationReport:
    """Check all of `source`, collecting every bad row instead of stopping at the first.

    `source` is what `load_preferences` takes, or a dict of such from a name to its data; `splits` picks the splits of a hub
    id, folder or DatasetDict, and does not matter to the rest. With a `tokenizer`, lengths are in tokens and every record goes
    through it. Errors: `DataError` where any of it holds no rows; `ConfigError` for settings; `ModelError` for a tokenizer that
    no record can go through.
    """
    check_truncation(max_length, truncation_mode)
    tally = _Tally(Encoder(tokenizer) if tokenizer is not None else None, max_length, truncation_mode)
    named = column_names(columns)
    for name, part, split in _parts(source, splits):
        tally.rows[name] = 0
        for row in read_rows(part, split=split, revision=revision):
            tally.rows[name] += 1
            if isinstance(row.value, DataError):
                tally.refuse(row.value, row.source)
                continue
            tally.see(row.value, named)
            record, problems = read_record(row.value, source=row.source, row_number=row.number, columns=columns)
            for problem in problems:
                tally.refuse(problem, row.source)
            if record is not None:
                tally.take(name, record, prompt_format, columns, implicit=named["prompt"] not in row.value)
        if not tally.rows[name]:
            raise DataError("there are no rows", where=source_name(part), fix="give data with at least one pair")
    return tally.report()


def _parts(source: Any, splits: Sequence[str]) -> list[tuple[str, Any, str]]:
    """(name, source, split) of every part to read."""
    if isinstance(source, Mapping) and not has_splits(source):
        found = [(name, _parts(part, splits)) for name, part in source.items()]
        return [(f"{name} {split}" if some[1:] else name, part, split) for name, some in found for _, part, split in some]
    names = list(dict.fromkeys(splits)) or ["train"]
    return [(name, source, name) for name in (names if has_splits(source) else names[:1])]


@dataclass
class _Tally:
    """Counts as rows go by; `report` closes them."""

    encoder: Encoder | None
    max_length: int | None
    truncation_mode: str
    rows: dict[str, int] = field(default_factory=dict)
    pairs: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    problems: list[RowProblem] = field(default_factory=list)
    columns: dict[str, bool] = field(default_factory=dict)
    first: PreferenceRecord | None = None

    def see(self, row: object, named: Mapping[str, str]) -> None:
        if isinstance(row, Mapping):
            self.columns |= {str(name): name in named.values() for name in row}

    def refuse(self, error: DataError, file: str) -> None:
        if isinstance(error, RowError):
            self.counts["identical"] += error.what == IDENTICAL
            column = one_line(error.column) if error.column else None
            self.problems.append(RowProblem(one_line(error.source), error.row, column, error.what, error.fix))
        else:
            self.problems.append(RowProblem(error.where or one_line(file), None, None, error.what, error.fix))

    def take(
        self,
        split: str,
        record: PreferenceRecord,
        prompt_format: str,
        columns: Mapping[str, str] | None,
        *,
        implicit: bool,
    ) -> None:
        try:
            self.first = self.first or record
            for name in ALIKE:
                check_alike(record, self.first, name, columns)
            record = to_messages(record, prompt_format, columns=columns)
            encoding = self._encode(record)
        except DataError as error:
            self.refuse(error, record.source)
            return
        self.pairs[split] += 1
        self._count(split, record)
        self.counts["implicit"] += implicit
        if self.encoder is None or encoding is None:
            self._measure(*map(_characters, (record.prompt, record.chosen, record.rejected, *auxiliary_completions(record))))
        else:
            self._count_tokens(record, encoding, self.encoder.special_texts)

    def _encode(self, record: PreferenceRecord) -> Encoding | None:
        if self.encoder is None:
            return None
        (encoding,) = self.encoder.encode([render_record(record, self.encoder.tokenizer, None)])
        checked_boundary(encoding, record)
        return encoding

    def _count(self, split: str, record: PreferenceRecord) -> None:
        prompt, chosen, rejected = prompt_key(record.prompt), prompt_key(record.chosen), prompt_key(record.rejected)
        self.counts["duplicates"] += (prompt, chosen, rejected) in self.seen
        self.counts["reversals"] += (prompt, rejected, chosen) in self.seen
        self.counts["ties"] += record.chosen_probability == 0.5
        self.counts["empty_replies"] += not (_text(record.chosen).strip() and _text(record.rejected).strip())
        self.counts["unended"] += (record.chosen_ended, record.rejected_ended).count(False)
        self.seen.add((prompt, chosen, rejected))
        self.prompts[split].add(prompt)

    def _count_tokens(self, record: PreferenceRecord, encoding: Encoding, special_texts: Sequence[str]) -> None:
        pair = encoding.split(encoding.boundary)
        self._measure(len(pair.prompt_ids), *map(len, pair.completions))
        self.counts["moved"] += encoding.boundary < len(encoding.prompt)
        text = "\n".join(map(_text, (record.prompt, record.chosen, record.rejected, *auxiliary_completions(record))))
        self.counts["special"] += any(token in text for token in special_texts)
        if self.max_length is not None:
            kept = truncate_pair(pair, self.max_length, self.truncation_mode)
            self.counts["dropped"] += kept is None
            self.counts["cut"] += kept is not None and kept != pair

    def _measure(self, *lengths: int) -> None:
        names = ("prompt", "chosen", "rejected", *("auxiliary" for _ in lengths[3:]))
        for what, length in zip(names, lengths, strict=True):
            self.lengths[what].append(length)

    def report(self) -> ValidationReport:
        counts, tokens = self.counts, self.encoder is not None
        times = Counter(prompt for prompts in self.prompts.values() for prompt in prompts)
        return ValidationReport(
            rows=dict(self.rows),
            pairs={split: self.pairs[split] for split in self.rows},
            prompts={split: len(self.prompts[split]) for split in self.rows},
            duplicates=counts["duplicates"],
            reversals=counts["reversals"],
            identical=counts["identical"],
            ties=counts["ties"],
            empty_replies=counts["empty_replies"],
            unended=counts["unended"],
            implicit=counts["implicit"],
            columns=self.columns,
            shared_prompts=sum(count > 1 for count in times.values()),
            unit="tokens" if tokens else "characters",
            lengths={what: _quantiles(lengths) for what, lengths in self.lengths.items()},
            moved_boundaries=counts["moved"] if tokens else None,
            special_texts=counts["special"] if tokens else None,
            cut=counts["cut"] if tokens and self.max_length is not None else None,
            dropped=counts["dropped"] if tokens and self.max_length is not None else None,
            problems=tuple(self.problems),
        )


def _text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    """Lengths at `QUANTILES`, each one that occurs: the smallest that at least that share does not exceed."""
    ordered = sorted(lengths)
    return tuple(ordered[max(0, -int(-share * len(ordered) // 1) - 1)] for share in QUANTILES)
