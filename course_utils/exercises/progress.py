"""What a learner has solved, in one small file of their own: `.progress.json` in the checkout, or `$COURSE_PROGRESS`."""

import contextlib
import csv
import datetime
import json
import os
from pathlib import Path

from .. import files

VERSION = 1
SOLVED, ATTEMPTED = "solved", "attempted"


def path():
    """Return where progress is kept."""
    return Path(os.environ.get("COURSE_PROGRESS") or files.data_dir().parent / ".progress.json")


def read():
    """Return a dict of id → `{"status", "tries", "when"}`; empty when nothing was done yet, and under `COURSE_RUN`.

    Raises `DataFileError` when the file is damaged, of a newer version, or cannot be read.
    """
    if os.environ.get("COURSE_RUN"):
        return {}
    try:
        stored = json.loads(path().read_text(encoding="utf-8"))
        if stored["version"] > VERSION:
            raise files.DataFileError(
                f"{path().name} was written by a newer version of the course: update the course, or delete that file"
            )
        return {
            str(key): {"status": row["status"], "tries": int(row["tries"]), "when": str(row["when"])}
            for key, row in stored["done"].items()
            if row["status"] in (SOLVED, ATTEMPTED)
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise files.DataFileError(f"{path()} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise files.DataFileError(
            f"{path().name} is damaged: delete it to start anew (what you wrote in the notebooks is not in it)"
        ) from None


def note(key, passed):
    """Remember one more try at `key`; what was solved stays solved. Returns a sentence when it cannot be written, or None.

    Nothing is remembered while notebooks are run by the runner or by the tests (`COURSE_RUN`): what they print is the same
    whoever runs them.
    """
    if os.environ.get("COURSE_RUN"):
        return None
    try:
        done = read()
        before = done.get(key, {"status": ATTEMPTED, "tries": 0})
        status = SOLVED if passed or before["status"] == SOLVED else ATTEMPTED
        when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        done[key] = {"status": status, "tries": before["tries"] + 1, "when": when}
        _write(done)
    except files.DataFileError as error:
        return f"(not remembered: {error})"
    except OSError as error:
        return f"(not remembered: {path()} cannot be written: {error.strerror}; COURSE_PROGRESS may name another file)"
    return None


def reset():
    """Forget everything."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path().unlink()


def export(target, rows):
    """Write `rows`, dicts with the same keys, as a CSV file in one step."""
    with files.replacing(target) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write(done):
    text = json.dumps({"version": VERSION, "done": done}, indent=1, sort_keys=True)
    files.write_text(path(), text + "\n")
