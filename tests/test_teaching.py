"""docs/teaching.md is true to the notebooks: its headings, exercises and minutes are theirs, and its plans add up."""

import re
from pathlib import Path

import nbformat
import pytest

from course_utils import exercises
from tests.toys import ROOT

PAGE = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
LENGTH = re.compile(r"\*Length: (\d+) minutes\.?\*")
COLUMNS = ["from", "minutes", "sections and exercises", "what goes wrong, and what to say"]
PLANS = ["90 minutes", "Half a day", "Two days"]
HEADING = re.compile(r"^#{1,4} +(.+?)\s*$", re.MULTILINE)
CALLED = re.compile(r'`exercises\.(\w+)\("([\w-]+)"')


def tables(text):
    """Return the plans in a text, one for each day: lists of rows, dicts of column → text."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        if head == COLUMNS:
            found.append([dict(zip(COLUMNS, row, strict=True)) for row in rows])
    return found


def part(title):
    """Return what stands below the second-level heading `title`."""
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def what(row):
    """Return the parts of a lesson: sections, as "02 › Quiz", and exercises, several of them with a comma between."""
    return [part.strip() for part in row["sections and exercises"].split(";")]


def sections(row):
    return [part.split(" › ") for part in what(row) if " › " in part]


def ids(row):
    return re.findall(r"`([\w-]+)`", " ".join(part for part in what(row) if " › " not in part))


def headings():
    """Return number of a notebook → its headings, as a reader sees them."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        found[path.name[:2]] = {title for text in cells for title in HEADING.findall(text)}
    return found


ROWS = [row for title in PLANS for table in tables(part(title)) for row in table]


def test_there_are_three_plans_and_the_long_one_has_two_days():
    assert [len(tables(part(title))) for title in PLANS] == [1, 1, 2]
    assert all(row["minutes"].isdigit() for row in ROWS)


def test_every_section_is_a_heading_of_its_notebook():
    there = headings()
    unknown = [reference for row in ROWS for reference in sections(row) if reference[-1] not in there[reference[0]]]
    assert not unknown
    assert {number for row in ROWS for number, _ in sections(row)} == set(there), "every notebook is taught"


@pytest.mark.parametrize("title", PLANS)
def test_a_notebook_is_not_taught_backwards(title):
    order = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
        order[path.name[:2]] = [heading for text in cells for heading in HEADING.findall(text)]
    taught = {}
    for row in (row for table in tables(part(title)) for row in table):
        for number, heading in sections(row):
            taught.setdefault(number, []).append(order[number].index(heading))
    last = {number: order[number].index("Quiz") for number in order}
    for number, places in taught.items():
        lessons = [place for place in places if place < last[number]]
        assert lessons == sorted(set(lessons)), f"notebook {number}"


@pytest.mark.parametrize("title", PLANS)
def test_the_minutes_add_up_and_each_line_begins_where_the_last_one_ended(title):
    total = 0
    for table in tables(part(title)):
        clock = 0
        for row in table:
            assert row["from"] == f"{clock // 60}:{clock % 60:02}"
            clock += int(row["minutes"])
        total += clock
    assert total == int(LENGTH.search(part(title))[1])


@pytest.mark.parametrize("title", PLANS)
def test_exercises_exist_come_once_and_get_the_minutes_that_they_ask_for(title):
    given = []
    for row in (row for table in tables(part(title)) for row in table):
        here = [exercises.get(id) for id in ids(row)]
        assert int(row["minutes"]) >= sum(exercise.minutes for exercise in here)
        assert not [exercise.id for exercise in here if exercise.difficulty == "hard"]
        given += ids(row)
    assert given and len(given) == len(set(given))


@pytest.mark.parametrize("title", PLANS)
def test_an_exercise_comes_after_its_lesson(title):
    taught = set()
    for row in (row for table in tables(part(title)) for row in table):
        assert {exercises.get(id).notebook for id in ids(row)} <= taught
        taught |= {number for number, _ in sections(row)}


def test_the_two_days_hold_what_they_promise():
    """Everything but the hard exercises of notebooks 01 and 02, and some of every other one."""
    given = {id for row in (row for table in tables(part("Two days")) for row in table) for id in ids(row)}
    every = exercises.every().values()
    wanted = {each.id for each in every if each.notebook in ("01", "02") and each.difficulty != "hard"}
    assert wanted <= given
    assert {exercises.get(id).notebook for id in given} == {each.notebook for each in every}


def test_every_line_is_a_break_or_tells_the_teacher_what_to_say():
    for row in ROWS:
        wrong, say, words = row["what goes wrong, and what to say"].partition("**Say:** ")
        if what(row)[0] in ("Break.", "Lunch."):
            assert not (wrong or say)
        else:
            assert (sections(row) or ids(row)) and words
            assert wrong or not ids(row)


def test_names_in_the_prose_exist_too():
    for verb, id in CALLED.findall(PAGE):
        assert hasattr(exercises, verb)
        if verb in ("hint", "solution", "check"):
            exercises.get(id)
    loose = {id for row in ROWS for id in re.findall(r"`([a-z]+-[a-z-]+)`", row["what goes wrong, and what to say"])}
    assert all(exercises.get(id) for id in loose) and loose


def test_every_verb_that_the_pages_name_is_one_of_make():
    verbs = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in ("teaching.md", "jupyterhub.md"):
        named = re.findall(r"`make ([a-z-]+)", Path(ROOT / "docs" / page).read_text(encoding="utf-8"))
        assert named and set(named) <= verbs
