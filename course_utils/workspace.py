"""A workspace of your own: the notebooks copied out of the course's folder, so that an update never overwrites your work.

`python -m course_utils start DIR` makes it, and brings what is new when it is called again.
"""

import hashlib
import json
import os
from pathlib import Path

from . import files

ROOT = Path(__file__).resolve().parents[1]
MARK = ".course.json"  # in the workspace: what was given out
NOTEBOOKS = "[0-9][0-9]_*.ipynb"


class WorkspaceError(RuntimeError):
    """No workspace can be there; the message says why, and what to do."""


def start(folder, course=ROOT):
    """Copy the notebooks of `course` into `folder`, or bring one that was made earlier up to date; return sentences to print.

    A notebook that is as it was given out is replaced by its new version. One that was changed, were it only by running it,
    stays; where its new version says something else, that is written beside it under another name. Raises `WorkspaceError`
    for a folder inside the course, and for one that cannot be written.
    """
    folder, course = Path(folder).expanduser().resolve(), Path(course).resolve()
    if folder.is_relative_to(course):
        raise WorkspaceError(
            f"{folder} is inside the course's own folder, which updates change: choose one outside of it"
        )
    sources = sorted((course / "notebooks").glob(NOTEBOOKS))
    if not sources:
        raise WorkspaceError(f"there are no notebooks in {course}: start from a clone of the course")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        given = _given(folder)
        sentences = [sentence for source in sources if (sentence := _bring(source, folder, given))]
        files.write_text(folder / MARK, json.dumps({"given": given}, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise WorkspaceError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    return sentences or ["Everything is up to date."]


def enter(folder):
    """In a workspace, keep progress and results in it, unless the environment names other places; elsewhere do nothing."""
    folder = Path(folder)
    if (folder / MARK).is_file():
        os.environ.setdefault("COURSE_PROGRESS", str(folder / ".progress.json"))
        os.environ.setdefault("COURSE_RESULTS", str(folder / "results"))


def _bring(source, folder, given):
    """Bring one notebook, note it in `given`, and return what was done as a sentence, or None for nothing."""
    new, target = source.read_bytes(), folder / source.name
    there = target.read_bytes() if target.exists() else None
    before, facts = given.get(source.name, {}), {"file": _sha256(new), "lesson": _lesson(new)}
    changed = there not in (None, new) and _sha256(there) != before.get("file")
    if changed and facts["lesson"] == before.get("lesson"):
        return None
    if changed:
        beside = _free(target, given)
        _write(beside, new)
        given |= {beside.name: facts, source.name: before | {"lesson": facts["lesson"]}}
        return f"{source.name}: yours stays as it is; the new version is {beside.name}"
    given[source.name] = facts
    if there == new:
        return None
    _write(target, new)
    return f"{source.name}: {'new' if there is None else 'brought up to date'}"


def _write(path, content):
    with files.replacing(path) as partial:
        partial.write_bytes(content)


def _free(target, given):
    """Return a name beside `target` that is free, or holds a copy that was given out and never changed."""
    number = 1
    while True:
        beside = target.with_name(f"{target.stem}.updated{'' if number == 1 else f'-{number}'}.ipynb")
        if not beside.exists() or _sha256(beside.read_bytes()) == given.get(beside.name, {}).get("file"):
            return beside
        number += 1


def _given(folder):
    try:
        given = json.loads((folder / MARK).read_text(encoding="utf-8"))["given"]
        return {name: dict(facts) for name, facts in given.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nobody knows what was given out: then everything that is there counts as changed, and stays


def _lesson(content):
    """Return a hash of what the notebook says: its cells without outputs and counts."""
    cells = json.loads(content)["cells"]
    return _sha256(json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells]).encode())


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
