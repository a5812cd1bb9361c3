"""`python -m course_utils start DIR` makes a workspace of your own, `python -m course_utils lab DIR` opens it."""

import argparse
import shlex
import sys

from course_utils import lab, workspace


def main(arguments=None):
    """Do what the command line says, and show its help when that is nothing; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m course_utils", description="Squeeze & Speed Up, the course.")
    verbs = parser.add_subparsers(dest="verb", metavar="verb")
    start = verbs.add_parser("start", help="copy the notebooks into a folder of your own, or bring it up to date")
    start.add_argument("dir", metavar="DIR", help="the folder, outside the course's; what you changed in it stays")
    opened = verbs.add_parser("lab", help="open a folder of notebooks in JupyterLab")
    opened.add_argument(
        "dir", metavar="DIR", nargs="?", default=workspace.ROOT / "notebooks", help="default: the course's"
    )
    options = parser.parse_args(arguments)
    try:
        if options.verb == "start":
            print(*workspace.start(options.dir), sep="\n")
            print(f"\nOpen it: {shlex.join([sys.executable, '-m', 'course_utils', 'lab', options.dir])}")
        elif options.verb == "lab":
            lab.open_lab(options.dir)
        else:
            parser.print_help()
    except (workspace.WorkspaceError, FileNotFoundError) as error:
        print(f"{options.verb}: {error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
