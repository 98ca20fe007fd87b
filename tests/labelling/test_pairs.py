"""What a pair is called and how it is shown depends on its content alone, never on a label."""

from __future__ import annotations

from dataclasses import replace

from labelling_world import some_pairs, some_records
from polyref.labelling.pairs import left_of, pair_of, pairs_of, sides


def test_a_pair_has_no_trace_of_its_label() -> None:
    for record in some_records():
        turned = replace(record, chosen=record.rejected, rejected=record.chosen, chosen_probability=0.2, margin=None, row=99)
        assert pair_of(turned) == pair_of(record)
    (one,) = {pair.id for pair in pairs_of([record, turned, record])}
    others = [replace(record, prompt="other?"), replace(record, chosen="other"), replace(record, rejected="other")]
    assert len({one, *(pair.id for pair in pairs_of(others))}) == 4
    turns = ({"role": "user", "content": "Hi"},)
    assert pair_of(replace(record, prompt=turns)).prompt == turns


def test_sides_are_a_fair_coin_that_stays() -> None:
    pairs = some_pairs(2000)
    left = [left_of(pair, 0) == "first" for pair in pairs]
    other = [left_of(pair, 1) == "first" for pair in pairs]
    alike = sum(a == b for a, b in zip(left, other, strict=True))
    assert left == [left_of(pair, 0) == "first" for pair in reversed(pairs)][::-1]
    for heads in (sum(left), sum(other), alike):
        assert abs(heads - 1000) < 4 * 500**0.5
    assert {sides(pair, 0) for pair in pairs[:50]} <= {
        order for pair in pairs[:50] for order in ((pair.first, pair.second), (pair.second, pair.first))
    }
