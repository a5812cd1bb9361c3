"""Start a notebook from the template, or put an exercise into its notebook: `make notebook NAME=07_noise`, `make exercise ID=sqnr`.

What is there already is never written over. A new notebook comes with a quiz of one question; it runs as it is.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from course_utils import files
from course_utils.tools import badges
from course_utils.tools.clean import to_text

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("template.ipynb")  # NN stands for its number, TITLE for its words
NAME = re.compile(r"(\d\d)_([a-z0-9]+(?:_[a-z0-9]+)*)")
QUESTION = """\
[[question]]
text = "A number was rounded to the nearest step. How far off can it be?"
[[question.option]]
text = "By half a step."
right = true
why = "Further away, another step would be nearer."
[[question.option]]
text = "By a whole step."
why = "That is what cutting off does."
"""


class RefusedError(ValueError):
    """What was asked for cannot be made; the message says why, and nothing was written."""


def notebook(name, root=ROOT):
    """Write the notebook `name`, as in "07_noise", and its quiz below `root`; return both paths.

    Raises `RefusedError` for a name of another form, and for a number that is taken.
    """
    match = NAME.fullmatch(name)
    if not match:
        raise RefusedError(f"NAME={name} is not a number and words, as in NAME=07_noise")
    number, words = match[1], match[2].replace("_", " ")
    path = root / "notebooks" / f"{name}.ipynb"
    quiz = root / "course_utils" / "exercises" / "quizzes" / f"{number}.toml"
    taken = [*path.parent.glob(f"{number}_*.ipynb"), *quiz.parent.glob(quiz.name)]
    if taken:
        raise RefusedError(f"number {number} is taken by {taken[0].relative_to(root).as_posix()}")
    template = TEMPLATE.read_text(encoding="utf-8").replace("NN", number).replace("TITLE", words.capitalize())
    text = badges.in_notebook(template, path.name, badges.setting(root))
    files.write_text(quiz, QUESTION)
    files.write_text(path, text)
    return path, quiz


def exercise(id, root=ROOT):
    """Put the cells of exercise `id` below the last exercise of its notebook; return the notebook's path.

    Raises `RefusedError` for one that is there already or has no place to go, `ValueError` for an unknown id.
    """
    from course_utils import exercises  # and with them torch, which a new notebook need not wait for

    asked = exercises.get(id)
    paths = sorted((root / "notebooks").glob(f"{asked.notebook}_*.ipynb"))
    if not paths:
        raise RefusedError(f"exercise {id!r} belongs to notebook {asked.notebook}, which does not exist")
    found = nbformat.read(paths[0], as_version=4)
    if any(cell.id == f"exercise-{id}" for cell in found.cells):
        raise RefusedError(f"exercise {id!r} stands in {paths[0].name} already")
    places = [n for n, cell in enumerate(found.cells) if cell.id.startswith(("exercises-intro", "exercise-"))]
    if not places:
        raise RefusedError(f"{paths[0].name} has no cell exercises-intro, below which exercises go")
    position = sum(cell.id.startswith("exercise-") for cell in found.cells) + 1
    said = f"**{position}. {asked.title}** ({asked.minutes} minutes, {asked.difficulty}). You will {asked.objective}."
    code = f'{asked.stub()}\n\n\nexercises.check("{id}", {asked.solution.__name__})'
    found.cells[places[-1] + 1 : places[-1] + 1] = [
        new_markdown_cell(said, id=f"ask-{id}"),
        new_code_cell(code, id=f"exercise-{id}", metadata={"tags": ["exercise"]}),
    ]
    files.write_text(paths[0], to_text(found))
    return paths[0]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("notebook", "exercise"))
    parser.add_argument("name", help="of the notebook, as in 07_noise, or the id of the exercise")
    options = parser.parse_args(arguments)
    try:
        written = notebook(options.name) if options.what == "notebook" else (exercise(options.name),)
    except ValueError as error:
        print(f"Nothing was written: {error}.", file=sys.stderr)
        return 2
    number = written[0].name[:2]
    print(*(path.relative_to(ROOT).as_posix() for path in written), sep="\n")
    print(f"Write on in JupyterLab (`make lab`), then `make run-all ONLY={number}`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
