"""Change the code in small ways and see whether the tests notice: `make mutants`; ONLY=stats: one file, SAMPLE=0: every change.

    python -m course_utils.tools.mutants [file ...] [--sample 40]

mutmut makes the changes, another operator, number, word or branch each, in a copy of the course. A change that no test notices is
a survivor: a test is missing, or the change makes no difference, and then `tests/mutants.toml` says why. Of each file a sample is
tried, drawn at random, so the share that was noticed comes with its interval.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass

from course_utils import files
from course_utils.stats import Proportion
from course_utils.tables import Table
from course_utils.tools import copy_checkout
from course_utils.tools.run import ROOT

# What is changed → the tests that have to notice.
FILES = {
    "affine": ("affine",),
    "exercises/checking": ("exercises",),
    "exercises/compare": ("exercises",),
    "exercises/exercise": ("exercises", "progress"),
    "formats": ("formats",),
    "int4": ("int4",),
    "integer": ("integer",),
    "observers": ("observers",),
    "rounding/adaround": ("rounding",),
    "rounding/awq": ("rounding",),
    "rounding/bias": ("rounding",),
    "rounding/equalization": ("rounding",),
    "rounding/gptq": ("rounding",),
    "rounding/walk": ("rounding",),
    "stats": ("stats",),
}
KNOWN = "tests/mutants.toml"
LEAST = 0.85  # of the changes have to be noticed
NOTICED = {"killed", "timeout", "segfault", "suspicious"}  # a test that crashes or never ends is one that notices


@dataclass(frozen=True)
class Mutant:
    """One change: mutmut's `name` for it and the `verdict` of the tests, `"killed"`, `"survived"`, `"no tests"`, …"""

    name: str
    verdict: str

    @property
    def file(self):
        """The key of `FILES` it belongs to."""
        return next(file for file in FILES if self.name.startswith(f"course_utils.{file.replace('/', '.')}."))


class MutantsError(RuntimeError):
    """Nothing could be tried; the message says why."""


def configure(folder, chosen):
    """Say in the copy's pyproject.toml what mutmut shall change, and which tests it shall run."""
    tests = dict.fromkeys(f"tests/test_{name}.py" for file in chosen for name in FILES[file])
    lines = [
        "[tool.mutmut]",
        'source_paths = ["course_utils"]',
        f"only_mutate = {[f'course_utils/{file}.py' for file in chosen]}",
        'also_copy = ["data", "notebooks", "README.md", "Makefile"]',
        'process_isolation = "forkserver"',  # torch's threads do not survive a fork
        f"pytest_add_cli_args_test_selection = {list(tests)}",
        'pytest_add_cli_args = ["-x", "-p", "no:cacheprovider"]',
    ]
    with open(folder / "pyproject.toml", "a", encoding="utf-8") as file:
        file.write("\n" + "\n".join(lines) + "\n")


def mutmut(folder, *arguments):
    """Run mutmut in the copy and return what it printed; its own messages go to the screen only if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    # "Nothing matches" is how it is asked to make all changes and try none.
    if run.returncode and "nothing matches" not in run.stderr:
        raise MutantsError(f"mutmut {arguments[0]} failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout


def listed(folder):
    """Return all `Mutant`s of the copy."""
    found = re.findall(r"^ +(course_utils\S+): (.+)$", mutmut(folder, "results", "--all", "true"), re.M)
    return [Mutant(name, verdict) for name, verdict in found]


def drawn(mutants, sample, seed=0):
    """Return at most `sample` of the `mutants` of each file, drawn at random, or all of them if it is 0.

    Of a file they are the same whatever other files are tried.
    """
    by_file = {}
    for mutant in mutants:
        by_file.setdefault(mutant.file, []).append(mutant)
    chosen = []
    for file, each in by_file.items():
        few = 0 < sample < len(each)
        chosen += random.Random(f"{seed} {file}").sample(each, sample) if few else each
    return chosen


def change(folder, mutant):
    """Return the change as `"- old line\\n+ new line"`."""
    lines = mutmut(folder, "show", mutant.name).splitlines()
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in lines if re.match(r"[-+](?![-+]{2} )", line))


def excused(known, mutant, text):
    """Return why it is all right that this change survives, or None."""
    function = re.sub(r"__mutmut_\d+$", "", mutant.name)
    return next((k["why"] for k in known if k["function"] == function and k["change"] == text), None)


def summary(mutants, excuses):
    """Return a `Table` of the files and the `Proportion` of all changes that the tests noticed or need not notice."""
    rows, all_in_all = [], [0, 0]
    for file in dict.fromkeys(m.file for m in mutants):
        these = [m for m in mutants if m.file == file]
        noticed, fine = sum(m.verdict in NOTICED for m in these), sum(m.name in excuses for m in these)
        all_in_all = [all_in_all[0] + noticed, all_in_all[1] + len(these) - fine]
        share = Proportion(noticed, len(these) - fine) if len(these) > fine else "–"
        rows.append([f"{file}.py", len(these), noticed, fine, share])
    columns = ["file", "changes tried", "noticed", "make no difference", "noticed, of the others"]
    return Table(columns, [[str(cell) for cell in row] for row in rows]), Proportion(*all_in_all)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(FILES)}; all by default")
    parser.add_argument("--sample", type=int, default=40, help="changes of each file, 0 for all (default 40)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.files) - set(FILES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(FILES)}")
    folder = files.results_dir() / "mutants"
    shutil.rmtree(folder, ignore_errors=True)
    copy_checkout(folder, ROOT)
    configure(folder, chosen.files or list(FILES))
    mutmut(folder, "run", "none of them")  # makes the changes and learns which tests run which function
    names = [m.name for m in drawn(listed(folder), chosen.sample)]
    print(f"{len(names)} changes are being tried, a second or two each", flush=True)
    mutmut(folder, "run", "--max-children", str(chosen.workers), *names)
    tried = [m for m in listed(folder) if m.name in set(names)]

    known = tomllib.loads((ROOT / KNOWN).read_text(encoding="utf-8"))["survivor"]
    excuses = {}
    for mutant in [m for m in tried if m.verdict not in NOTICED]:
        text = change(folder, mutant)
        excuses[mutant.name] = excused(known, mutant, text)
        print(
            f"\n{mutant.name}: {mutant.verdict}{f', and may: {excuses[mutant.name]}' if excuses[mutant.name] else ''}\n{text}"
        )
    table, share = summary(tried, {name for name, why in excuses.items() if why})
    print(f"\n{table}\n\nnoticed: {share}; asked: {LEAST:.0%}")
    return share.value < LEAST


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutantsError as error:
        sys.exit(str(error))
