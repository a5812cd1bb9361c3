"""What the head of a notebook says of its time is what the estimate says."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils import exercises
from course_utils.tools import minutes
from tests.toys import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_head_says_the_estimate(path):
    notebook = nbformat.read(path, as_version=4)
    found = minutes.HEAD.search(notebook.cells[0].source)
    assert found and found[0] == minutes.head(notebook, path.name[:2]), "run `python -m course_utils.tools.minutes`"
    assert notebook.metadata["course"]["minutes"] == sum(minutes.minutes(notebook, path.name[:2])[:2])


def test_readme_says_the_same():
    found = {p.name[:2]: nbformat.read(p, as_version=4).metadata["course"]["minutes"] for p in NOTEBOOKS}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert minutes.in_readme(text, found) == text
    assert minutes.in_readme(text, dict.fromkeys(found, 9999)).count("| 9999 |") == len(NOTEBOOKS)


def test_the_whole_course_takes_six_to_nine_hours():
    total = sum(nbformat.read(path, as_version=4).metadata["course"]["minutes"] for path in NOTEBOOKS)
    assert 6 * 60 <= total <= 9 * 60


def test_everything_a_reader_meets_is_counted():
    def estimate(*cells):
        return minutes.minutes(new_notebook(cells=list(cells)), "01")

    asked = [e for e in exercises.every().values() if e.notebook == "01"]
    reading, solving, hard = estimate()
    assert hard == sum(e.minutes for e in asked if e.difficulty == "hard") > 0
    assert (
        solving == sum(e.minutes for e in asked) - hard
        and reading == round(45 * len(exercises.quiz("01").questions) / 60 / 5) * 5
    )
    picture = new_output("display_data", data={"image/png": "", "text/plain": "x"})
    assert estimate(new_markdown_cell("word " * 23_800))[0] == pytest.approx(reading + 100, abs=5)
    assert estimate(new_code_cell("x = 1\n\n" * 2_000))[0] == pytest.approx(reading + 2_000 * 2 / 60, abs=5)
    printed = new_code_cell("x", outputs=[new_output("stream", text="1\n" * 3_000)])
    assert estimate(printed)[0] == pytest.approx(reading + 100, abs=5)
    assert estimate(new_code_cell("x", outputs=[picture] * 200))[0] == pytest.approx(reading + 200 * 32 / 60, abs=5)
    task = new_code_cell("def f():\n" + "    x = 1\n" * 500, metadata={"tags": ["exercise"]})
    assert estimate(task) == (reading, solving, hard)
