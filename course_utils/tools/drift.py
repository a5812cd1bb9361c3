"""Say which notebooks broke on newer packages, why, and since which versions: `make drift`.

    python -m course_utils.tools.drift results/drift/newest.xml

The file is pytest's own report (--junitxml) of `make test-notebooks`, which executed the notebooks and compared them with what is
committed. A notebook that failed otherwise than by its outputs is run once more by the runner, which knows a time-out from a
kernel that was killed. Beside the report go its summary (`.md`) and the record (`.json`) of the versions that each notebook was
last good with, and first broken with. Where nothing is recorded, it was good with the lock files: the committed outputs come from
them.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import platform
import re
import shutil
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from course_utils import files
from course_utils.tools.run import CELL_TIMEOUT, ROOT, run

LOCKS = ("requirements-engines.lock", "requirements-torch.txt")
LONGEST = 30  # lines of evidence in the summary; the log has all of them
DIFFER = "Cell outputs differ"  # as nbval says it
CAUSES = {  # cause → what its errors say, those of the runner and of nbval
    "time-out": r"TimeoutError: it ran for more than|: Timeout of",
    "memory": r"SIGKILL|\bMemoryError|OutOfMemory|bad_alloc|[Cc]an(no|')t allocate memory|not enough memory",
    "dependency": r"\b(ModuleNotFound|Import|PackageNotFound)Error\b|module '\S+' has no attribute",
}


class DriftError(RuntimeError):
    """The report or the record cannot be read; the message says which, and what to do."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a notebook: `cause` is a key of `CAUSES`, "changed output" or "error"; `what` one line that names
    the cell; `evidence` as many lines as there are."""

    cause: str
    what: str
    evidence: str


def read_report(path):
    """Return pytest's report as a dict: notebook → texts of the cells that failed; empty if there is no such file.

    Raises `DriftError` for a file that is no such report.
    """
    try:
        cases = ET.parse(path).getroot().iter("testcase")
    except FileNotFoundError:
        return {}
    except ET.ParseError as error:
        raise DriftError(f"{path} is no report of pytest's ({error}): remove it, and run `make drift` again.") from None
    found = {}
    for case in cases:
        notebook = re.search(r"(\d\d_\w+)\.ipynb", case.get("classname", ""))
        if notebook:
            texts = found.setdefault(notebook[1], [])
            texts += [part.text or part.get("message", "") for part in case if part.tag in ("failure", "error")]
    return found


def diagnose(path, texts, *, timeout=CELL_TIMEOUT):
    """Return the `Finding` on a notebook that is not good.

    path: of the notebook; it is left as it is. texts: what nbval says of the cells that failed; none if it did not get there.
    timeout: seconds that one cell may take when the notebook is run once more.
    """
    others = [text for text in texts if DIFFER not in _said(text)]
    if texts and not others:
        return Finding("changed output", f"{_said(texts[0])} (from what is committed)", _traceback(texts[0]))
    reason = _run_again(path, timeout)
    if reason:
        first = reason.partition("\n")[0]
        return Finding(_cause(first), first, reason)
    if not others:
        return Finding("error", "it was not compared: the tests stopped before it, though the runner lets it pass", "")
    return Finding(_cause(_said(others[0])), f"{_said(others[0])}; it passed when run again", _traceback(others[0]))


def _said(text):
    """Return nbval's sentence on a cell, which it counts from 0, with the number that the runner and people give it."""
    found = re.search(r"^Cell (\d+): (.*)$", text, re.M)
    return f"cell {int(found[1]) + 1}: {found[2]}" if found else text.strip().partition("\n")[0]


def _traceback(text):
    return text.partition("Traceback:")[2].strip() or text.strip()


def _cause(text):
    return next((cause for cause, pattern in CAUSES.items() if re.search(pattern, text)), "error")


def _run_again(path, timeout):
    """Return why the notebook fails in the runner, "" if it passes there."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(path, scratch)
        ledger = shutil.copy(ROOT / "data" / "ledger.json", scratch)  # lessons read what earlier ones measured
        with contextlib.redirect_stderr(said):
            code = run(scratch, ledger=ledger, timeout=timeout)
    if code > 128:
        raise KeyboardInterrupt
    return (said.getvalue().partition(f"{path.stem} failed: ")[2] or said.getvalue()).strip() if code else ""


def versions():
    """Return the version of every installed package, and of Python, without local parts such as "+cpu": name → version."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {canonicalize_name(n): _public(v) for n, v in sorted(found.items())} | {"python": platform.python_version()}


def pinned(installed):
    """Return `installed` with the versions of the lock files where they have one: what the committed outputs come from."""
    lines = [line for name in LOCKS for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line.removesuffix("\\")) for line in lines if re.match(r"[A-Za-z0-9]", line)]
    locked = {
        canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins if not p.marker or p.marker.evaluate()
    }
    return {name: locked.get(name, version) for name, version in installed.items()}


def changes(before, after):
    """Return a line for each package whose version is not the same, those that pyproject.toml names first."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    named = {canonicalize_name(Requirement(line).name) for line in lines}
    differ = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [
        f"{name} {before.get(name, '(not there)')} → {after.get(name, '(not there)')}"
        for name in sorted(differ, key=lambda name: (name not in named, name))
    ]


def _public(version):
    try:
        return Version(version).public
    except InvalidVersion:
        return version


def drift(report, folder=ROOT / "notebooks", *, timeout=CELL_TIMEOUT, today=None):
    """Judge the notebooks of `folder` by pytest's `report`, write summary and record beside it; return an exit code.

    timeout: seconds that one cell may take when a notebook is run once more. today: the date, "2026-11-26", that of today if None.

    Exit codes: 0 all are good, 1 one is broken, 2 nothing could be judged (a message on stderr says why).
    """
    report = Path(report)
    today = today or datetime.date.today().isoformat()
    try:
        record, texts = _read_record(report.with_suffix(".json")), read_report(report)
    except DriftError as error:
        print(error, file=sys.stderr)
        return 2
    now = {"date": today, "versions": versions()}
    findings = {}
    for path in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")):
        known = record.setdefault(path.stem, {})
        if texts.get(path.stem) == []:
            record[path.stem] = {"good": now}
            findings[path.stem] = None
            continue
        finding = findings[path.stem] = diagnose(path, texts.get(path.stem, []), timeout=timeout)
        if known.get("broken", {}).get("cause") != finding.cause:  # else it is the same trouble, and it began back then
            known["broken"] = {"cause": finding.cause, **now}
    if not findings:
        print(f"There are no notebooks named NN_*.ipynb in {Path(folder).name}/.", file=sys.stderr)
        return 2
    text = summary(report.stem, findings, record, now)
    files.write_text(report.with_suffix(".json"), json.dumps(record, indent=1, sort_keys=True) + "\n")
    files.write_text(report.with_suffix(".md"), text)
    print(text)
    return 1 if any(findings.values()) else 0


def _read_record(path):
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(state["versions"], dict) for known in record.values() for state in known.values()):
            raise ValueError("versions are missing")
        return record
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DriftError(
            f"{path} is no record of good versions ({error!r}): remove it, and the lock files take its place."
        ) from None


def summary(name, findings, record, now):
    """Return the summary as Markdown.

    name: of the packages that were tried, "newest". findings: notebook → `Finding`, or None if it is good. record: as it is
    stored, with these findings in it. now: date and versions of this run.
    """
    broken = {notebook: finding for notebook, finding in findings.items() if finding}
    used = [f"{package} {now['versions'][package]}" for package in ("python", "torch") if package in now["versions"]]
    lines = [f"# Drift on {name} packages, {now['date']}", ""]
    lines += [f"{len(broken)} of {len(findings)} notebooks broke, on {', '.join(used)}.", ""]
    lines += ["| notebook | cause | what |", "| --- | --- | --- |"]
    for notebook, finding in findings.items():
        cells = (finding.cause, finding.what.replace("|", "\\|")) if finding else ("good", "")
        lines.append(f"| {notebook} | {' | '.join(cells)} |")
    for notebook, finding in broken.items():
        lines += ["", f"## {notebook}: {finding.cause}", "", finding.what, "", *_since(record[notebook])]
        if finding.evidence:
            evidence = finding.evidence.replace("```", "'''").splitlines()
            cut = ["..."] if len(evidence) > LONGEST else []
            lines += ["", "```text", *evidence[:LONGEST], *cut, "```"]
    return "\n".join(lines) + "\n"


def _since(known):
    broken, good = known["broken"], known.get("good")
    changed = changes(good["versions"] if good else pinned(broken["versions"]), broken["versions"])
    last = f"last good on {good['date']}" if good else "last good with the lock files"
    if not changed:
        yield f"Broken since {broken['date']}, {last}, with the same versions: it is not they that broke it."
        return
    yield f"Broken since {broken['date']}, {last}. In between these versions changed:"
    yield ""
    yield from (f"- {line}" for line in changed)


def main(arguments=None):
    """Judge the report that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m course_utils.tools.drift", description=__doc__.partition("\n")[0].partition(":")[0]
    )
    parser.add_argument("report", type=Path, help="pytest's report, as --junitxml writes it")
    return drift(parser.parse_args(arguments).report)


if __name__ == "__main__":
    sys.exit(main())
