"""The first cell of a notebook: on Colab it brings the course and touches neither torch nor numpy, elsewhere it is silent."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from course_utils import cpu, files, launch, workspace
from course_utils.tools import badges, rehearse
from tests.toys import ROOT

FIRST = ROOT / "notebooks" / "02_post_training_quantization.ipynb"
CELL = nbformat.read(FIRST, as_version=4).cells[1].source
# What Colab is to the cell: a module of that name, and a Python that does not know where the course is.
COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
WITHOUT = "import importlib.util; assert importlib.util.find_spec('course_utils') is None\n"
ON_LINUX = pytest.mark.skipif(os.name != "posix", reason="Colab is a Linux, and the cell asks its shell")
AFTER = """
import course_utils, json, os, subprocess, sys
from course_utils import files
child = subprocess.run([sys.executable, "-S", "-c", "import course_utils; print(course_utils.__file__)"],
                       capture_output=True, text=True, check=True)
print(json.dumps({
    "course": course_utils.__file__, "here": os.getcwd(), "child": child.stdout.strip(),
    "data": str(files.verified("text/king_james_bible.txt.gz")),
    "loaded": [name for name in ("torch", "numpy", "torchvision") if name in sys.modules],
}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository of the course with as much of its data as the test reads."""
    checkout = tmp_path_factory.mktemp("checkout") / "the course"
    for name in ("course_utils", "notebooks", "data/text"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "data/manifest.json", "data/needs.json"):
        shutil.copy(ROOT / name, checkout / name)
    subprocess.run(["git", "init", "-q", "."], cwd=checkout, check=True)
    return rehearse.snapshot(checkout.with_name("repository"), badges.setting().branch, checkout)


def python(folder, code, repository=None):
    """Run `code` in a Python that has the packages of this one, but not the course: -S leaves out what installed it."""
    environment = rehearse.alone(folder, Path(sys.executable).parent)
    environment["PYTHONPATH"] = os.pathsep.join({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    environment["COURSE_REPOSITORY"] = repository.as_uri() if repository else (folder / "nowhere").as_uri()
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@ON_LINUX
def test_on_colab_the_course_comes_from_the_clone_and_torch_is_left_alone(tmp_path, repository):
    (tmp_path / ".course").mkdir()  # a clone that somebody interrupted
    first = python(tmp_path, COLAB + WITHOUT + CELL + AFTER, repository)
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)
    assert facts["course"] == facts["child"] == str(tmp_path / "course" / "course_utils" / "__init__.py")
    assert facts["here"] == str(tmp_path / "course" / "notebooks")
    assert facts["data"] == str(tmp_path / "course" / "data" / "text" / "king_james_bible.txt.gz")
    assert facts["loaded"] == []
    assert sorted(os.listdir(tmp_path)) == ["course"]


@ON_LINUX
def test_on_colab_it_can_run_twice_and_in_a_new_kernel(tmp_path, repository):
    assert python(tmp_path, COLAB + CELL, repository).returncode == 0
    (tmp_path / "course" / "mine").touch()
    again = python(tmp_path, COLAB + WITHOUT + CELL + "\n" + CELL + AFTER)  # there is nothing to clone from any more
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["here"] == str(tmp_path / "course" / "notebooks")
    assert (tmp_path / "course" / "mine").exists()


@ON_LINUX
def test_on_colab_a_clone_that_fails_says_why_and_can_be_tried_again(tmp_path, repository):
    failed = python(tmp_path, COLAB + CELL)
    assert failed.returncode == 1 and "does not appear to be a git repository" in failed.stderr
    assert not (tmp_path / "course").exists()
    assert python(tmp_path, COLAB + CELL, repository).returncode == 0


def test_elsewhere_the_cell_does_nothing_and_says_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CELL}\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    run = python(tmp_path, code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def colab(monkeypatch):
    """Colab with every package, for a test to take away from; yields name → version, and the commands that were run."""
    monkeypatch.setitem(sys.modules, "google.colab", launch)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    versions, commands = {"torch": "2.11.0+cpu", "numpy": "2.0.2", "torchvision": "0.26.0+cpu"}, []

    def version(name):
        found = versions.get(name, "1")
        if found is None:
            raise launch.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(launch.importlib.metadata, "version", version)
    monkeypatch.setattr(launch.subprocess, "run", lambda command, check: commands.append(command))
    return versions, commands


def test_only_what_is_missing_is_installed_and_nothing_that_comes_with_it(colab, capsys):
    versions, commands = colab
    launch.begin("00")
    assert commands == [] and capsys.readouterr().out == ""
    versions |= dict.fromkeys(("psutil", "safetensors", "numpy", "torchvision", "jupyterlab", "papermill"))
    launch.begin("00")
    (command,) = commands
    options, names = command[1:6], [name.partition(">")[0] for name in command[6:]]
    assert options == ["-m", "pip", "install", "--quiet", "--no-deps"] and names == ["psutil", "safetensors"]
    assert capsys.readouterr().out == "Installing what Colab lacks: psutil>=6, safetensors>=0.5.\n"
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]


@pytest.mark.parametrize("version", ["2.8.0+cu126", None, "3.0"])
def test_a_torch_that_the_course_does_not_run_on_is_named_with_what_to_do(colab, version):
    versions, commands = colab
    versions["torch"] = version
    with pytest.raises(RuntimeError, match=rf"has torch {version.partition('+')[0] if version else None}.*Latest"):
        launch.begin("00")
    assert commands == []


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A data folder that says what notebook 02 needs, and a machine that has just that; returns the file."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    need = {"memory_mib": 1536, "section": "3. The cliff", "seconds": 300, "cores": 2}
    (tmp_path / files.MANIFEST).write_text("{}")
    (tmp_path / launch.NEEDS).write_text(json.dumps({"notebooks": {"02_toy": need}}))
    machine(monkeypatch, 1.5, 2)
    return tmp_path / launch.NEEDS


def machine(monkeypatch, memory, cores):
    monkeypatch.setattr(cpu, "memory_gib", lambda: memory)
    monkeypatch.setattr(cpu, "cores", lambda: cores)


def test_a_machine_that_is_large_enough_is_not_spoken_of(measured, capsys):
    launch.begin("02")
    assert capsys.readouterr().out == "" and launch.shortages("02") == []


@pytest.mark.parametrize(
    ("memory", "cores", "words"),
    [
        (1.4, 2, ["1.4 GiB of memory", "took 1.5", "“3. The cliff”"]),
        (1.5, 1, ["1 core,", "300 s on 2"]),
        (0.5, 1, ["0.5 GiB", "1 core,"]),
        (None, 1, ["1 core,"]),
    ],
)
def test_a_smaller_machine_is_told_in_one_line_what_the_notebook_took(
    measured, monkeypatch, capsys, memory, cores, words
):
    machine(monkeypatch, memory, cores)
    launch.begin("02")
    (line,) = capsys.readouterr().out.splitlines()
    assert all(word in line for word in words)
    assert ("GiB" in line) == (memory != 1.5 and memory is not None) and ("core" in line) == (cores == 1)
    launch.begin("03")  # nobody measured it
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", ["{", "[]", '{"notebooks": 3}', None])
def test_without_a_measurement_the_lesson_goes_on(measured, monkeypatch, capsys, content):
    machine(monkeypatch, 0.1, 1)
    assert launch.shortages("02")
    measured.unlink() if content is None else measured.write_text(content)
    launch.begin("02")
    assert capsys.readouterr().out == ""


def test_what_each_notebook_needs_was_measured_and_its_section_is_there():
    needs = json.loads((ROOT / "data" / launch.NEEDS).read_text(encoding="utf-8"))["notebooks"]
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        assert path.stem in needs, "run `make needs`"
        need = needs[path.stem]
        titles = [line.lstrip("# ") for cell in nbformat.read(path, 4).cells for line in cell.source.splitlines()]
        assert need["section"] in titles, "run `make needs`"
        assert 0 < need["memory_mib"] < 2048 and need["cores"] >= 1 and need["seconds"] > 0


def test_in_a_workspace_progress_and_results_are_kept_there(tmp_path, monkeypatch):
    for name in ("COURSE_PROGRESS", "COURSE_RESULTS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    launch.begin("00")
    assert not {"COURSE_PROGRESS", "COURSE_RESULTS"} & set(os.environ)
    (tmp_path / workspace.MARK).write_text("{}")
    launch.begin("00")
    assert os.environ["COURSE_PROGRESS"] == str(tmp_path / ".progress.json")
    assert os.environ["COURSE_RESULTS"] == str(tmp_path / "results")
