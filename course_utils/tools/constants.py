"""Replace functions by constants and see whether the tests notice: `make constants`; ONLY="stats int4": some files.

    python -m course_utils.tools.constants [file ...] [--workers 2]

Two questions about a file and its tests, in a copy of the course:

- Each function in turn answers always what it answered first. Does a test fail? If not, none looks at its answers.
- All functions of the file answer None. Does every test that calls one fail? If not, it passes without what it is about.

`tests/constants.toml` lists what goes unnoticed and may, with why. Functions are not followed into processes of their own,
where all of `tools/kit_install` runs. Needs `fork`, so not Windows.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import inspect
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tomllib
import types
from concurrent.futures import ThreadPoolExecutor

from course_utils import files
from course_utils.tables import Table
from course_utils.tools import copy_checkout, mutants
from course_utils.tools.run import ROOT

KNOWN = "tests/constants.toml"
TESTS = mutants.FILES | {  # what is not named after its file
    "__main__": ("workspace",),
    "backends/__init__": ("backends", "backends_deploy", "backends_weight_only", "backends_export"),
    "backends/eager": ("backends_deploy",),
    "backends/onnxruntime": ("backends_onnxruntime", "backends_weight_only"),
    "backends/program": ("backends_onnxruntime", "backends_pt2e", "output"),
    "data": ("data", "tools_train"),
    "exercises/__init__": ("exercises", "progress", "quizzes"),
    "exercises/predictions": ("predictions", "exercises"),
    "exercises/progress": ("progress", "exercises"),
    "exercises/quizzes": ("quizzes", "exercises"),
    "smollm": ("smollm", "fuzz"),
    "tools/__init__": ("tools_rehearse", "tools_arms"),
    "tools/clean": ("tools_run",),
    "tools/compare": ("report",),
    "tools/new": ("contributing",),
    "tools/report": ("report",),
    "tools/site": ("site",),
}
PATIENCE = 60  # seconds of a core that a run may take beyond ten times those of the run in which nothing is replaced


class ConstantsError(RuntimeError):
    """Nothing could be tried; the message says why."""


def tests_of(file):
    """Return the paths of the tests of `file`, such as `"rounding/awq"`: those named after it, else after its folder."""
    folder = file.rpartition("/")[0]
    candidates = [TESTS.get(file, ()), (file.replace("/", "_"),), (folder,)]
    paths = ([f"tests/test_{name}.py" for name in names] for names in candidates)
    return next((each for each in paths if each and all((ROOT / path).exists() for path in each)), [])


def all_files():
    """Return the files of the package that have tests, as keys such as `"stats"` and `"rounding/awq"`."""
    package = ROOT / "course_utils"
    found = sorted(p.relative_to(package).with_suffix("").as_posix() for p in package.rglob("*.py"))
    return [file for file in found if tests_of(file)]


def plain(thing):
    """Return the function behind `thing`: of a property its getter, of a decorated function what was decorated, or None."""
    for inner in ("fget", "func", "__func__"):
        thing = getattr(thing, inner, thing)
    thing = inspect.unwrap(thing) if callable(thing) else None
    return thing if isinstance(thing, types.FunctionType) else None


def functions(module):
    """Return `{name: function}` of what `module` defines for others: its functions and the methods of its classes.

    What begins with an underscore is its own affair (but not `__call__`), and what a dataclass writes itself is nobody's.
    """
    found = {}
    for name, thing in vars(module).items():
        members = vars(thing) if inspect.isclass(thing) and thing.__module__ == module.__name__ else {}
        for path, each in [(name, thing), *((f"{name}.{member}", it) for member, it in members.items())]:
            function = plain(each)
            ours = function and function.__code__.co_filename == module.__file__ and function not in found.values()
            if ours and all(part == "__call__" or not part.startswith("_") for part in path.split(".")):
                found[path] = function
    return found


def _returning(*args, **kwargs):
    return stand_in(*args, **kwargs)  # noqa: F821  (replace names it)


def _yielding(*args, **kwargs):
    yield from stand_in(*args, **kwargs)  # noqa: F821


def replace(function, by):
    """Let `function(...)` be `by(original, ...)` for everybody, also for those who have imported it already.

    A generator function stays one, and yields what `by(original, ...)` iterates over. Name, signature and place in the source
    stay too: some tests read them.
    """
    was = function.__code__
    original = types.FunctionType(
        was, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    name, template = f"_stand_in_{id(function)}", _yielding if inspect.isgeneratorfunction(function) else _returning
    function.__globals__[name] = functools.partial(by, original)
    function.__signature__ = inspect.signature(function)
    function.__defaults__ = function.__kwdefaults__ = None
    # Not the function but its code is exchanged, which must then have as many free variables (`super()` is one).
    function.__code__ = template.__code__.replace(
        co_names=(name,),
        co_filename=was.co_filename,
        co_firstlineno=was.co_firstlineno,
        co_name=was.co_name,
        co_qualname=was.co_qualname,
        co_freevars=was.co_freevars,
    )


class Noted:
    """Iterate over a generator and note its items in `items`; what is thrown in, as by `with`, arrives there."""

    def __init__(self, generator):
        self.items, self._generator, self.throw, self.close = [], generator, generator.throw, generator.close

    def __iter__(self):
        return self

    def __next__(self):
        self.items.append(next(self._generator))
        return self.items[-1]


def first_answer():
    """Return a stand-in that answers always what it answered first."""
    kept = []

    def answer(original, *args, **kwargs):
        if kept:
            return kept[0].items if isinstance(kept[0], Noted) else kept[0]
        given = original(*args, **kwargs)
        kept.append(Noted(given) if inspect.isgenerator(given) else given)
        return kept[0]

    return answer


def none(original, *args, **kwargs):
    """Answer None; in place of a generator, yield it once."""
    return [None] if inspect.isgeneratorfunction(original) else None


class Watch:
    """A plugin of pytest: notes which tests passed and which failed, and while `inside` a test, who it is."""

    def __init__(self):
        self.inside, self.passed, self.failed = None, [], []

    def pytest_runtest_logstart(self, nodeid):
        self.inside = nodeid

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_configure(self, config):
        """An example that fails need not become a small one."""
        import hypothesis

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        parent = hypothesis.settings.get_profile("course")
        hypothesis.settings.register_profile("constants", parent, phases=phases, derandomize=True, database=None)
        hypothesis.settings.load_profile("constants")


def run(tests, chosen, watch, by, *, stop):
    """Run `tests` with pytest, each of the `chosen` functions replaced by what `by(name)` gives; `stop` at the first failure."""
    import pytest

    for name, function in chosen.items():
        replace(function, by(name))
    pytest.main([*tests, "-q", "-p", "no:cacheprovider", *["-x"] * stop], plugins=[watch])


def apart(job, seconds=None):
    """Return what `job()` returns in a copy of this process, silent, or None if it died or was too slow.

    seconds: of a core, and ten times as many in all, since others may be at work here too.
    """

    def work(pipe):
        import resource  # not on Windows

        with open(os.devnull, "w") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere.fileno(), stream.fileno())
            if seconds:
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
            pipe.send(job())

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    answer = None
    with contextlib.suppress(EOFError):
        answer = ours.recv() if ours.poll(10 * seconds if seconds else None) else None
    process.kill()
    process.join()
    return answer


def try_file(file):
    """Return a dict of what the tests of `file` notice.

    functions: `{name: "noticed", "unnoticed" or "no tests"}`. tests: those that call a function and pass when all give None.
    calling: how many call one. broken: those that fail although nothing is replaced, and do not count.
    """
    module = importlib.import_module(f"course_utils.{file.replace('/', '.')}".removesuffix(".__init__"))
    import pytest

    chosen, tests = functions(module), tests_of(file)
    with contextlib.redirect_stdout(sys.stderr):  # so that all is imported once, not in each copy of this process
        pytest.main([*tests, "-q", "--collect-only", "-p", "no:cacheprovider"])
    gc.freeze()  # what is there by now stays, and is shared

    def learn():
        watch, callers = Watch(), {name: {} for name in chosen}

        def noting(name):
            def note(original, *args, **kwargs):
                callers[name][watch.inside] = None
                return original(*args, **kwargs)

            return note

        run(tests, chosen, watch, noting, stop=False)
        good = [test for test in watch.passed if test not in watch.failed]
        return {n: [t for t in each if t in good] for n, each in callers.items()}, watch.failed

    def notice(tests, name=None):
        watch = Watch()
        if name:
            run(tests, {name: chosen[name]}, watch, lambda _: first_answer(), stop=True)
        else:
            run(tests, chosen, watch, lambda _: none, stop=False)
        return watch.passed, watch.failed

    learned, spent = apart(learn), sum(os.times()[2:4])  # by the copy, which has ended
    if learned is None:
        raise ConstantsError(f"The tests of {file} did not come to an end, although nothing was replaced.")
    callers, broken = learned
    patience = PATIENCE + 10 * spent
    verdicts = dict.fromkeys(chosen, "no tests")
    for name, those in callers.items():
        if those:
            outcome = apart(functools.partial(notice, those, name), patience)
            verdicts[name] = "noticed" if outcome is None or outcome[1] else "unnoticed"
    calling = list(dict.fromkeys(test for those in callers.values() for test in those))
    # Where that run comes to no end, nothing is known to fail.
    passed, failed = (apart(functools.partial(notice, calling), patience) if calling else None) or (calling, [])
    quiet = [test for test in passed if test not in failed]
    return {"functions": verdicts, "tests": quiet, "calling": len(calling), "broken": broken}


def excused(known, name, file):
    """Return why the function or test `name` may go unnoticed when `file` is tried, or None.

    known: the entries of `KNOWN`. One stands for all parameters of a test, and, unless it says `of` which, for all files.
    """
    names = {name, name.partition("[")[0]}
    return next((k["why"] for k in known if k["name"] in names and file in k.get("of", [file])), None)


def summary(found, known):
    """Return a `Table` of the files, and what goes unnoticed as `[(name, verdict, why it may or None)]`.

    found: `{file: what try_file returned}`. known: as in `excused`.
    """
    rows, quiet = [], []
    for file, each in found.items():
        names = {f"{file}.{name}": verdict for name, verdict in each["functions"].items() if verdict != "noticed"}
        names |= dict.fromkeys(each["tests"], "passes")
        quiet += [(name, verdict, excused(known, name, file)) for name, verdict in names.items()]
        n, calling = len(each["functions"]), each["calling"]
        noticed = sum(verdict == "noticed" for verdict in each["functions"].values())
        rows.append([f"{file}.py", n, noticed, calling, calling - len(each["tests"])])
    total = [sum(row[i] for row in rows) for i in range(1, 5)]
    columns = ["file", "functions", "constant one noticed", "tests that call them", "fail where all are None"]
    return Table(columns, [[str(cell) for cell in row] for row in [*rows, ["all", *total]]]), quiet


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="such as stats or rounding/awq; all that have tests by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # we are in the copy
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.files) - set(all_files()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(all_files())}")
    if chosen.here:
        print(json.dumps(try_file(chosen.files[0])))
        return 0
    folder = files.results_dir() / "constants"
    shutil.rmtree(folder, ignore_errors=True)
    copy_checkout(folder, ROOT)

    def there(file):
        command = [sys.executable, "-m", "course_utils.tools.constants", "--here", file]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ConstantsError(f"{file} could not be tried:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    names = chosen.files or all_files()
    known = tomllib.loads((ROOT / KNOWN).read_text(encoding="utf-8"))["quiet"]
    found = {}
    with ThreadPoolExecutor(chosen.workers) as pool:
        for file, each in zip(names, pool.map(there, names), strict=True):
            found[file] = each
            print(f"{file}.py", flush=True)
            for name, verdict, why in summary({file: each}, known)[1]:
                print(f"  {name}: {verdict}{f', and may: {why}' if why else ''}", flush=True)
            for test in each["broken"]:
                print(f"  {test}: fails although nothing is replaced, so it does not count", flush=True)
    table, quiet = summary(found, known)
    print(f"\n{table}")
    return any(why is None for *_, why in quiet)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConstantsError as error:
        sys.exit(str(error))
