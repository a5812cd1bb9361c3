"""What the Makefile calls: each is also `python -m course_utils.tools.<name>`."""

import argparse


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
