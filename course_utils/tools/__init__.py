"""What the Makefile calls: each is also `python -m course_utils.tools.<name>`."""

import argparse
import shutil
import subprocess


def names_from_command_line(doc, known, what):
    """Return the names given on the command line, all of `known` if there are none; stop at one that is unknown.

    doc: the tool's docstring, whose first line `--help` shows. what: is done with them, for `--help`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="model", help=f"{what} (default: {' '.join(known)})")
    names = parser.parse_args().names or list(known)
    for name in names:
        if name not in known:
            parser.error(f"unknown model {name!r}: choose from {', '.join(known)}")
    return names


def copy_checkout(folder, root):
    """Copy the files of the checkout `root` that git has or would take, as they are now, into `folder` (both `Path`s).

    Raises `OSError` where there is no git, `subprocess.CalledProcessError` where `root` is no clone.
    """
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
