"""How long a notebook takes a reader: `python -m course_utils.tools.minutes` writes it at the head of each, and in README.

Reading: 238 words a minute (the mean of adults who read English non-fiction, Brysbaert 2019), 2 seconds for a line of code or
of printed output, 30 seconds for a picture, 45 for a question of the quiz. Exercises: as each one says;
the hard ones are extra, and not in the sum. The seconds are guesses.
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
    """Return `(reading, exercises, hard exercises)` of the `notebook` with this `number`: minutes, rounded to fives."""
    seconds = 0.0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            seconds += len(re.findall(r"\w+", cell.source)) * 60 / 238
            continue
        if "exercise" in cell.metadata.get("tags", ()):
            continue
        printed = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs]
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        seconds += 2 * len([line for text in [cell.source, *printed] for line in text.splitlines() if line.strip()])
        seconds += 30 * pictures
    seconds += 45 * len(exercises.quiz(number).questions)
    here = [exercise for exercise in exercises.every().values() if exercise.notebook == number]
    hard = sum(exercise.minutes for exercise in here if exercise.difficulty == "hard")
    return _rounded(seconds / 60), _rounded(sum(exercise.minutes for exercise in here) - hard), _rounded(hard)


def in_readme(text, minutes):
    """Return README's `text` with the minutes, a dict of "00" → number, in its table of notebooks."""
    for number, value in minutes.items():
        text = re.sub(rf"^(\| \[{number} [^|]*\| )\d+", rf"\g<1>{value}", text, flags=re.MULTILINE)
    return text


def head(notebook, number):
    """Return the sentence for the head of `notebook`."""
    reading, solving, hard = minutes(notebook, number)
    if not solving:
        return f"*Time: {reading} minutes. "
    parts = f"{reading} to read and run, {solving} for the exercises"
    return f"*Time: {reading + solving} minutes: {parts}, and {hard} more for the hard ones. "


def _rounded(value):
    return round(value / ROUND_TO) * ROUND_TO


def main():
    found = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook, number = nbformat.read(path, as_version=4), path.name[:2]
        first = notebook.cells[0]
        first.source = HEAD.sub(head(notebook, number), first.source, count=1)
        notebook.metadata["course"]["minutes"] = sum(minutes(notebook, number)[:2])
        files.write_text(path, to_text(notebook))
        found[number] = notebook.metadata["course"]["minutes"]
        print(path.stem, HEAD.search(first.source)[0].strip("* "))
    readme = ROOT / "README.md"
    files.write_text(readme, in_readme(readme.read_text(encoding="utf-8"), found))
    print(f"the whole course: {sum(found.values()) / 60:.1f} hours")


if __name__ == "__main__":
    main()
