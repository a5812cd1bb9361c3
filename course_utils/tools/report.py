"""Measure this machine and write its report to results/report: `make report`, or `python -m course_utils.tools.report [--fast]`."""

import argparse

from course_utils import files, report

FAST = {"rounds": 5, "test_images": 200, "repeats": 3}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m course_utils.tools.report", description="Report on this machine.")
    parser.add_argument("--fast", action="store_true", help="few rounds and images: to see what a report looks like")
    options = parser.parse_args(arguments)
    content = report.measure_machine(**FAST if options.fast else {}, progress=lambda text: print(text, flush=True))
    for path in report.write(content, files.results_dir() / "report"):
        print(path)


if __name__ == "__main__":
    main()
