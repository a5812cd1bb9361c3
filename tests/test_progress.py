"""Progress: whole or absent, never in the way, and readable by a class."""

import csv
import datetime
import importlib
import json
import os

import pytest

from course_utils import exercises, files
from course_utils.exercises import quizzes
from course_utils.exercises.progress import ATTEMPTED, SOLVED

progress = importlib.import_module("course_utils.exercises.progress")  # the package has a function of that name
COLUMNS = ["name", "kind", "notebook", "id", "title", "minutes", "status", "tries", "when"]


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """Keep progress in a file of the test's own, in a folder that is not there yet; return its path."""
    monkeypatch.delenv("COURSE_RUN", raising=False)
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "new" / "mine.json"))
    return tmp_path / "new" / "mine.json"


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_the_first_note_makes_the_file(mine):
    assert progress.read() == {}
    assert progress.note("zero-point", False) is None
    assert [path.name for path in mine.parent.iterdir()] == ["mine.json"]
    stored = json.loads(mine.read_text(encoding="utf-8"))
    assert stored["version"] == progress.VERSION and stored["done"] == progress.read()
    assert progress.read()["zero-point"]["status"] == ATTEMPTED


def test_where_it_is_kept(monkeypatch, mine):
    assert progress.path() == mine
    monkeypatch.delenv("COURSE_PROGRESS")
    assert progress.path() == files.data_dir().parent / ".progress.json"


def test_tries_are_counted_and_solved_stays_solved():
    for tries, (passed, status) in enumerate([(False, ATTEMPTED), (True, SOLVED), (False, SOLVED), (True, SOLVED)], 1):
        progress.note("zero-point", passed)
        assert progress.read()["zero-point"]["status"] == status
        assert progress.read()["zero-point"]["tries"] == tries


def test_the_time_is_that_of_the_last_try():
    before = datetime.datetime.now().astimezone().replace(microsecond=0)
    progress.note("zero-point", False)
    when = datetime.datetime.fromisoformat(progress.read()["zero-point"]["when"])
    assert before <= when <= datetime.datetime.now().astimezone() and when.tzinfo is not None


def test_one_note_leaves_the_others_alone():
    progress.note("zero-point", True)
    first = progress.read()["zero-point"]
    progress.note("01.1", False)
    assert progress.read().keys() == {"zero-point", "01.1"} and progress.read()["zero-point"] == first


def test_a_write_that_fails_leaves_the_old_file(mine, monkeypatch):
    progress.note("zero-point", True)
    before = mine.read_bytes()

    def power_cut(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", power_cut)
    said = progress.note("zero-point", True)
    assert said.startswith("(not remembered: ") and "No space left on device" in said
    assert mine.read_bytes() == before
    assert [path.name for path in mine.parent.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"version": 1}',
        '{"version": "one", "done": {}}',
        '{"version": 1, "done": []}',
        '{"version": 1, "done": {"zero-point": 3}}',
        '{"version": 1, "done": {"zero-point": {"status": "solved"}}}',
        '{"version": 1, "done": {"zero-point": {"status": "solved", "tries": "many", "when": ""}}}',
        '{"version": 1, "done": {"zero-point": {"status": "solved", "tries": Infinity, "when": ""}}}',
    ],
)
def test_a_damaged_file_is_not_overwritten(mine, text):
    write(mine, text)
    with pytest.raises(files.DataFileError, match="mine.json is damaged: delete it to start anew"):
        progress.read()
    assert progress.note("zero-point", True).startswith("(not remembered: mine.json is damaged: ")
    assert mine.read_text(encoding="utf-8") == text


def test_bytes_that_are_no_text(mine):
    write(mine, "")
    mine.write_bytes(b"\xff\xfe\x00")
    assert "is damaged" in progress.note("zero-point", True)


def test_a_file_of_a_newer_version_is_left_alone(mine):
    text = json.dumps({"version": progress.VERSION + 1, "done": {"zero-point": "solved"}})
    write(mine, text)
    with pytest.raises(files.DataFileError, match="written by a newer version of the course: update the course"):
        progress.read()
    assert "newer version" in progress.note("zero-point", True)
    assert mine.read_text(encoding="utf-8") == text


def test_a_status_that_nobody_knows_counts_as_nothing_done(mine):
    row = {"status": "skipped", "tries": 1, "when": ""}
    write(mine, json.dumps({"version": 1, "done": {"a": row, "b": row | {"status": SOLVED}}}))
    assert progress.read() == {"b": row | {"status": SOLVED}}


def test_an_unwritable_place_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "file" / "mine.json"))  # not even root can write there
    assert progress.read() == {}
    said = progress.note("zero-point", True)
    assert said.startswith(f"(not remembered: {tmp_path / 'file' / 'mine.json'} cannot be written: ")
    assert said.endswith("COURSE_PROGRESS may name another file)") and "Errno" not in said
    progress.reset()
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_in_the_place_of_the_file_is_a_sentence(mine):
    mine.mkdir(parents=True)
    with pytest.raises(files.DataFileError, match="mine.json cannot be read: "):
        progress.read()
    assert "mine.json cannot be read: " in progress.note("zero-point", True)


def test_an_exercise_is_judged_all_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "file" / "mine.json"))
    assert exercises.check("zero-point", exercises.get("zero-point").solution).passed is True
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("✔ ") and second.startswith("(not remembered: ")


def test_runs_of_notebooks_leave_no_trace_and_show_none(mine, monkeypatch, capsys):
    progress.note("zero-point", True)
    before = mine.read_bytes()
    monkeypatch.setenv("COURSE_RUN", "fast")
    assert progress.note("zero-point", False) is None and progress.note("01.1", True) is None
    exercises.check("zero-point", exercises.get("zero-point").solution)
    assert mine.read_bytes() == before and progress.read() == {}
    capsys.readouterr()
    exercises.progress()
    assert f"0 of {len(exercises.every())} exercises solved" in capsys.readouterr().out


def test_reset_forgets(mine, capsys):
    progress.note("zero-point", True)
    exercises.hint("zero-point")
    exercises.reset()
    assert not mine.exists() and progress.read() == {}
    exercises.reset()  # nothing there: nothing to do
    capsys.readouterr()
    exercises.hint("zero-point")
    assert capsys.readouterr().out.startswith("hint 1 of ")


def test_a_stub_is_no_try(mine):
    def stub(low, high, bits=8):
        raise NotImplementedError

    assert exercises.check("zero-point", stub).passed is None
    assert not mine.exists()


def test_progress_lists_what_is_solved_attempted_and_left(capsys):
    question = quizzes.questions("01")[0]
    exercises.quiz(question.id, "abcd"[[option.right for option in question.options].index(True)])
    progress.note("zero-point", True)
    progress.note("per-channel", False)
    progress.note("an exercise of an older version", True)
    capsys.readouterr()
    exercises.progress()
    lines = capsys.readouterr().out.splitlines()
    every = exercises.every()
    status = {"zero-point": SOLVED, "per-channel": ATTEMPTED}
    expected = [
        f"    {status.get(id, 'left'):10}{exercise.minutes:4} min  {exercise.title}  ({id})"
        for id, exercise in every.items()
    ]
    assert [line for line in lines if line.startswith("    ")] == expected
    quiz = {f"{n:02}": len(quizzes.questions(f"{n:02}")) for n in range(7)}
    assert [line for line in lines if "quiz" in line] == [
        f"{notebook}  quiz: {int(notebook == '01')} of {count} right" for notebook, count in quiz.items()
    ]
    left = sum(exercise.minutes for id, exercise in every.items() if id != "zero-point")
    assert lines[-1] == f"1 of {len(every)} exercises solved, {left} minutes left"
    first = next(i for i, line in enumerate(lines) if line.startswith("01  quiz"))
    assert lines[first + 1].endswith(f"({next(id for id, e in every.items() if e.notebook == '01')})")


def test_export_has_a_line_for_each_exercise_and_question(tmp_path):
    progress.note("zero-point", True)
    progress.note("zero-point", False)
    progress.note("01.1", False)
    name = 'Name, "of" a\nlearner ✔'
    exercises.export(tmp_path / "class" / "mine.csv", name=name)
    with open(tmp_path / "class" / "mine.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    assert {row["name"] for row in rows} == {name}
    questions = [question for n in range(7) for question in quizzes.questions(f"{n:02}")]
    assert [row["id"] for row in rows] == [question.id for question in questions] + list(exercises.every())
    by_id = {row["id"]: row for row in rows}
    exercise = exercises.get("zero-point")
    when = progress.read()["zero-point"]["when"]
    assert by_id["zero-point"] == {
        **{"name": name, "kind": "exercise", "notebook": "01", "id": "zero-point", "title": exercise.title},
        **{"minutes": str(exercise.minutes), "status": SOLVED, "tries": "2", "when": when},
    }
    assert (by_id["01.1"]["kind"], by_id["01.1"]["title"]) == ("question", quizzes.question("01.1").text)
    assert (by_id["01.1"]["status"], by_id["01.1"]["tries"]) == (ATTEMPTED, "1")
    assert (by_id["01.2"]["status"], by_id["01.2"]["tries"], by_id["01.2"]["when"]) == ("left", "0", "")


def test_export_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    target = tmp_path / "mine.csv"
    exercises.export(target, name="first")
    before = target.read_bytes()

    class Full(csv.DictWriter):
        def writerows(self, rows):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv, "DictWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        exercises.export(target, name="second")
    assert target.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["mine.csv"]
