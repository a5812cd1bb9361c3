"""Quizzes: questions with options, each wrong one with its own explanation; kept as text in `quizzes/NN.toml`.

A question's id is its notebook and its place in that file, and progress is kept by it: new questions go to the end.
"""

import functools
import html
import re
import textwrap
import tomllib
from dataclasses import dataclass
from importlib import resources

from ..tables import Table

LETTERS = "abcdef"
WIDTH = 100  # of plain text, in characters


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
        letters = list(LETTERS[: len(self.options)])
        chosen = letter.strip().lower() if isinstance(letter, str) else letter
        if chosen not in letters:
            raise ValueError(f"question {self.id} has the answers {', '.join(letters)}; this is {letter!r}")
        return self.options[letters.index(chosen)]


class Quiz:
    """Questions as a notebook shows them: to unfold in a browser, as plain text anywhere else."""

    def __init__(self, questions):
        self.questions = questions

    def __repr__(self):
        return "\n\n".join([_plain(question) for question in self.questions] + [self._how_to_answer()])

    def _repr_html_(self):
        return "\n".join([*map(_html, self.questions), f"<p>{_rich(self._how_to_answer())}</p>"])

    def _how_to_answer(self):
        return f'To answer: `exercises.quiz("{self.questions[0].id}", "a")`. It tells you why, and exercises.progress() counts it.'


@functools.cache
def every():
    """Return the `Question`s of all notebooks, in order."""
    found = []
    folder = resources.files(__package__) / "quizzes"
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".toml"):
            continue
        notebook = file.name.removesuffix(".toml")
        for number, row in enumerate(tomllib.loads(file.read_text(encoding="utf-8"))["question"], start=1):
            options = tuple(Option(_line(o["text"]), o.get("right", False), _line(o["why"])) for o in row["option"])
            table = tuple(tuple(line) for line in row.get("table", ()))
            found.append(Question(f"{notebook}.{number}", _line(row["text"]), options, table))
    return tuple(found)


def questions(notebook):
    """Return the `Question`s of a notebook, as "06"; none when it has no quiz."""
    return tuple(question for question in every() if question.id.split(".")[0] == notebook)


def question(id):
    """Return the `Question` of that id, or None."""
    return next((each for each in every() if each.id == id), None)


def _line(text):
    return " ".join(text.split())  # how lines break in the file means nothing


def _plain(question):
    lines = [textwrap.fill(f"{question.id}  {question.text}", WIDTH)]
    if question.table:
        head, *rows = question.table
        lines.append(textwrap.indent(str(Table(head, rows)), "    "))
    for letter, option in zip(LETTERS, question.options, strict=False):
        lines.append(textwrap.fill(f"{letter}) {option.text}", WIDTH, initial_indent="  ", subsequent_indent="     "))
    return "\n".join(lines)


def _html(question):
    # <details> needs neither script nor kernel: it unfolds in JupyterLab, Colab, GitHub's viewers and the web edition.
    parts = [f"<p><b>{question.id}</b>&ensp;{_rich(question.text)}</p>"]
    if question.table:
        head, *rows = question.table
        cells = ["".join(f"<th>{_rich(cell)}</th>" for cell in head)]
        cells += ["".join(f"<td>{_rich(cell)}</td>" for cell in row) for row in rows]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    for letter, option in zip(LETTERS, question.options, strict=False):
        verdict = "✔ Right." if option.right else "✗ No."
        parts.append(
            f"<details><summary>{letter}) {_rich(option.text)}</summary><p>{verdict} {_rich(option.why)}</p></details>"
        )
    return "<div>" + "".join(parts) + "</div>"


def _rich(text):
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
