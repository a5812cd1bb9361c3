"""Lay the reports of several machines side by side: `make compare`, or `python -m course_utils.tools.compare [FILE.json ...]`.

Without files: your own (`make report`), those that you collected in results/reports, and those that come with the course. The
result goes to results/compare.md and results/compare.html.
"""

import argparse
import sys
from pathlib import Path

from course_utils import files, report


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m course_utils.tools.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("reports", nargs="*", type=Path, help="report.json of each machine, under a name of its own")
    paths = parser.parse_args(arguments).reports
    own, folder = files.results_dir() / "report" / "report.json", files.results_dir() / "reports"
    if not paths:
        paths = [path for place in (folder, files.data_dir() / "reports") for path in sorted(place.glob("*.json"))]
        paths = [own, *paths] if own.exists() else paths
    if len({path.stem for path in paths}) < len(paths):  # most are called report.json, each in a folder of its own
        labels = [path.parent.name for path in paths]
    else:
        labels = ["this machine" if path == own else path.stem for path in paths]
    try:
        if len(set(labels)) < len(labels):
            raise report.ReportError(
                "two reports have the same name: rename one file, its name is the title of its column"
            )
        text = report.compare({label: report.read(path) for label, path in zip(labels, paths, strict=True)})
    except report.ReportError as error:
        print(
            f"{error}\nMake yours with `make report`, and collect those of other machines in {folder}, each under a name of its "
            "own.",
            file=sys.stderr,
        )
        return 2
    for kind, content in (("md", text), ("html", report.html(text))):
        path = files.results_dir() / f"compare.{kind}"
        files.write_text(path, content)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
