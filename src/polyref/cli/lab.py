"""`polyref lab`: run named experiments of the theory lab, and keep their tables, figures and findings."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from polyref.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from polyref.theory.experiments import Experiment
    from polyref.theory.results import ExperimentResult

LIST, ALL = "list", "all"
INDEX = "lab.json"
FEWEST = 200
"""Replicates for constants: below it the interval of a 0.99 quantile holds it in fewer than 17 of 20 cases."""


@dataclass
class LabSettings:
    """How experiments are run, and where what they say is kept.

    Args:
        replicates: runs of every problem, from which the intervals come; by default what each experiment was made for.
        seed: of every random draw; the same seed gives the same files again.
        output_dir: folder of NAME.csv, NAME.json, NAME.png and NAME.svg, of lab.json with the times, and of the page of all.
        overwrite: run again what is already there at these settings. After a change of the code, say so.
        constants: also write the constants that polyref plan reads, from 200 replicates or more, to this .json file.
    """

    replicates: int | None = None
    seed: int = 0
    output_dir: str = "runs/lab"
    overwrite: bool = False
    constants: str | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings, and the experiments as words without a flag."""
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help="Experiments to run; or list, or all.")
    parser.add_argument("--overwrite", action="store_true", help="Run again what is there already at these settings.")
    parser.add_class_arguments(LabSettings, skip={"overwrite"})


def run(settings: Namespace) -> None:
    """Run what is named, print what it says, and write the files. ConfigError for names and settings that cannot be run."""
    own = LabSettings(**{entry.name: getattr(settings, entry.name) for entry in fields(LabSettings)})
    if settings.names == [LIST]:
        _check_alone(own)
        sys.stdout.write(_listing())
        return
    experiments = _chosen(settings.names)
    folder = _checked(own, experiments)
    results = _Lab(own, folder).run(experiments)
    if settings.names == [ALL]:
        _write_pages(folder, results)
    if own.constants is not None:
        _write_constants(own, results)


def _check_alone(settings: LabSettings) -> None:
    """Refuse settings beside `list`, which runs nothing."""
    plain = LabSettings()
    if given := [f"--{entry.name}" for entry in fields(plain) if getattr(settings, entry.name) != getattr(plain, entry.name)]:
        fix = f"leave {' '.join(given)} out, or name experiments"
        raise ConfigError(f"{LIST} only prints what there is, and takes no {', '.join(given)}", where="polyref lab", fix=fix)


def _listing() -> str:
    """Every experiment, its title and how long it takes."""
    from polyref.theory.experiments import EXPERIMENTS

    width = max(map(len, EXPERIMENTS))
    lines = [f"{one.name:<{width}}  {one.seconds:>4.0f} s  {one.title}" for one in EXPERIMENTS.values()]
    total = sum(one.seconds for one in EXPERIMENTS.values())
    return "\n".join([*lines, f"{ALL:<{width}}  {total:>4.0f} s  all of them, on two processor cores", ""])


def _chosen(names: Sequence[str]) -> list[Experiment]:
    from polyref.theory.experiments import EXPERIMENTS

    fix = f"take {LIST}, {ALL}, or some of {', '.join(EXPERIMENTS)}"
    if not names:
        raise ConfigError("no experiment is named", where="polyref lab", fix=fix)
    if ALL in names or LIST in names:
        if len(names) > 1:
            raise ConfigError(f"{ALL} and {LIST} stand alone", where="polyref lab", fix="leave the other names out")
        return list(EXPERIMENTS.values())
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"unknown experiment {name!r}", where="polyref lab", fix=fix)
    return [EXPERIMENTS[name] for name in dict.fromkeys(names)]


def _checked(settings: LabSettings, experiments: Sequence[Experiment]) -> Path:
    """The output folder, made, once everything is known to be in order."""
    from polyref.files import write_errors
    from polyref.theory.experiments import check
    from polyref.theory.planner import SOURCES

    check(settings.replicates, settings.seed)
    if not settings.output_dir:
        raise ConfigError("output_dir is empty", fix="name a folder, or leave it out")
    if settings.constants is not None and not {one.name for one in experiments} & set(SOURCES.values()):
        raise ConfigError("no experiment named here measures constants", fix=f"name one of {', '.join(SOURCES.values())}")
    if settings.constants is not None and settings.replicates is not None and settings.replicates < FEWEST:
        raise ConfigError(f"constants of {settings.replicates} replicates", fix=f"give at least {FEWEST}, or leave them out")
    if settings.constants is not None:
        _check_constants_file(Path(settings.constants))
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError("is a file", where=str(folder), fix="name a folder with --output_dir")
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_constants_file(file: Path) -> None:
    """Refuse, before anything runs, what could not be written at the end."""
    if file.suffix != ".json" or file.is_dir():
        raise ConfigError(f"constants is {str(file)!r}", fix="name a .json file")
    if any(part.is_file() for part in file.parents):
        raise RunFolderError("a part of this path is a file", where=str(file), fix="name another folder")


class _Lab:
    """The runs of one command: what is there already is read, the rest is run, and each is written before the next begins."""

    def __init__(self, settings: LabSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.version = metadata.version("polyref")

    def run(self, experiments: Sequence[Experiment]) -> list[ExperimentResult]:
        from polyref.cli.progress import Meter
        from polyref.report.lab_page import as_text

        found = {one.name: self.kept(one) for one in experiments}
        missing = [one for one in experiments if found[one.name] is None]
        seconds = sum(one.seconds * self.replicates(one) / one.default_replicates for one in missing)
        done = len(experiments) - len(missing)
        kept = f"; {done} found in {self.folder}, not run again without --overwrite" if done else ""
        sys.stdout.write(f"{len(missing)} to run, about {seconds:.0f} s on two processor cores{kept}\n\n")
        sys.stdout.flush()
        results = []
        for one in experiments:
            result = found[one.name]
            if result is None:
                with Meter("replicates") as meter:
                    result = self.made(one, meter)
            sys.stdout.write(as_text(result) + "\n")
            sys.stdout.flush()
            results.append(result)
        return results

    def replicates(self, experiment: Experiment) -> int:
        return self.settings.replicates or experiment.default_replicates

    def asked(self, experiment: Experiment) -> dict[str, Any]:
        """What a file of results has to have been made with to count as done."""
        return {"version": self.version, "replicates": self.replicates(experiment), "seed": self.settings.seed}

    def kept(self, experiment: Experiment) -> ExperimentResult | None:
        """The result in the folder, when it was made with these settings and every file is as it was written."""
        from polyref.files import file_digest
        from polyref.theory.results import from_dict

        if self.settings.overwrite:
            return None
        try:
            plain = json.loads((self.folder / f"{experiment.name}.json").read_bytes())
            digests = {end: file_digest(self.folder / f"{experiment.name}.{end}") for end in plain["files"]}
            same = plain["asked"] == self.asked(experiment) and plain["files"] == digests
            return from_dict(plain["result"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):  # missing, another program's, or of an older form: made again
            return None

    def made(self, experiment: Experiment, meter: Any) -> ExperimentResult:
        """Run, then write; the JSON comes last, so that it vouches for the others."""
        from polyref.files import file_digest, write_bytes
        from polyref.report.lab import draw
        from polyref.report.lab_page import as_csv
        from polyref.theory.results import from_dict, to_dict

        start = time.perf_counter()
        result = experiment(
            self.settings.replicates, self.settings.seed, lambda done, total: meter(experiment.name, done, total)
        )
        plain = to_dict(result)
        result = from_dict(plain)  # what is drawn and printed is what is kept
        contents = {"csv": as_csv(result), **draw(result)}
        seconds = time.perf_counter() - start
        files = {end: self.folder / f"{experiment.name}.{end}" for end in contents}
        for end, file in files.items():
            write_bytes(file, contents[end])
        voucher = {
            "asked": self.asked(experiment),
            "files": {end: file_digest(file) for end, file in files.items()},
            "result": plain,
        }
        index = read_index(self.folder)
        entry = {
            **self.asked(experiment),
            "seconds": round(seconds, 2),
            "agreement": result.agreement,
            "finding": result.finding,
        }
        index[experiment.name] = entry
        total = round(sum(one["seconds"] for one in index.values()), 2)
        write_bytes(self.folder / INDEX, _json({"experiments": index, "total_seconds": total}))
        write_bytes(self.folder / f"{experiment.name}.json", _json(voucher))
        return result


def read_index(folder: Path) -> dict[str, Any]:
    """What lab.json says of each experiment; nothing where there is no such file, or it is not ours."""
    try:
        entries = json.loads((folder / INDEX).read_bytes())["experiments"]
        return {name: dict(entry) for name, entry in entries.items() if isinstance(entry["seconds"], float | int)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_pages(folder: Path, results: Sequence[ExperimentResult]) -> None:
    """lab.md, for a site's documents beside the figures, and lab.html, which holds everything."""
    from polyref.files import write_bytes
    from polyref.report.lab_page import as_markdown, write_lab_page

    seconds = {name: entry["seconds"] for name, entry in read_index(folder).items()}
    write_bytes(folder / "lab.md", as_markdown(results, seconds).encode())
    svgs = {result.name: (folder / f"{result.name}.svg").read_bytes() for result in results}
    write_lab_page(folder / "lab.html", results, svgs, seconds)
    total = sum(seconds.get(result.name, 0.0) for result in results)
    sys.stdout.write(f"{len(results)} experiments in {total:.0f} s; all of them are in {folder / 'lab.html'}\n")


def _write_constants(settings: LabSettings, results: Sequence[ExperimentResult]) -> None:
    from polyref.files import write_bytes
    from polyref.theory.planner import constants_of

    names = " ".join(result.name for result in results if result.measured)
    size = "" if settings.replicates is None else f" --replicates {settings.replicates}"
    command = f"polyref lab {names}{size} --seed {settings.seed} --constants {settings.constants}"
    found = constants_of(results, command=command, version=metadata.version("polyref"))
    write_bytes(Path(str(settings.constants)), _json(found))


def _json(plain: dict[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
