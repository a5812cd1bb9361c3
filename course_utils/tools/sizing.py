"""Write what docs/jupyterhub.md says of this course: its link, and from data/needs.json how large a server is: `make sizing`.

Memory counts as one learner's kernel has it at its highest. A core counts as busy for as long as the notebook's cells run on the
cores that it was measured with, spread over the minutes that a reader takes.
"""

import json
import sys
from pathlib import Path

from course_utils import files
from course_utils.launch import NEEDS
from course_utils.tables import Table
from course_utils.tools import badges

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "jupyterhub.md"
MARKS = ("<!-- {}: written by `make sizing` -->", "<!-- end of {} -->")
FOLDER = "squeeze"  # of each learner, in the home


def table(needs, minutes):
    """Return how many learners fit, by notebook, as a `Table`.

    needs: the notebooks of data/needs.json. minutes: name of a notebook → minutes that a reader takes.
    """
    rows = []
    for name, need in sorted(needs.items()):
        busy = need["seconds"] * need["cores"] / (60 * minutes[name])
        gib = need["memory_mib"] / 1024
        rows.append(
            [
                name[:2],
                f"{gib:.1f}",
                f"{need['seconds'] * need['cores'] / 60:.1f}",
                f"{minutes[name]}",
                f"{1 / busy:.1f}",
            ]
        )
    columns = ["notebook", "GiB of memory a learner", "minutes of one core", "minutes of a reader", "learners a core"]
    return Table(columns, rows)


def section(needs, minutes):
    """Return what stands between the two marks of the page."""
    gib = max(need["memory_mib"] for need in needs.values()) / 1024
    shown = table(needs, minutes)
    cores = min(float(row[-1]) for row in shown.rows)
    taken = sorted({f"{need['cpu']}, {need['cores']} cores, {need['date']}" for need in needs.values()})
    said = (
        f"The largest takes {gib:.1f} GiB, and the busiest leaves a core to {cores:.1f} learners: N learners need "
        f"{gib:.1f} · N GiB and N / {cores:.1f} cores, besides what the server itself needs. Measured on {'; '.join(taken)}."
    )
    return f"{shown.markdown()}\n\n{said}\n"


def link(course):
    """Return nbgitpuller's link, for a learner of the hub at HUB, to the `badges.Course`."""
    first = min(path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    where = f"targetpath={FOLDER}&urlpath=lab/tree/{FOLDER}/notebooks/{first}"
    return (
        f"```text\nhttps://HUB/hub/user-redirect/git-pull?repo={course.address}&branch={course.branch}&{where}\n```\n"
    )


def written(text):
    """Return the page's `text` with what belongs between its marks. Raises `ValueError` where a mark is missing."""
    for name, content in (("link", link(badges.setting())), ("sizing", section(*measured()))):
        begin, end = (mark.format(name) for mark in MARKS)
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page needs {begin} and {end}, to put the {name} between")
        text = f"{head}{begin}\n\n{content}\n{end}{tail}"
    return text


def measured():
    """Return `(needs, minutes)` of all notebooks that were measured."""
    needs = json.loads((files.data_dir() / NEEDS).read_text(encoding="utf-8"))["notebooks"]
    minutes = {}
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        minutes[path.stem] = json.loads(path.read_text(encoding="utf-8"))["metadata"]["course"]["minutes"]
    return {name: need for name, need in needs.items() if name in minutes}, minutes


def main():
    try:
        files.write_text(PAGE, written(PAGE.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        print(f"The table was not written: {error}.", file=sys.stderr)
        return 2
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
