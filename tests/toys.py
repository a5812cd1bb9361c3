"""Toy notebooks for the tests of the runner and of the gate: a heading and a few code cells, no torch."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]


def write_notebook(path, *sources, parameters=None, **course):
    """Write an unexecuted notebook with one code cell a source to `path`; return `path`.

    parameters: source of a first cell tagged `parameters`. course: the notebook's own metadata, such as `fast`.
    """
    cells = [new_markdown_cell("# A toy")]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in sources]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"course": course}), path)
    return path


def edit(path, change):
    """Let `change(notebook)` alter the notebook at `path`."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def nbval(folder):
    """Compare the notebooks of `folder` as `make test-notebooks` does; return pytest's report."""
    options = ["-p", "tests.nbval_plugin", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "900"]
    options += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "-rA",
        "--rootdir",
        str(folder),
        "-c",
        os.devnull,
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
