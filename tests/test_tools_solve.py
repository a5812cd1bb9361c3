"""The solved edition is the committed notebooks, but for the exercises."""

import os

import nbformat
import pytest

from course_utils import exercises
from course_utils.tools import solve
from tests.toys import ROOT, edit, nbval, write_notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


TOYS = {"00_right": "affine_range", "01_wrong": "max"}  # which function the cell hands to the check


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved")
    solve.main(folder)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_only_the_exercises_differ(solved, path):
    committed, filled = (nbformat.read(p, as_version=4) for p in (path, solved / path.name))
    assert len(committed.cells) == len(filled.cells)
    for before, after in zip(committed.cells, filled.cells, strict=True):
        if "exercise" in before.metadata.get("tags", ()):
            assert "raise NotImplementedError" in before.source and "NotImplementedError" not in after.source
            assert before.outputs[0].text.startswith("○ ") and after.outputs[0].text.startswith("✔ ")
        else:
            assert before == after


def test_every_exercise_stands_in_its_notebook_with_its_own_stub_and_check():
    found = {}
    for path in NOTEBOOKS:
        for cell, exercise in solve.cells(nbformat.read(path, as_version=4)):
            assert path.name.startswith(exercise.notebook)
            name = exercise.solution.__name__
            assert cell.source == f'{exercise.stub()}\n\n\nexercises.check("{exercise.id}", {name})'
            found[exercise.id] = cell.outputs[0].text
    assert list(found) == list(exercises.every())


@pytest.mark.parametrize("id", exercises.every())
def test_what_the_committed_cell_shows_is_what_the_stub_gets(id, capsys, monkeypatch):
    """The stubs themselves are not run with the notebooks in the tests, so they are run here."""
    monkeypatch.setenv("COURSE_RUN", "test")
    exercise = exercises.get(id)
    path = next(path for path in NOTEBOOKS if path.name.startswith(exercise.notebook))
    cell = next(cell for cell, each in solve.cells(nbformat.read(path, as_version=4)) if each.id == id)
    exec("import torch\nfrom course_utils import exercises\n" + cell.source, {})
    assert capsys.readouterr().out == cell.outputs[0].text


def test_each_exercise_is_announced_with_its_minutes_and_difficulty():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell, exercise in solve.cells(notebook):
            above = notebook.cells[notebook.cells.index(cell) - 1].source
            for part in (exercise.title, f"{exercise.minutes} minutes", exercise.difficulty, exercise.objective):
                assert part in above


def test_nbval_notices_an_exercise_that_its_solution_does_not_solve(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COURSE_RUN", "test")
    exercise = exercises.get("zero-point")
    for name, function in TOYS.items():
        cell = f'{exercise.stub()}\n\n\nexercises.check("zero-point", {function})'
        write_notebook(tmp_path / f"{name}.ipynb", "import torch\nfrom course_utils import exercises", cell)

        def ready(notebook):
            notebook.cells[2].metadata.update(tags=["exercise"])
            solve.solve(notebook)
            for number, each in enumerate(notebook.cells[1:], start=1):
                each.execution_count = number

        edit(tmp_path / f"{name}.ipynb", ready)
    lines = nbval(tmp_path).stdout.splitlines()
    verdicts = {name: [line.split()[0] for line in lines if f"{name}.ipynb::Cell 1" in line] for name in TOYS}
    assert "FAILED" in verdicts["01_wrong"] and verdicts["00_right"] and "FAILED" not in verdicts["00_right"]


def test_a_cell_of_an_unknown_exercise_is_refused(tmp_path):
    path = write_notebook(tmp_path / "00_toy.ipynb", 'check("zero-pont", f)')
    edit(path, lambda notebook: notebook.cells[1].metadata.update(tags=["exercise"]))
    with pytest.raises(ValueError, match="did you mean 'zero-point'"):
        solve.solve(nbformat.read(path, as_version=4))
    assert os.listdir(tmp_path) == ["00_toy.ipynb"]
