"""Lay what a class handed in side by side: `make class FOLDER=...`, with laptops (JSON of `make doctor`) and progress (CSV).

Looks for `*.json` and `*.csv` in the folder and those in it, and writes results/class.md and results/class.html: what each laptop
lacks, how far each learner is, how many solved each exercise, and which to talk about next. A file that is neither is named and
passed over.
"""

import argparse
import csv
import datetime
import io
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from course_utils import exercises, files, report
from course_utils.exercises import quizzes
from course_utils.exercises.progress import ATTEMPTED, SOLVED
from course_utils.tables import Table
from course_utils.tools.doctor import RECORD

COLUMNS = {"name", "kind", "id", "status", "tries", "when"}


@dataclass(frozen=True)
class Learner:
    """What one learner exported: `done` is a dict of id → (status, tries), of what was tried; `when` the time of the last try."""

    name: str
    done: dict
    when: str


class ForeignFile(ValueError):
    """A file that is neither a laptop nor somebody's progress; the message says why."""


def read_laptop(path):
    """Return what `make doctor JSON=...` wrote to `path`, as a dict. Raises `ForeignFile`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["doctor"] != RECORD:
            raise ForeignFile(f"was written by another version of make doctor ({record['doctor']})")
        machine = {key: record["machine"][key] for key in ("system", "python", "cpu", "cores", "memory_gib", "engine")}
        machine["isa"] = " ".join(map(str, record["machine"]["isa"]))
        found = {"FAIL": [], "WARN": []}
        for finding in record["findings"]:
            if finding["status"] in found:
                found[finding["status"]].append(str(finding["what"]))
        return {"name": str(record["name"]), **machine, **found}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(error, "is not what make doctor JSON=FILE writes") from None


def read_progress(path):
    """Return the `Learner` whose exercises.export(...) is at `path`, also as a spreadsheet saves it. Raises `ForeignFile`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        rows = list(csv.DictReader(io.StringIO(text), delimiter=";" if head.count(";") > head.count(",") else ","))
        if not rows or not COLUMNS <= rows[0].keys():
            raise ForeignFile("is not what exercises.export(...) writes")
        names = {row["name"] for row in rows}
        if len(names) > 1:
            raise ForeignFile(f"holds {len(names)} names, expected one")
        tried = [row for row in rows if row["status"] in (SOLVED, ATTEMPTED)]
        done = {row["id"]: (row["status"], int(row["tries"])) for row in tried}
        for row in tried:
            datetime.datetime.fromisoformat(row["when"])
        return Learner(names.pop(), done, max((row["when"] for row in tried), default=""))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise _foreign(error, "is damaged") from None


def _foreign(error, what):
    return error if isinstance(error, ForeignFile) else ForeignFile(f"{what} ({type(error).__name__}: {error})")


def collect(folder):
    """Return `(laptops, learners, passed over)` of `folder`: lists of dicts, `Learner`s, and sentences.

    Who handed in twice under one name counts with the newer file: of progress, that of the later last try; of laptops, whose
    records hold no time, the one that was written to the folder later.
    """
    laptops, learners, passed = {}, {}, []  # by name: when, and what
    for path in sorted(path for kind in ("*.json", "*.csv") for path in Path(folder).rglob(kind)):
        where = path.relative_to(folder)
        try:
            if path.suffix == ".json":
                found = read_laptop(path)
                known, name, when = laptops, found["name"], path.stat().st_mtime
            else:
                found = read_progress(path)
                known, name, when = learners, found.name, found.when
        except ForeignFile as error:
            passed.append(f"{where} {error}")
            continue
        if name in known:
            passed.append(f"{where}: {name} handed in more than once, the newer file counts")
        if name not in known or when >= known[name][0]:
            known[name] = when, found
    laptops, learners = ([found for _, found in known.values()] for known in (laptops, learners))
    return laptops, learners, passed


def laptops_table(laptops):
    """Return a `Table` with a line a laptop; those that have most to mend come first."""
    rows = sorted(laptops, key=lambda each: (-len(each["FAIL"]), -len(each["WARN"]), each["name"]))
    return Table(
        [
            "laptop",
            "to mend",
            "warned of",
            "engine",
            "memory, GiB",
            "cores",
            "instructions",
            "Python",
            "system",
            "processor",
        ],
        [
            [
                *(each["name"], ", ".join(each["FAIL"]) or "–", ", ".join(each["WARN"]) or "–", each["engine"] or "–"),
                *(each["memory_gib"], each["cores"], each["isa"] or "–", each["python"], each["system"], each["cpu"]),
            ]
            for each in rows
        ],
    )


def learners_table(learners):
    """Return a `Table` with a line a learner: how many exercises of each notebook are solved, and which were left unsolved."""
    every = exercises.every().values()
    notebooks = sorted({each.notebook for each in every})
    rows = []
    for learner in sorted(learners, key=lambda each: each.name):
        solved = {id for id, (status, _) in learner.done.items() if status == SOLVED}
        here = [[each.id in solved for each in every if each.notebook == notebook] for notebook in notebooks]
        stuck = [each.id for each in every if learner.done.get(each.id, (None,))[0] == ATTEMPTED]
        last = learner.when[:16].replace("T", " ")
        rows.append([learner.name, *(f"{sum(row)}/{len(row)}" for row in here), ", ".join(stuck) or "–", last or "–"])
    return Table(["learner", *notebooks, "tried, not solved", "last try"], rows)


def exercises_table(learners):
    """Return a `Table` with a line for each exercise that somebody tried, in the order of the course."""
    rows = []
    for each in exercises.every().values():
        solved, tried, tries = _counts(each.id, learners)
        if tried:
            rows.append(
                [
                    each.id,
                    each.notebook,
                    f"{each.minutes}",
                    f"{solved}",
                    f"{tried - solved}",
                    f"{len(learners) - tried}",
                    tries,
                ]
            )
    return Table(["exercise", "notebook", "minutes", "solved", "tried, not solved", "not tried", "tries, median"], rows)


def questions_table(learners):
    """Return a `Table` with a line for each question of a quiz that somebody has not got right yet."""
    rows = []
    notebooks = sorted({id.partition(".")[0] for learner in learners for id in learner.done})  # exercises have no quiz
    for question in (question for notebook in notebooks for question in quizzes.questions(notebook)):
        right, tried, tries = _counts(question.id, learners)
        if right < tried:
            rows.append([question.id, f"{right}", f"{tried - right}", tries, question.text])
    return Table(["question", "right", "not yet", "tries, median", "text"], rows)


def _counts(id, learners):
    entries = [learner.done[id] for learner in learners if id in learner.done]
    tries = f"{statistics.median(tries for _, tries in entries):g}" if entries else "–"
    return sum(status == SOLVED for status, _ in entries), len(entries), tries


def discuss_next(learners):
    """Return a sentence on the exercise that is most worth talking about: tried by many, solved by few, with many tries."""
    hardest = None
    for each in exercises.every().values():
        solved, tried, tries = _counts(each.id, learners)
        if tried and (hardest is None or (tried - solved, float(tries)) > hardest[0]):
            hardest = (tried - solved, float(tries)), each, solved, tried, tries
    if hardest is None:
        return "Nobody has tried an exercise yet."
    (unsolved, _), each, solved, tried, tries = hardest
    stuck = f"{solved} of the {tried} who tried it solved it, with {tries} tries in the median."
    if not unsolved:
        return (
            f"Everybody solved what they tried. Most tries went into `{each.id}` ({each.title}): {tries} in the median."
        )
    return f"Talk about `{each.id}` ({each.title}, notebook {each.notebook}) next: {stuck}"


def markdown(laptops, learners, passed):
    """Return the whole page."""
    parts = ["# The class"]
    if laptops:
        ready = sum(not each["FAIL"] for each in laptops)
        parts += ["## Laptops", f"{ready} of {len(laptops)} are ready.", _table(laptops_table(laptops))]
    if learners:
        parts += ["## Progress", discuss_next(learners), _table(learners_table(learners))]
        for title, table in (("Exercises", exercises_table(learners)), ("Questions", questions_table(learners))):
            parts += [f"### {title}", _table(table)] if table.rows else []
    if passed:
        parts += ["## Passed over", "\n".join(f"- {_plain(sentence)}" for sentence in passed)]
    return "\n\n".join(parts) + "\n"


def _table(table):
    return Table(table.columns, [[_plain(cell) for cell in row] for row in table.rows]).markdown()


def _plain(cell):
    # Names come from anybody: none may end a cell or a line, or be Markdown.
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in " ".join(str(cell).split()))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m course_utils.tools.classroom", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="holds the files that the class handed in")
    folder = parser.parse_args(arguments).folder
    laptops, learners, passed = collect(folder)
    for sentence in passed:
        print(f"Passed over: {sentence}.", file=sys.stderr)
    if not laptops and not learners:
        print(
            f"There is nothing of a class in {folder}. Each learner hands in the file of `make doctor JSON=name.json`, and that of "
            '`exercises.export("name.csv", name="...")`, run in a notebook.',
            file=sys.stderr,
        )
        return 2
    if laptops:
        print(laptops_table(laptops), end="\n\n")
    if learners:
        print(learners_table(learners), exercises_table(learners), discuss_next(learners), sep="\n\n", end="\n\n")
    text = markdown(laptops, learners, passed)
    for kind, content in (("md", text), ("html", report.html(text))):
        path = files.results_dir() / f"class.{kind}"
        files.write_text(path, content)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
