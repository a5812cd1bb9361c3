"""`make class`: what a class handed in, side by side; what is damaged or foreign is named, and stops nothing."""

import csv
import json
import os

import pytest

from course_utils import exercises
from course_utils.exercises import quizzes
from course_utils.tools import classroom, doctor


@pytest.fixture
def handed_in(tmp_path, monkeypatch):
    """A function that has a learner do exercises for real, and hand in the CSV of `exercises.export`."""
    monkeypatch.delenv("COURSE_RUN", raising=False)

    def hand_in(name, tries, file=None):
        monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / f"{name}-{file}.json"))
        for id, passed in tries:
            exercises._progress.note(id, passed)
        path = tmp_path / "class" / (file or f"{name}.csv")
        exercises.export(path, name=name)
        return path

    return hand_in


@pytest.fixture
def laptop(tmp_path):
    """A function that writes the file of `make doctor JSON=...` of a machine with these findings."""

    def write(name, *findings):
        record = doctor.record([doctor.Finding(status, what, "found", "mend") for status, what in findings], name)
        path = tmp_path / "class" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    return write


def lay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    code = classroom.main([str(tmp_path / "class")])
    page = tmp_path / "results" / "class.md"
    return code, page.read_text(encoding="utf-8") if page.exists() else None


def row(table, first):
    (found,) = [line for line in table.rows if line[0] == first]
    return dict(zip(table.columns, found, strict=True))


def test_exercises_tell_how_many_solved_tried_and_left_them(handed_in, tmp_path):
    handed_in("Ada", [("zero-point", False), ("zero-point", False), ("zero-point", True), ("gptq", False)])
    handed_in("Ben", [("zero-point", False)])
    handed_in("Eve", [])
    _, learners, passed = classroom.collect(tmp_path / "class")
    table = classroom.exercises_table(learners)
    assert [line[0] for line in table.rows] == ["zero-point", "gptq"] and passed == []
    zero_point = row(table, "zero-point")
    assert (zero_point["solved"], zero_point["tried, not solved"], zero_point["not tried"]) == ("1", "1", "1")
    assert zero_point["tries, median"] == "2" and zero_point["notebook"] == "01"
    assert [line[0] for line in classroom.exercises_table([]).rows] == []


def test_learners_tell_how_far_they_are_and_where_they_stay_behind(handed_in, tmp_path):
    handed_in("Ada", [("zero-point", True), ("per-channel", True), ("gptq", False)])
    handed_in("Eve", [])
    _, learners, _ = classroom.collect(tmp_path / "class")
    table = classroom.learners_table(learners)
    ada, eve = row(table, "Ada"), row(table, "Eve")
    assert ada["01"] == "2/6" and ada["05"] == "0/6" and ada["tried, not solved"] == "gptq"
    assert eve["01"] == "0/6" and eve["tried, not solved"] == "–" == eve["last try"]


def test_the_exercise_to_talk_about_is_the_one_most_learners_are_stuck_at(handed_in, tmp_path):
    for name in ("Ada", "Ben"):
        handed_in(name, [("zero-point", True), ("per-channel", True), ("equalize", False), ("equalize", False)])
    handed_in("Eve", [("zero-point", False), ("per-channel", True), ("equalize", True)])
    _, learners, _ = classroom.collect(tmp_path / "class")
    said = classroom.discuss_next(learners)
    assert "`equalize`" in said and "1 of the 3 who tried it solved it, with 2 tries in the median" in said


def test_when_all_is_solved_it_is_the_one_with_most_tries(handed_in, tmp_path):
    handed_in("Ada", [("zero-point", True), ("equalize", False), ("equalize", True)])
    _, learners, _ = classroom.collect(tmp_path / "class")
    assert classroom.discuss_next(learners).startswith(
        "Everybody solved what they tried. Most tries went into `equalize`"
    )
    assert classroom.discuss_next([]) == "Nobody has tried an exercise yet."


def test_questions_that_somebody_has_not_got_right(handed_in, tmp_path):
    handed_in("Ada", [("01.1", False), ("01.2", True)])
    _, learners, _ = classroom.collect(tmp_path / "class")
    table = classroom.questions_table(learners)
    assert [line[:4] for line in table.rows] == [["01.1", "0", "1", "1"]]


def test_questions_of_a_notebook_that_was_added_count_too(monkeypatch):
    every = (*quizzes.every(), quizzes.Question("07.1", "Why?", ()))
    monkeypatch.setattr(quizzes, "every", lambda: every)
    done = {id: ("attempted", 1) for id in ("07.1", "01.2", "gptq")}
    table = classroom.questions_table([classroom.Learner("Ada", done, "")])
    assert [line[0] for line in table.rows] == ["01.2", "07.1"]


def test_laptops_with_most_to_mend_come_first(laptop, tmp_path):
    laptop("Ada", ("OK", "torch"), ("WARN", "memory"))
    laptop("Ben", ("FAIL", "torch"), ("FAIL", "data"), ("WARN", "VNNI"))
    laptops, _, _ = classroom.collect(tmp_path / "class")
    table = classroom.laptops_table(laptops)
    assert [line[:3] for line in table.rows] == [["Ben", "torch, data", "VNNI"], ["Ada", "–", "memory"]]
    assert row(table, "Ada")["system"] == doctor.record([], "")["machine"]["system"]
    assert classroom.laptops_table([each for each in laptops if each["name"] == "Ada"]).rows == table.rows[1:]


def test_who_hands_in_twice_counts_with_the_newer_file(handed_in, tmp_path):
    old = handed_in("Ada", [("zero-point", False)], file="a.csv")
    text = old.read_text(encoding="utf-8").splitlines()
    handed_in("Ada", [("zero-point", True)], file="b.csv")
    (tmp_path / "class" / "c.csv").write_text("\n".join(line.replace(",20", ",19") for line in text), encoding="utf-8")
    _, learners, passed = classroom.collect(tmp_path / "class")
    assert [learner.done["zero-point"][0] for learner in learners] == ["solved"]
    assert len(passed) == 2 and all("Ada handed in more than once, the newer file counts" in each for each in passed)


@pytest.mark.parametrize("newer", ["a.json", "b.json"])
def test_a_laptop_that_is_handed_in_twice_counts_with_the_newer_file(laptop, tmp_path, newer):
    for file in ("a.json", "b.json"):
        path = laptop("Ada", ("OK" if file == newer else "FAIL", "torch")).rename(tmp_path / "class" / file)
        os.utime(path, (2e9, 2e9) if file == newer else (1e9, 1e9))
    laptops, _, passed = classroom.collect(tmp_path / "class")
    assert [(each["name"], each["FAIL"]) for each in laptops] == [("Ada", [])]
    assert passed == ["b.json: Ada handed in more than once, the newer file counts"]


def test_a_file_that_a_spreadsheet_saved_is_read(handed_in, tmp_path):
    path = handed_in("Zoë", [("zero-point", True)])
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    assert classroom.read_progress(path).done == {"zero-point": ("solved", 1)}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.csv", b"", "is not what exercises.export"),
        ("head.csv", b"name,kind,id,status,tries,when\n", "is not what exercises.export"),
        ("other.csv", b"date,amount\n2026-01-01,3\n", "is not what exercises.export"),
        ("tries.csv", b"name,kind,id,status,tries,when\nA,exercise,gptq,solved,many,2026-01-01\n", "is damaged"),
        ("when.csv", b"name,kind,id,status,tries,when\nA,exercise,gptq,solved,1,noon\n", "is damaged"),
        ("short.csv", b"name,kind,id,status,tries,when\nA,exercise,gptq,solved\n", "is damaged"),
        ("two.csv", b"name,kind,id,status,tries,when\nA,exercise,gptq,left,0,\nB,exercise,gptq,left,0,\n", "2 names"),
        ("bytes.csv", b"\xff\xfe\x00\x01", "is damaged"),
        ("nul.csv", b"name,kind,id,status,tries,when\nA,exercise,g\x00,solved,1,\n", "is damaged"),
        ("empty.json", b"", "is not what make doctor"),
        ("list.json", b"[]", "is not what make doctor"),
        ("deep.json", b"[" * 100_000, "is not what make doctor"),
        ("other.json", b'{"name": "A"}', "is not what make doctor"),
        ("newer.json", b'{"doctor": 99}', "another version of make doctor"),
        ("half.json", b'{"doctor": 1, "name": "A", "machine": {}, "findings": []}', "is not what make doctor"),
    ],
)
def test_damaged_and_foreign_files_are_named_and_passed_over(
    handed_in, laptop, tmp_path, monkeypatch, capsys, name, content, said
):
    handed_in("Ada", [("zero-point", True)])
    laptop("Ada", ("OK", "torch"))
    (tmp_path / "class" / name).write_bytes(content)
    code, page = lay_out(tmp_path, monkeypatch)
    assert code == 0 and "1 of 1 are ready" in page and "zero-point" in page
    error = capsys.readouterr().err
    assert f"Passed over: {name} " in error and said in error
    assert name in page.partition("## Passed over")[2]


def test_files_in_folders_are_found_too(handed_in, tmp_path):
    handed_in("Ada", [("zero-point", True)], file="week 1/Ada.csv")
    assert [learner.name for learner in classroom.collect(tmp_path / "class")[1]] == ["Ada"]


def test_a_name_is_text_and_nothing_else(handed_in, tmp_path, monkeypatch):
    handed_in("<script>a|b\n# c", [("zero-point", True)], file="a.csv")
    code, _ = lay_out(tmp_path, monkeypatch)
    page = (tmp_path / "results" / "class.html").read_text(encoding="utf-8")
    assert code == 0 and "<script>" not in page and "&lt;script&gt;a|b # c</td>" in page


@pytest.mark.parametrize("made", [True, False])
def test_an_empty_folder_is_told_what_belongs_there(tmp_path, monkeypatch, capsys, made):
    if made:
        (tmp_path / "class").mkdir()
    code, page = lay_out(tmp_path, monkeypatch)
    assert code == 2 and page is None
    error = capsys.readouterr().err
    assert "make doctor JSON=name.json" in error and "exercises.export(" in error


def test_the_doctor_keeps_what_it_says_without_paths_and_users(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("WARN", "memory", "little", "close programs")])
    assert doctor.main(["--json", str(tmp_path / "class" / "Ada.json"), "--name", "Ada L."]) == 0
    assert "WARN  memory" in capsys.readouterr().out
    laptops, _, _ = classroom.collect(tmp_path / "class")
    assert laptops[0]["name"] == "Ada L." and laptops[0]["WARN"] == ["memory"]
    text = (tmp_path / "class" / "Ada.json").read_text(encoding="utf-8")
    assert str(doctor.Path.home()) not in text and str(doctor.PYPROJECT.parent) not in text


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [])
    (tmp_path / "file").write_text("in the way")
    assert doctor.main(["--json", str(tmp_path / "file" / "a.json")]) == 2
    assert "a.json cannot be written" in capsys.readouterr().err
