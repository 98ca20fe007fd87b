"""Importing polyref is light, and every public name is there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest

import polyref

HEAVY = ("transformers", "datasets", "peft", "accelerate", "pyarrow", "matplotlib")
LIGHT = {
    "polyref": (*HEAVY, "torch", "numpy"),
    "polyref.errors": (*HEAVY, "torch", "numpy"),
    "polyref.types": (*HEAVY, "torch", "numpy"),
    "polyref.references.compose": HEAVY,
    "polyref.objectives": HEAVY,
    "polyref.objectives.pairwise": HEAVY,
    "polyref.objectives.metrics": HEAVY,
}


def test_light_imports_load_no_heavy_library() -> None:
    """One process imports the modules from the lightest to the heaviest, and says what each one brought in."""
    program = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        f"for name in {list(LIGHT)!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded[name] = sorted(set(module.partition('.')[0] for module in sys.modules))\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    # `polyref.types` and what follows share a process with what came before, which is lighter still.
    for name, modules in json.loads(done.stdout).items():
        assert not set(modules) & set(LIGHT[name]), name


@pytest.mark.parametrize("name", polyref.__all__)
def test_every_public_name_resolves_to_its_home(name: str) -> None:
    value = getattr(polyref, name)
    assert callable(value) and value.__doc__
    assert getattr(import_module(value.__module__), name) is value
    assert name in dir(polyref)


def test_stable_names_of_the_pure_functions() -> None:
    from polyref.objectives import pairwise
    from polyref.references import compose

    assert all(callable(getattr(compose, name)) for name in ("geometric", "arithmetic"))
    assert all(callable(getattr(pairwise, name)) for name in ("sigmoid", "hinge", "ipo", "smoothed", "robust"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        polyref.nothing  # noqa: B018
