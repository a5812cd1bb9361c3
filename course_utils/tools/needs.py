"""Record how much memory and time each notebook takes: `make needs` runs them in full and leaves them as they are.

The first cell of each notebook compares the machine with it (`launch.begin`), and pages that speak of minutes or memory read
it. `python -m course_utils.tools.needs LOG` reads what an earlier `make run-all` printed instead.
"""

import argparse
import contextlib
import datetime
import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

from course_utils import cpu, files
from course_utils.launch import NEEDS
from course_utils.tools.run import run

ROOT = Path(__file__).resolve().parents[2]
# The line of a cell, as the runner prints it.
CELL = re.compile(r"^(\d\d_\w+) +cell (\d+)/(\d+) +([\d.]+) s +(\d+) MiB$", re.MULTILINE)
TITLE = re.compile(r"^##+ +(.+?)\s*$", re.MULTILINE)


def needs(log, folder=ROOT / "notebooks"):
    """Return name of the notebook → `memory_mib` (highest of its kernel), the `section` where that was, `seconds`, `cores`.

    log: what the runner printed on this machine. Left out is a notebook that did not come to its end, or that has another
    number of cells in `folder`: the log is not of that notebook.
    """
    cells = {}
    for name, number, total, seconds, memory in CELL.findall(log):
        cells.setdefault((name, int(total)), {})[int(number)] = (int(memory), float(seconds))
    found = {}
    for (name, total), measured in cells.items():
        sections = _sections(folder / f"{name}.ipynb")
        if set(measured) == set(range(1, total + 1)) and total == len(sections):
            most = max(measured, key=measured.get)
            seconds = round(sum(seconds for _, seconds in measured.values()))
            memory = measured[most][0]
            found[name] = {
                "memory_mib": memory,
                "section": sections[most - 1],
                "seconds": seconds,
                "cores": cpu.cores(),
            }
    return found


def _sections(path):
    """Return the heading above each code cell, in order; the file's name above the first heading."""
    if not path.is_file():
        return []
    heading, headings = path.stem, []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            heading = [heading, *TITLE.findall(cell.source)][-1]
        elif cell.source.strip():
            headings.append(heading)
    return headings


def record(found, path):
    """Put `found` into the file at `path` in one step; what it says of other notebooks stays."""
    notebooks = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.exists() else {}
    machine = {"cpu": cpu.name(), "memory_gib": cpu.memory_gib()}
    for name, need in found.items():
        notebooks[name] = need | machine | {"date": datetime.date.today().isoformat()}
    content = {"notebooks": dict(sorted(notebooks.items()))}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class _Both(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text):
        sys.__stdout__.write(text)
        return super().write(text)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log", nargs="?", help="what an earlier `make run-all` printed")
    parser.add_argument("--only", nargs="+", default=[], metavar="NN", help="notebooks that begin with these, e.g. 03")
    options = parser.parse_args(arguments)
    if options.log:
        log = Path(options.log).read_text(encoding="utf-8")
    else:
        printed = _Both()
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(printed):
            notebooks = Path(scratch) / "notebooks"
            shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".*"))
            run(notebooks, only=options.only, ledger=Path(scratch) / "ledger.json")
        log = printed.getvalue()
    found = needs(log)
    if not found:
        print("No notebook came to its end with the cells that it has now: nothing was recorded.", file=sys.stderr)
        return 1
    record(found, files.data_dir() / NEEDS)
    print(f"Recorded: {', '.join(found)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
