"""A workspace keeps what a learner did, whatever the course brings later."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from course_utils import files, workspace
from course_utils.__main__ import main
from tests.test_environment import environment
from tests.toys import ROOT, edit, write_notebook

NAME = "00_toy.ipynb"


@pytest.fixture
def course(tmp_path):
    """A course with two notebooks."""
    for number in range(2):
        write_notebook(tmp_path / "the course" / "notebooks" / f"0{number}_toy.ipynb", f"print({number})")
    return tmp_path / "the course"


@pytest.fixture
def mine(tmp_path, course):
    """A workspace that was just made, in a path with spaces and other letters."""
    folder = tmp_path / "Größen & Maße" / "mine"
    assert workspace.start(folder, course) == [f"{NAME}: new", "01_toy.ipynb: new"]
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".ipynb"}


def update(course, name=NAME, text="print('better')"):
    """The course brings a new version of a notebook."""
    edit(course / "notebooks" / name, lambda notebook: notebook.cells[1].update(source=text))
    return (course / "notebooks" / name).read_bytes()


def work(folder, name=NAME):
    """A learner runs a notebook, which stores its output."""
    output = nbformat.v4.new_output("stream", text="0\n")
    edit(folder / name, lambda notebook: notebook.cells[1].update(outputs=[output], execution_count=1))
    return (folder / name).read_bytes()


def test_the_notebooks_are_there_and_writable(mine, course):
    assert contents(mine) == contents(course / "notebooks")
    assert all(os.access(path, os.W_OK) for path in mine.iterdir())


def test_a_second_time_nothing_happens(mine, course):
    before = contents(mine)
    assert workspace.start(mine, course) == ["Everything is up to date."]
    assert contents(mine) == before


def test_what_nobody_touched_is_brought_up_to_date_and_what_is_new_is_brought(mine, course):
    new = update(course)
    write_notebook(course / "notebooks" / "02_toy.ipynb", "print(2)")
    assert workspace.start(mine, course) == [f"{NAME}: brought up to date", "02_toy.ipynb: new"]
    assert contents(mine)[NAME] == new and len(contents(mine)) == 3
    newer = update(course, text="print('even better')")
    workspace.start(mine, course)
    assert contents(mine)[NAME] == newer


def test_what_was_changed_stays_and_the_new_version_is_beside_it(mine, course):
    theirs, new = work(mine), update(course)
    said = [f"{NAME}: yours stays as it is; the new version is 00_toy.updated.ipynb"]
    assert workspace.start(mine, course) == said
    assert contents(mine)[NAME] == theirs and contents(mine)["00_toy.updated.ipynb"] == new
    assert workspace.start(mine, course) == ["Everything is up to date."]  # it is brought once
    newer = update(course, text="print('even better')")
    assert workspace.start(mine, course) == said
    assert contents(mine)[NAME] == theirs and contents(mine)["00_toy.updated.ipynb"] == newer


def test_a_new_version_that_was_worked_in_stays_too(mine, course):
    work(mine)
    update(course)
    workspace.start(mine, course)
    second = work(mine, "00_toy.updated.ipynb")
    newer = update(course, text="print('even better')")
    assert workspace.start(mine, course)[0].endswith("00_toy.updated-2.ipynb")
    assert contents(mine)["00_toy.updated.ipynb"] == second and contents(mine)["00_toy.updated-2.ipynb"] == newer


def test_a_version_with_other_outputs_alone_is_not_brought_to_who_ran_it(mine, course):
    theirs = work(mine)
    edit(course / "notebooks" / NAME, lambda notebook: notebook.cells[1].update(execution_count=7))
    assert workspace.start(mine, course) == ["Everything is up to date."]
    assert contents(mine)[NAME] == theirs and len(contents(mine)) == 2


def test_a_notebook_that_was_there_before_is_not_overwritten(tmp_path, course):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / NAME).write_text("my notes")
    assert "yours stays" in workspace.start(tmp_path / "mine", course)[0]
    assert (tmp_path / "mine" / NAME).read_text() == "my notes"


@pytest.mark.parametrize("mark", ["{", "[]", '{"given": 3}', '{"given": {"00_toy.ipynb": 3}}', "\0"])
def test_without_a_record_everything_counts_as_theirs(mine, course, mark):
    (mine / workspace.MARK).write_text(mark)
    theirs, new = contents(mine)[NAME], update(course)
    workspace.start(mine, course)
    assert contents(mine)[NAME] == theirs and contents(mine)["00_toy.updated.ipynb"] == new


def test_a_write_that_fails_loses_nothing_and_can_be_done_again(mine, course, monkeypatch):
    theirs, new = contents(mine), update(course)

    def full(path, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(workspace.WorkspaceError, match="No space left"):
        patch.setattr(files, "write_text", full)
        workspace.start(mine, course)
    assert contents(mine) in (theirs, theirs | {NAME: new})
    workspace.start(mine, course)
    assert contents(mine) == theirs | {NAME: new}


def test_a_folder_inside_the_course_is_refused(course, tmp_path):
    before = sorted(course.rglob("*"))
    for folder in (course, course / "notebooks", course / "new" / "one", course / ".." / course.name / "mine"):
        with pytest.raises(workspace.WorkspaceError, match="inside the course's own folder"):
            workspace.start(folder, course)
    assert sorted(course.rglob("*")) == before


@pytest.mark.skipif(os.name != "posix", reason="not everybody may make a symbolic link elsewhere")
def test_a_link_does_not_hide_that_a_folder_is_inside_the_course(course, tmp_path):
    (tmp_path / "link").symlink_to(course)
    with pytest.raises(workspace.WorkspaceError, match="inside"):
        workspace.start(tmp_path / "link" / "mine", course)


def test_a_place_that_is_no_folder_is_one_clear_error(tmp_path, course):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(workspace.WorkspaceError, match="cannot be written .*: choose another folder"):
            workspace.start(place, course)


def test_a_course_that_can_only_be_read_is_enough(tmp_path, course):
    for path in [*course.rglob("*"), course]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        workspace.start(tmp_path / "mine", course)
        assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "mine").iterdir())
        work(tmp_path / "mine")
    finally:
        for path in [course, *course.rglob("*")]:
            path.chmod(0o755)


def test_without_a_verb_there_is_help(capsys):
    assert main([]) == 0
    help = capsys.readouterr().out
    assert "start" in help and "lab" in help


def test_an_error_is_one_line_and_an_exit_code(capsys, tmp_path):
    assert main(["start", str(ROOT / "notebooks" / "mine")]) == 2
    assert main(["lab", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 2


def test_the_courses_own_notebooks_find_course_and_data_from_there_and_keep_progress_there(tmp_path):
    folder = tmp_path / "my work"
    made = subprocess.run(
        [sys.executable, "-m", "course_utils", "start", str(folder)], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0 and made.stdout.splitlines()[-1].endswith(f"-m course_utils lab '{folder}'")
    cell = nbformat.read(folder / "00_start_here.ipynb", as_version=4).cells[1].source
    code = f"{cell}\nfrom course_utils import exercises, files\nexercises.quiz('00.1', 'a')\nprint(files.data_dir())"
    own = {name: value for name, value in environment().items() if not name.startswith("COURSE_")}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(ROOT / "data")
    assert list(json.loads((folder / ".progress.json").read_text())["done"]) == ["00.1"]


def test_elsewhere_nothing_is_entered_and_what_the_environment_says_stays(mine, tmp_path, monkeypatch):
    for name in ("COURSE_PROGRESS", "COURSE_RESULTS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    workspace.enter(tmp_path)
    assert not {"COURSE_PROGRESS", "COURSE_RESULTS"} & set(os.environ)
    monkeypatch.setenv("COURSE_PROGRESS", "of my own")
    workspace.enter(mine)
    assert (os.environ["COURSE_PROGRESS"], os.environ["COURSE_RESULTS"]) == ("of my own", str(mine / "results"))
