"""The pages on how to add an exercise, an engine and a notebook are followed to the letter, each in a copy of the course."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_utils.tools import new
from tests import guards
from tests.engines import Contract
from tests.toys import ROOT

BLOCK = r":\n\n(?:<!-- fmt: off -->\n)?```\w+\n(?P<{}>.*?)^```$"
STEP = re.compile(
    r"New file `(?P<file>[^`]+)`" + BLOCK.format("content") + "|"
    r"Add to `(?P<path>[^`]+)`, (?P<side>above|below) (?:its last line|the line (?P<part>that begins with )?`(?P<line>[^`]+)`)"
    + BLOCK.format("added") + "|"
    r"In (?P<files>[^\n]+), replace `(?P<old>[^`]+)` by `(?P<by>[^`]+)`|"
    r"^```sh\n(?P<commands>.*?)^```$",
    re.M | re.S,
)  # fmt: skip
NEEDED = ("course_utils", "tests", "notebooks", "docs", "data", "Makefile", "pyproject.toml", "README.md")
LARGE = ("FashionMNIST", "checkpoints", "text", "*.safetensors", "pictures", ".*")
# Takes minutes; what it does is seen with the notebook that is added.
ELSEWHERE = {"make run-all ONLY=01 && python -m course_utils.tools.minutes"}
# Of the tests that an engine inherits, those that make many models: they run for every engine there is.
SLOW = (
    "resnet18",
    "the_ranges_come",
    "other_ways",
    "without_its_package",
    "it_leaves_the_float",
    "it_leaves_torchs_threads",
)


@pytest.fixture
def course(tmp_path):
    """A copy of the course in a path with a space, without large data."""
    folder = tmp_path / "my course"
    for name in [*NEEDED, *(path.name for path in ROOT.glob("requirements*"))]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LARGE))
        else:
            shutil.copy2(ROOT / name, folder / name)
    (folder / "installed").touch()
    return folder


def run(command, course):
    """Run a line of a page in `course` as in an activated environment; return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    told = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MAKE", "MFLAGS"))}
    slow = [test for test in dir(Contract) if any(part in test for part in SLOW)]
    inherited = "tests/test_backends_onnx_reference.py::TestOnnxReference"
    told["PYTEST_ADDOPTS"] = " ".join(["-p no:nbval", *(f"--deselect={inherited}::{test}" for test in slow)])
    told |= {"PATH": path, "PYTHONPATH": str(course), "PYTHONDONTWRITEBYTECODE": "1"}
    if " course_utils.tools" not in command and not command.startswith("make"):
        told["COURSE_DATA"] = str(ROOT / "data")  # they read only
    words = shlex.split(command) if isinstance(command, str) else command
    if words[0] == "make":  # that needs no environment of its own: this one will do
        words += ["PY=python", "INSTALLED=installed"]
    words[0] = shutil.which(words[0], path=path)
    done = subprocess.run(words, cwd=course, env=told, capture_output=True, text=True, encoding="utf-8", timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ask(program, course):
    """Run a Python program in `course`; return what its last line, JSON, says."""
    (course / "ask.py").write_text(program, encoding="utf-8")
    return json.loads(run("python ask.py", course).splitlines()[-1])


def follow(page, course):
    """Do what the page says, step by step; return how many steps those were."""
    steps = list(STEP.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")))
    for step in steps:
        if step["file"]:
            assert not (course / step["file"]).exists(), "a new file is new"
            (course / step["file"]).write_text(step["content"], encoding="utf-8")
        elif step["path"]:
            add(course / step["path"], step)
        elif step["files"]:
            for name in re.findall("`([^`]+)`", step["files"]):
                text = (course / name).read_text(encoding="utf-8")
                assert step["old"] in text, f"{name} has no {step['old']}"
                (course / name).write_text(text.replace(step["old"], step["by"]), encoding="utf-8")
        else:
            for command in step["commands"].splitlines():
                if command not in ELSEWHERE:
                    run(command, course)
    return len(steps)


def add(path, step):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if step["line"] is None:
        (number,) = [len(lines) - 1]
    else:
        same = str.startswith if step["part"] else str.__eq__
        found = [number for number, line in enumerate(lines) if same(line.strip(), step["line"])]
        assert len(found) == 1, f"{path.name} has {step['line']!r} in {len(found)} places"
        number = found[0] + (step["side"] == "below")
    lines.insert(number, step["added"])
    path.write_text("".join(lines), encoding="utf-8")


TRY = """
import contextlib, io, json, nbformat
from course_utils import exercises
from course_utils.exercises.checking import judge
from course_utils.tools import solve
from tests.wrong_answers import precision

def printed(call, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call(*args)
    return out.getvalue()

asked = exercises.get("sqnr")
verdicts = {name: judge(asked, answer) for name, answer in precision.WRONG["sqnr"].items()}
notebook = nbformat.read("notebooks/01_precision_basics.ipynb", as_version=4)
cells = [cell for cell, each in solve.cells(notebook) if each.id == "sqnr"]
stub = {}
exec("import torch\\nfrom course_utils import exercises\\n" + cells[0].source, stub)
print(json.dumps({
    "solved": printed(exercises.check, "sqnr", asked.solution),
    "mistakes": {name: [v.passed, v.mistake] for name, v in verdicts.items()},
    "sentences": all(m.says in verdicts[m.name].text and m.hint in verdicts[m.name].text for m in asked.mistakes),
    "hint": printed(exercises.hint, "sqnr"), "solution": printed(exercises.solution, "sqnr"), "cells": len(cells),
    "above": notebook.cells[notebook.cells.index(cells[0]) - 1].source,
    "last": list(solve.cells(notebook))[-1][1].id, "filled": asked.fill(cells[0].source),
}))
"""


def test_an_exercise_can_be_added_as_its_page_says(course):
    assert follow("add-an-exercise.md", course) == 6
    found = ask(TRY, course)
    assert found["solved"].startswith("✔ Signal over noise: all 6 cases")
    assert len(found["mistakes"]) == 5 and found["sentences"]
    assert all(outcome == [False, name] for name, outcome in found["mistakes"].items())
    assert found["hint"].startswith("hint 1 of 3") and "torch.log10(signal / noise)" in found["solution"]
    assert found["cells"] == 1 and found["last"] == "sqnr" and "log10(signal / noise)" in found["filled"]
    assert found["above"].startswith("**7. Signal over noise** (5 minutes, easy). You will say in one number")


CLIMB = """
import importlib.util, json, torch
from course_utils import backends, deployment

if __name__ == "__main__":  # families are measured in processes of their own
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 7 * 7, 10)
    images = [(torch.randn(20, 3, 16, 16), torch.zeros(20, dtype=torch.int64))]
    ours = [way for way in deployment.WAYS if way.engine == "onnx_reference"]
    ladder = deployment.climb(
        torch.nn.Sequential(*layers).eval(), images, calibration=images, judges=images, ways=(deployment.WAYS[0], *ours), rounds=3
    )
    (engine,) = backends.engines("onnx_reference")
    print(json.dumps({
        "runs": engine.runs, "onnx": all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript")),
        "ladder": list(ladder), "missing": ladder.missing, "same": {n: r.judged.agreement for n, r in ladder.items()},
    }))
"""


def test_an_engine_can_be_added_as_its_page_says(course):
    assert follow("add-an-engine.md", course) == 8
    found = ask(CLIMB, course)
    rungs = ["FP32, ONNX reference", "INT8, ONNX reference"]
    if found["onnx"]:
        assert found["runs"] and found["ladder"][1:] == rungs and found["missing"] == {}
        assert found["same"][rungs[0]] == 1 and found["same"][rungs[1]] >= 0.8
    else:
        assert found["ladder"] == ["FP32, eager"] and list(found["missing"]) == rungs
        assert all("squeeze-and-speed-up[onnx" in why for why in found["missing"].values())


def test_a_notebook_can_be_added_as_its_page_says(course):
    assert follow("add-a-notebook.md", course) == 5
    path = course / "notebooks" / "07_noise.ipynb"
    assert guards.complaints(path) == {}
    notebook = guards.read(path)
    text = json.dumps(notebook, ensure_ascii=False)
    assert (
        "✔ no error is larger than half a step" in text and "image/png" in text and "NN" not in notebook.cells[0].source
    )
    assert notebook.metadata["course"]["minutes"] > 0 and "*Time: " in notebook.cells[0].source
    assert "mybinder.org" in notebook.cells[0].source and notebook.cells[1].id == "start"


@pytest.fixture
def empty(tmp_path):
    """The outline of a checkout: no notebook, no quiz."""
    for folder in ("notebooks", "course_utils/exercises/quizzes"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["noise", "7_noise", "07_Noise", "07_", "07 noise", "../07_noise", "07_noise.ipynb"])
def test_a_name_of_another_form_is_refused(empty, name):
    with pytest.raises(new.RefusedError, match="not a number and words"):
        new.notebook(name, empty)
    assert not list(empty.rglob("*.ipynb")) and not list(empty.rglob("*.toml"))[1:]


def test_a_number_that_is_taken_is_refused_and_nothing_is_written_over(empty):
    first, quiz = new.notebook("07_noise", empty)
    before = first.read_bytes(), quiz.read_bytes()
    with pytest.raises(new.RefusedError, match="07 is taken by notebooks/07_noise.ipynb"):
        new.notebook("07_signal", empty)
    first.unlink()
    with pytest.raises(new.RefusedError, match="taken by course_utils/exercises/quizzes/07.toml"):
        new.notebook("07_signal", empty)
    assert quiz.read_bytes() == before[1] and not list(empty.glob("notebooks/*"))


def test_an_exercise_goes_below_the_last_one_and_once_only(empty):
    path = shutil.copy(new.TEMPLATE, empty / "notebooks" / "01_toy.ipynb")
    for id in ("zero-point", "per-channel"):
        assert new.exercise(id, empty) == path
    cells = nbformat.read(path, as_version=4).cells
    start = [cell.id for cell in cells].index("exercises-intro")
    assert [cell.id for cell in cells[start + 1 : start + 6]] == [
        *("ask-zero-point", "exercise-zero-point", "ask-per-channel", "exercise-per-channel", "take-away")
    ]
    assert cells[start + 3].source.startswith("**2. One scale per channel** (10 minutes, medium). You will give")
    before = path.read_bytes()
    with pytest.raises(new.RefusedError, match="stands in 01_toy.ipynb already"):
        new.exercise("zero-point", empty)
    with pytest.raises(new.RefusedError, match="notebook 02, which does not exist"):
        new.exercise("equalize", empty)
    assert path.read_bytes() == before


def test_what_is_refused_ends_in_one_sentence(capsys):
    assert new.main(["notebook", "00_start_here"]) == 2
    assert new.main(["exercise", "zero-pont"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Nothing was written: number 00 is taken by notebooks/00_start_here.ipynb."
    assert len(said) == 2 and "did you mean 'zero-point'?" in said[1]
