"""How long a notebook takes a reader: `python -m course_utils.tools.minutes` writes it at the head of each.

Reading: 200 words a minute (adults read plain English at 238, Brysbaert 2019, and this is not plain), 3 seconds for a line of
code or of printed output, 45 seconds for a picture, a minute for a question of the quiz. Exercises: as each one says.
"""

import re
from pathlib import Path

import nbformat

from course_utils import exercises, files
from course_utils.tools.clean import to_text

ROOT = Path(__file__).resolve().parents[2]
HEAD = re.compile(r"^\*Time: .*?\. ", re.MULTILINE)  # its first sentence; what is needed follows
ROUND_TO = 5


def minutes(notebook, number):
    """Return `(reading, exercises)` in minutes, rounded up to fives, of the `notebook` whose name begins with `number`."""
    seconds = 0.0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            seconds += len(re.findall(r"\w+", cell.source)) * 60 / 200
            continue
        if "exercise" in cell.metadata.get("tags", ()):
            continue
        printed = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs]
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        seconds += 3 * len([line for text in [cell.source, *printed] for line in text.splitlines() if line.strip()])
        seconds += 45 * pictures
    questions = exercises.quiz(number).questions
    solving = sum(exercise.minutes for exercise in exercises.every().values() if exercise.notebook == number)
    return _rounded(seconds / 60 + len(questions)), _rounded(solving)


def head(notebook, number):
    """Return the sentence for the head of `notebook`."""
    reading, solving = minutes(notebook, number)
    if not solving:
        return f"*Time: {reading} minutes. "
    return f"*Time: {reading + solving} minutes: {reading} to read and run, {solving} for the exercises. "


def _rounded(value):
    return -int(-value // ROUND_TO) * ROUND_TO


def main():
    total = 0
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook, number = nbformat.read(path, as_version=4), path.name[:2]
        first = notebook.cells[0]
        first.source = HEAD.sub(head(notebook, number), first.source, count=1)
        notebook.metadata["course"]["minutes"] = sum(minutes(notebook, number))
        files.write_text(path, to_text(notebook))
        total += notebook.metadata["course"]["minutes"]
        print(path.stem, HEAD.search(first.source)[0].strip("* "))
    print(f"the whole course: {total / 60:.1f} hours")


if __name__ == "__main__":
    main()
