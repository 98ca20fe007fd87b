"""What the installed wheel must do, with no checkout in sight: run by .ci/run in an empty folder, with warnings as errors."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import polyref

assert "site-packages" in Path(polyref.__file__).parts, polyref.__file__
assert "transformers" not in sys.modules, "import polyref is not light"

SHIPPED = (
    "py.typed",
    "report/templates/page.html",
    "labelling/templates/page.html",
    "data/packaged/pandalm_human.jsonl.gz",
    "data/packaged/NOTICE",
)
for name in SHIPPED:
    assert files("polyref").joinpath(name).is_file(), f"the wheel lacks {name}"

for name in polyref.__all__:
    assert getattr(polyref, name) is not None, name


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script that the wheel put beside this interpreter."""
    return subprocess.run([str(Path(sys.executable).with_name("polyref")), *arguments], capture_output=True, text=True)


Path("good.jsonl").write_text(json.dumps({"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}) + "\n")
Path("bad.jsonl").write_text('{"prompt": "Two and two?", "chosen": "Four."}\n')

assert command("--help").returncode == 0
good = command("validate", "good.jsonl")
assert good.returncode == 0, good
bad = command("validate", "bad.jsonl")
assert bad.returncode == 2 and "rejected" in bad.stdout + bad.stderr, bad
