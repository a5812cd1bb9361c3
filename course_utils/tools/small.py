"""Run a command as on a small machine: `make small`, or `python -m course_utils.tools.small command ...`.

One core, and 2 GiB of memory for the command and all that it starts: a real limit of Linux' control groups, swap included. Who
may not make a group (that needs root) can have the same from systemd:

    systemd-run --user --scope -p MemoryMax=2G -p MemorySwapMax=0 taskset -c 0 make run-all
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 2 * 2**30
GROUPS = Path("/sys/fs/cgroup")
# By the folder of memory's groups in the two versions: the files of the limit, and of the one on swap or with swap.
FILES = {"memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), "": ("memory.max", "memory.swap.max")}


@contextlib.contextmanager
def limited(limit=LIMIT):
    """Make a control group of at most `limit` bytes, and yield its folder.

    Raises `OSError` where the system has no such groups, or does not let us make one.
    """
    version = "memory" if (GROUPS / "memory").is_dir() else ""
    most, swap = FILES[version]
    folder = GROUPS / version / f"course-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / most).write_text(str(limit))
        with contextlib.suppress(OSError):  # a kernel that does not count swap
            (folder / swap).write_text(str(limit if version else 0))
        yield folder
    finally:
        _remove(folder)


def _remove(folder):
    # A group goes when it is empty: what the command started and left behind may take a moment to end, or go on.
    for _ in range(20):
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(0.05)


def main(command=None):
    """Run the command of the command line (or `command`, a list) and return its exit code.

    Returns 2 where no limit can be set, and 127, as a shell does, for a command that cannot be started.
    """
    command = sys.argv[1:] if command is None else command
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(limited())
        except OSError as error:
            return _unlimited(error)

        def enter():
            (folder / "cgroup.procs").write_text(str(os.getpid()))
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        try:
            return subprocess.run(command, preexec_fn=enter).returncode
        except subprocess.SubprocessError as error:  # of `enter`: the group takes nobody in
            return _unlimited(error)
        except OSError as error:
            print(f"{command[0]} cannot be started: {error}", file=sys.stderr)
            return 127


def _unlimited(error):
    print(
        f"No limit could be set here ({error}). As another user:\n{__doc__.partition('systemd:')[2]}", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
