"""Quizzes: every question has one right answer and a word on each other, and what is shown is all of it, escaped."""

import dataclasses
import importlib
import re
import tomllib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from course_utils import exercises
from course_utils.exercises import quizzes
from course_utils.exercises.quizzes import LETTERS, Option, Question, Quiz

progress = importlib.import_module("course_utils.exercises.progress")  # the package has a function of that name
FOLDER = Path(quizzes.__file__).parent / "quizzes"
NOTEBOOKS = [f"{number:02}" for number in range(7)]
EVERY = [question for notebook in NOTEBOOKS for question in quizzes.questions(notebook)]


def right_letter(question):
    return LETTERS[[option.right for option in question.options].index(True)]


def wrong_letter(question):
    return LETTERS[[option.right for option in question.options].index(False)]


class Shown(HTMLParser):
    """Reads HTML as a browser shows it: `text`, and how often each tag was opened; unbalanced tags are an error."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.open = "", Counter(), []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def words(text):
    return text.replace("`", "").split()


def within(part, whole):
    """Whether the words of `part` follow each other in `whole`, wherever lines break."""
    return " ".join(words(part)) in " ".join(words(whole))


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """Keep progress in a file of the test's own; return its path."""
    monkeypatch.delenv("COURSE_RUN", raising=False)
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "mine.json"))
    return tmp_path / "mine.json"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_has_at_least_five_questions(notebook):
    assert len(quizzes.questions(notebook)) >= 5


def test_there_is_a_quiz_for_each_notebook_and_none_besides():
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{notebook}.toml" for notebook in NOTEBOOKS]
    notebooks = Path(__file__).resolve().parents[1] / "notebooks"
    assert sorted(path.name[:2] for path in notebooks.glob("[0-9]*.ipynb")) == NOTEBOOKS


def test_ids_are_notebook_and_place_in_the_file():
    for notebook in NOTEBOOKS:
        stored = tomllib.loads((FOLDER / f"{notebook}.toml").read_text(encoding="utf-8"))["question"]
        found = quizzes.questions(notebook)
        assert [question.id for question in found] == [f"{notebook}.{n}" for n in range(1, len(stored) + 1)]
        assert [question.text for question in found] == [" ".join(row["text"].split()) for row in stored]
    quizzes.every.cache_clear()
    assert [question for notebook in NOTEBOOKS for question in quizzes.questions(notebook)] == EVERY


def test_files_hold_nothing_but_what_is_read():
    for path in FOLDER.glob("*.toml"):
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
        assert stored.keys() == {"question"}
        for row in stored["question"]:
            assert row.keys() <= {"text", "table", "option"}
            assert all(option.keys() <= {"text", "right", "why"} for option in row["option"])


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_one_answer_is_right_and_each_has_its_own_explanation(question):
    assert 3 <= len(question.options) <= 4
    assert [option.right for option in question.options].count(True) == 1
    assert len({option.text for option in question.options}) == len(question.options)
    assert len({option.why for option in question.options}) == len(question.options)
    for option in question.options:
        assert option.text and len(option.why) >= 20 and option.why != option.text
        assert option.why.endswith((".", "?"))


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_tables_are_rectangular_and_of_text(question):
    if question.table:
        assert len(question.table) >= 2
        assert len({len(row) for row in question.table}) == 1
        assert all(isinstance(cell, str) and cell for row in question.table for cell in row)


def test_no_question_is_asked_twice():
    assert len({(question.text, question.table) for question in EVERY}) == len(EVERY)
    whys = Counter(option.why for question in EVERY for option in question.options)
    assert max(whys.values()) == 1


@pytest.mark.parametrize("found", [EVERY, *map(quizzes.questions, NOTEBOOKS)], ids=["all", *NOTEBOOKS])
def test_the_right_answer_has_no_favourite_letter(found):
    assert max(Counter(map(right_letter, found)).values()) <= len(found) / 2


def test_the_right_answer_does_not_stand_out_by_its_length():
    longest = [max(question.options, key=lambda option: len(option.text)).right for question in EVERY]
    assert sum(longest) <= 0.4 * len(EVERY)


@pytest.mark.parametrize("notebook", ["02", "03", "04", "05", "06"])
def test_there_is_a_flaw_to_spot_in_a_table_that_says_that_it_is_made_up(notebook):
    flawed = [question for question in quizzes.questions(notebook) if question.text.startswith("Spot the flaw.")]
    assert flawed
    assert all(question.table and "made up" in question.text for question in flawed)


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_plain_text_shows_question_table_and_answers_but_not_which_is_right(question):
    text = repr(Quiz((question,)))
    assert within(f"{question.id} {question.text}", text)
    for row in question.table:
        assert any([within(cell, line) for cell in row] == [True] * len(row) for line in text.splitlines())
    for letter, option in zip(LETTERS, question.options, strict=False):
        assert within(f"{letter}) {option.text}", text)
        assert not within(option.why, text)
    assert f'quiz("{question.id}", "a")' in text


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_html_shows_everything_and_marks_one_answer_as_right(question):
    shown = Shown(Quiz((question,))._repr_html_())
    assert within(f"{question.id} {question.text}", shown.text)
    assert all(" ".join(words(cell)) in " ".join(words(shown.text)) for row in question.table for cell in row)
    assert shown.tags["th"] + shown.tags["td"] == sum(map(len, question.table))
    assert shown.tags["details"] == shown.tags["summary"] == len(question.options)
    for letter, option in zip(LETTERS, question.options, strict=False):
        assert f"{letter}) " in shown.text and within(option.text, shown.text) and within(option.why, shown.text)
    verdicts = re.findall(r"<summary>([a-f])\) .*?</summary><p>(✔ Right|✗ No)\. ", Quiz((question,))._repr_html_())
    assert [letter for letter, verdict in verdicts if verdict == "✔ Right"] == [right_letter(question)]
    assert len(verdicts) == len(question.options)
    assert f'quiz("{question.id}", "a")' in shown.text


def test_html_is_escaped_and_code_is_set_as_code():
    nasty = "<script>alert('1 & 2')</script>"
    options = (Option(f"a < b {nasty}", True, f"since {nasty}"), Option("`x[<i>]` & y", False, '"no" `<b>`'))
    html = Quiz((Question("01.1", f"why {nasty}?", options, ((nasty, "b"), ("1 < 2", nasty))),))._repr_html_()
    shown = Shown(html)
    assert not shown.tags["script"] and not shown.tags["i"] and not shown.tags["b"] - 1  # the id is bold
    assert shown.text.count(nasty) == 5 and "a < b" in shown.text and "1 < 2" in shown.text
    assert "<code>x[&lt;i&gt;]</code> &amp; y" in html and "`x" not in shown.text


def test_plain_tables_have_columns():
    table = (("name", "time"), ("a long name", "1 ms"), ("b", "200 ms"))
    text = repr(Quiz((Question("01.1", "why?", (Option("a", True, ""), Option("b", False, "")), table),)))
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    assert lines == ["    name           time", "    a long name    1 ms", "    b            200 ms"]


def test_plain_lines_fit_a_terminal():
    sentences = [dataclasses.replace(question, table=()) for question in EVERY]
    assert max(map(len, repr(Quiz(sentences)).splitlines())) <= quizzes.WIDTH


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_quiz_is_all_questions_of_its_notebook(notebook, capsys):
    shown = exercises.quiz(notebook)
    assert shown.questions == quizzes.questions(notebook)
    ids = [f"{notebook}.{number}" for number in range(1, len(shown.questions) + 1)]
    assert re.findall(r"^(\d\d\.\d+)  ", repr(shown), flags=re.MULTILINE) == ids
    assert re.findall(r"<b>(.*?)</b>", shown._repr_html_()) == ids
    assert not capsys.readouterr().out


def test_one_question_alone():
    assert exercises.quiz("01.2").questions == (quizzes.question("01.2"),)


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_answers_get_their_explanation(question, capsys):
    for letter, option in zip(LETTERS, question.options, strict=False):
        assert exercises.quiz(question.id, letter) is None
        assert capsys.readouterr().out == f"{'✔ right' if option.right else '✘ no'}: {option.why}\n"


def test_letters_may_be_large_and_have_spaces_around_them(capsys):
    question = EVERY[0]
    exercises.quiz(question.id, f" {right_letter(question).upper()} ")
    assert capsys.readouterr().out.startswith("✔ right")


@pytest.mark.parametrize("letter", ["e", "ab", "", " ", "1", 0, True, "abcd", ["a"]])
def test_other_letters_are_an_error_and_no_try(letter, mine):
    question = next(question for question in EVERY if len(question.options) == 4)
    with pytest.raises(ValueError, match=f"question {question.id} has the answers a, b, c, d; this is "):
        exercises.quiz(question.id, letter)
    assert not mine.exists()


@pytest.mark.parametrize("id", ["07", "1", "", "01.0", "01.99", "01.", 1, None, "zero-point"])
def test_unknown_ids_say_what_there_is(id):
    with pytest.raises(ValueError, match=r"there is no quiz .*: a notebook's is quiz\('01'\), one question of it"):
        exercises.quiz(id)


def test_a_whole_quiz_has_no_answer():
    with pytest.raises(ValueError, match=r"an answer belongs to one question, as in quiz\('01.1', 'a'\)"):
        exercises.quiz("01", "a")


def test_answers_are_remembered(mine, capsys):
    first, second = EVERY[:2]
    exercises.quiz(first.id, wrong_letter(first))
    assert progress.read()[first.id]["status"] == progress.ATTEMPTED
    exercises.quiz(first.id, right_letter(first))
    exercises.quiz(second.id, wrong_letter(second))
    done = progress.read()
    assert {id: (row["status"], row["tries"]) for id, row in done.items()} == {
        first.id: (progress.SOLVED, 2),
        second.id: (progress.ATTEMPTED, 1),
    }
    exercises.quiz(first.id)
    assert progress.read() == done


def test_an_answer_that_cannot_be_remembered_is_judged_all_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "file" / "mine.json"))
    exercises.quiz(EVERY[0].id, right_letter(EVERY[0]))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("✔ right") and second.startswith("(not remembered: ")
