"""Quizzes: questions with options, each wrong one with its own explanation; kept as text in `quizzes/NN.toml`."""

import functools
import html
import tomllib
from dataclasses import dataclass
from importlib import resources

LETTERS = "abcdef"


@dataclass(frozen=True)
class Option:
    """One answer that can be chosen; `why` explains why it is right or wrong."""

    text: str
    right: bool
    why: str


@dataclass(frozen=True)
class Question:
    """One question with exactly one right option. id: notebook and number, as "01.3". table: rows of cells, header first."""

    id: str
    text: str
    options: tuple[Option, ...]
    table: tuple[tuple[str, ...], ...] = ()

    def option(self, letter):
        """Return the `Option` of that letter. Raises `ValueError` for others."""
        letters = LETTERS[: len(self.options)]
        if not isinstance(letter, str) or letter.strip().lower() not in letters or not letter.strip():
            raise ValueError(f"question {self.id} has the answers {', '.join(letters)}; this is {letter!r}")
        return self.options[letters.index(letter.strip().lower())]


class Quiz:
    """Questions as a notebook shows them: to unfold in a browser, as plain text anywhere else."""

    def __init__(self, questions):
        self.questions = questions

    def __repr__(self):
        return "\n\n".join(_plain(question) for question in self.questions)

    def _repr_html_(self):
        return "\n".join(_html(question) for question in self.questions)


def questions(notebook):
    """Return the `Question`s of a notebook, "00" to "06"; none when it has no quiz."""
    return tuple(question for question in _all() if question.id.split(".")[0] == notebook)


def question(id):
    """Return the `Question` of that id, or None."""
    return next((each for each in _all() if each.id == id), None)


@functools.cache
def _all():
    found = []
    folder = resources.files(__package__) / "quizzes"
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".toml"):
            continue
        notebook = file.name.removesuffix(".toml")
        for number, row in enumerate(tomllib.loads(file.read_text(encoding="utf-8"))["question"], start=1):
            options = tuple(Option(o["text"], o.get("right", False), o["why"].strip()) for o in row["option"])
            table = tuple(tuple(line) for line in row.get("table", ()))
            found.append(Question(f"{notebook}.{number}", row["text"].strip(), options, table))
    return tuple(found)


def _plain(question):
    lines = [f"{question.id}  {question.text}"]
    if question.table:
        widths = [max(len(row[i]) for row in question.table) for i in range(len(question.table[0]))]
        cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in question.table]
        lines += ["    " + "  ".join(row).rstrip() for row in cells]
    lines += [f"  {letter}) {o.text}" for letter, o in zip(LETTERS, question.options, strict=False)]
    return "\n".join([*lines, f'  answer with quiz("{question.id}", "a")'])


def _html(question):
    # <details> needs neither script nor kernel: it unfolds in JupyterLab, Colab, GitHub's viewers and the web edition.
    parts = [f"<p><b>{question.id}</b>&ensp;{html.escape(question.text)}</p>"]
    if question.table:
        head, *rows = question.table
        cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    for letter, option in zip(LETTERS, question.options, strict=False):
        verdict = "✔ Right." if option.right else "✗ No."
        parts.append(
            f"<details><summary>{letter}) {html.escape(option.text)}</summary>"
            f"<p>{verdict} {html.escape(option.why)}</p></details>"
        )
    return "<div>" + "".join(parts) + "</div>"
