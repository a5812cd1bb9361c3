"""The solved edition of notebooks: `python -m course_utils.tools.solve FOLDER` writes it, as the tests run it.

Every exercise is filled with its tested solution, and the verdict that its cell has to print is stored as its output. So one
execution proves both: all other cells print what was committed, and every exercise can be solved where it stands.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_output

from course_utils import exercises, files
from course_utils.tools.clean import to_text

ROOT = Path(__file__).resolve().parents[2]
CHECK = re.compile(r"""\bcheck\(["']([\w-]+)["']""")


def cells(notebook):
    """Return `(cell, exercise)` for each cell tagged `exercise`."""
    tagged = [cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", ())]
    return [(cell, exercises.get(CHECK.search(cell.source)[1])) for cell in tagged]


def solve(notebook):
    """Fill the exercises of `notebook`, in place.

    Raises `ValueError` for an unknown exercise, and for a cell that does not define the function it asks for.
    """
    for cell, exercise in cells(notebook):
        cell.source = exercise.fill(cell.source)
        verdict = exercises.judge(exercise, exercise.solution)
        cell.outputs = [new_output("stream", name="stdout", text=f"✔ {exercise.title}: {verdict.text}\n")]


def main(target):
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        solve(notebook)
        files.write_text(Path(target) / path.name, to_text(notebook))


if __name__ == "__main__":
    main(*sys.argv[1:])
