"""`polyref plan`: what it prints, and what it refuses in one line."""

from __future__ import annotations

import pytest

from cli_world import World, assert_refused

GOOD = {"gap": 0.01, "beta": 0.1, "d": 20, "coverage": 4}


def words(**changes: object) -> list[object]:
    given = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return ["plan", *(word for name, value in given.items() for word in (f"--{name}", value))]


def test_every_number_is_labelled(world: World) -> None:
    shown = world.run(words())
    assert (shown.code, shown.err) == (0, "") and world.tree() == {}
    assert "20 features, 1 reference (mixture coverage 4)" in shown.out
    labels = [line.split("  ")[1] for line in shown.out.splitlines() if line.startswith("  ")]
    assert labels == ["bound, 1/n", "bound, 1/sqrt(n)", "extrapolated, 1/n"]
    assert "the constants are derived in polyref.theory.bounds" in " ".join(shown.out.split())
    assert "[MR]" in shown.out and "[IT]" in shown.out and "polyref.theory.bounds" in shown.out


def test_classes_several_references_and_forward_kl(world: World) -> None:
    shown = world.run(words(d=None, class_size=1e6, coverage="[4, .inf]", references=2, kl="forward"))
    assert shown.code == 0, shown.err
    assert "forward KL, beta 0.1, a class of 1e+06 rewards, 2 references of equal weight (mixture coverage 8)" in shown.out
    alone = world.run(words(d=None, class_size=1e6, coverage=8, kl="forward"))
    assert alone.out.splitlines()[2] == shown.out.splitlines()[2]


def test_a_table_is_a_size_of_its_own(world: World) -> None:
    shown = world.run(words(d=None, contexts=6, actions=5))
    assert (shown.code, shown.err) == (0, "") and "a table of 6 contexts x 5 actions, 1 reference" in shown.out
    assert "stand in" not in shown.out and "stand in" in world.run(words()).out
    assert "extrapolated to contexts 6, references 1, reward range 1, beta 0.1" in shown.out
    lab = world.run(words(gap=0.05, beta=0.5, d=None, contexts=5, actions=5, references=3, reward_range=2))
    assert "\n  measured, 1/n" in lab.out and "extrapolated to" not in lab.out


def test_help_says_what_each_number_is(world: World) -> None:
    told = " ".join(world.run(["plan", "--help"]).out.split())
    for words_ in ("A bound holds for every problem", "A measured number is what the lab's", "an extrapolated one is"):
        assert words_ in told


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gap": None}, "gap"),
        ({"beta": 0}, "beta is 0"),
        ({"class_size": 10}, "no size, or more"),
        ({"d": None}, "no size, or more"),
        ({"d": "many"}, "d: "),
        ({"coverage": 0.5}, "coverage is 0.5"),
        ({"coverage": "[1, 2]"}, "2 coverage constants for 1 references"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"kl": "sideways"}, "kl: "),
        ({"kl": "forward", "coverage": None}, "give --coverage"),
        ({"coverage": None, "beta": 0.001}, "10^18 pairs"),
        ({"coverage": None, "references": 2}, "give --coverage"),
        ({"reward_range": 1000}, "10^18 pairs"),
        ({"d": None, "contexts": 3}, "contexts with actions"),
        ({"constants": "missing.json"}, "cannot be read as measured constants"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, object], says: str, world: World) -> None:
    assert_refused(world, words(**changes), [says])


def test_a_file_that_holds_no_constants(world: World) -> None:
    unsettled = b'{"experiments": {"reverse-gap": {"constants": []}}}'
    for content in (b"\xff\xfe\x00", b"{}", unsettled):
        file = world.file("constants.json", content)
        assert_refused(world, words(constants=file), ["measured constants"])
