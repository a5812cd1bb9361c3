"""`make constants`: what is replaced, by what, and what counts as noticed."""

import contextlib
import functools
import inspect
import json
import os
import subprocess
import sys
import time
import tomllib
import types

import pytest

from course_utils import exercises
from course_utils.tools import constants
from tests.toys import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="make constants needs fork")

SOURCE = '''
import contextlib, dataclasses, functools

def double(x, times=2):
    """Twice."""
    return times * x

def count(n):
    yield from range(n)

@contextlib.contextmanager
def noted(entries, entry):
    entries.append(entry)
    try:
        yield entry
    finally:
        entries.append(-entry)

@functools.cache
def cached(x):
    return x + 1

def _private(x):
    return x

@dataclasses.dataclass
class Point:
    x: int

    @property
    def twice(self):
        return double(self.x)

    @classmethod
    def at(cls, x):
        return cls(x)

    def __call__(self):
        return self.x

class Named(Point):
    def at_home(self):
        return super().at(self.x).x
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "replaced.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import replaced

    yield replaced
    del sys.modules["replaced"]


def replaced(module, name, by=None):
    constants.replace(constants.functions(module)[name], by or constants.first_answer())


def test_what_a_module_defines_for_others_is_found(module):
    found = ["double", "count", "noted", "cached", "Point.twice", "Point.at", "Point.__call__", "Named.at_home"]
    assert list(constants.functions(module)) == found
    assert all(isinstance(f, types.FunctionType) for f in constants.functions(module).values())


def test_a_function_answers_what_it_answered_first_also_for_those_who_had_it(module):
    double = module.double
    signature, lines = inspect.signature(double), inspect.getsourcelines(double)
    replaced(module, "double")
    assert (double(4), double(5, times=9), module.double(6), module.Point(7).twice) == (8, 8, 8, 8)
    assert (inspect.signature(double), inspect.getsourcelines(double)) == (signature, lines)
    assert (double.__name__, double.__doc__) == ("double", "Twice.")


def test_defaults_arrive_at_the_first_answer(module):
    replaced(module, "double")
    assert module.double(times=5, x=1) == 5


@pytest.mark.parametrize(
    "name, ask",
    [
        ("Point.twice", lambda module, x: module.Point(x).twice),
        ("Point.at", lambda module, x: module.Point.at(x).x),
        ("Point.__call__", lambda module, x: module.Point(x)()),
        ("Named.at_home", lambda module, x: module.Named(x).at_home()),
        ("cached", lambda module, x: module.cached(x)),
        ("count", lambda module, x: list(module.count(x))),
    ],
)
def test_methods_generators_and_what_is_decorated_too(module, name, ask):
    first, second = ask(module, 3), ask(module, 4)
    assert first != second
    if name == "cached":
        module.cached.cache_clear()
    replaced(module, name)
    assert ask(module, 3) == ask(module, 4) == first


def test_with_a_constant_the_first_with_is_whole_and_the_next_does_nothing(module):
    entries = []
    replaced(module, "noted")
    with contextlib.suppress(LookupError), module.noted(entries, 1) as one:
        raise LookupError
    with module.noted(entries, 2) as two:
        assert entries == [1, -1]
    assert (one, two, entries) == (1, 1, [1, -1])


def test_none_is_the_answer_of_all(module):
    for name in constants.functions(module):
        replaced(module, name, constants.none)
    assert module.double(2) is module.Point(1).twice is module.Named(1).at_home() is None
    assert list(module.count(5)) == [None]
    with module.noted([], 1) as one:
        assert one is None


def test_a_job_apart_gives_its_answer_or_none_when_it_dies_or_never_ends():
    assert constants.apart(lambda: ("noticed", 7)) == ("noticed", 7)
    assert constants.apart(functools.partial(sys.exit, 3)) is None
    assert constants.apart(functools.partial(time.sleep, 600), 0.1) is None
    assert constants.apart(lambda: all(iter(lambda: True, False)), 0.5) is None, "busy for ever"


def test_each_file_has_the_tests_named_after_it_or_its_folder():
    assert constants.tests_of("stats") == ["tests/test_stats.py"]
    assert constants.tests_of("rounding/awq") == constants.tests_of("rounding/walk") == ["tests/test_rounding.py"]
    assert constants.tests_of("tools/run") == ["tests/test_tools_run.py"]
    assert constants.tests_of("exercises/exercise") == ["tests/test_exercises.py", "tests/test_progress.py"]
    assert set(constants.TESTS) <= set(constants.all_files()), "they are all there"
    assert {"affine", "backends/onnxruntime", "widgets/bits"} <= set(constants.all_files())


PLANTED = """
from course_utils import planted

def test_that_looks():
    assert [planted.square(x) for x in (2, 3)] == [4, 9]

def test_that_only_calls():
    planted.square(2), planted.cube(2), planted.cube(3)

def test_that_asks_once():
    assert planted.once(3) == 4

def test_that_is_wrong():
    assert planted.square(2) == 5

def test_of_something_else():
    pass
"""


def test_a_file_is_tried_and_the_planted_weak_tests_are_found(tmp_path):
    functions = {"square": "x * x", "cube": "x**3", "once": "x + 1", "nobody": "x"}
    sources = {
        "pytest.ini": "[pytest]",
        "tests/conftest.py": "import hypothesis\nhypothesis.settings.register_profile('course')",
        "tests/test_planted.py": PLANTED,
        "more/planted.py": "\n".join(f"def {name}(x): return {value}" for name, value in functions.items()),
        "try.py": "import json, pathlib, course_utils\n"
        "course_utils.__path__.append('more')\n"
        "from course_utils.tools import constants\n"
        "constants.ROOT = pathlib.Path('.')\n"
        "print(json.dumps(constants.try_file('planted')))",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "try.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == {
        "functions": {"square": "noticed", "cube": "unnoticed", "once": "unnoticed", "nobody": "no tests"},
        "tests": ["tests/test_planted.py::test_that_only_calls"],
        "calling": 3,
        "broken": ["tests/test_planted.py::test_that_is_wrong"],
    }


def test_what_is_tried_is_the_package_itself_not_a_copy_of_its_first_file(monkeypatch):
    tried = []
    monkeypatch.setattr(constants, "functions", lambda module: tried.append(module) or {})
    monkeypatch.setattr(constants, "tests_of", lambda file: ["tests/test_tables.py"])
    monkeypatch.setattr(constants, "apart", lambda job, seconds=None: ({}, []))
    monkeypatch.setattr(constants.gc, "freeze", lambda: None)
    constants.try_file("exercises/__init__")
    assert tried == [exercises]


def test_the_summary_counts_and_says_what_may_be_quiet():
    found = {
        "stats": {"functions": {"mean": "noticed", "name": "unnoticed"}, "tests": ["t.py::a[1]"], "calling": 9},
        "int4": {"functions": {"pack": "no tests"}, "tests": [], "calling": 1},
    }
    known = [
        {"name": "stats.name", "why": "it has but one"},
        {"name": "t.py::a", "of": ["int4", "stats"], "why": "it is about silence"},
        {"name": "int4.pack", "of": ["stats"], "why": "not of this file"},
    ]
    table, quiet = constants.summary(found, known)
    assert table.rows == [
        ["stats.py", "2", "1", "9", "8"],
        ["int4.py", "1", "0", "1", "1"],
        ["all", "3", "1", "10", "9"],
    ]
    assert constants.summary({}, known)[1] == [] and constants.summary({}, known)[0].rows == [
        ["all", "0", "0", "0", "0"]
    ]
    assert quiet == [
        ("stats.name", "unnoticed", "it has but one"),
        ("t.py::a[1]", "passes", "it is about silence"),
        ("int4.pack", "no tests", None),
    ]


def test_what_may_be_quiet_is_still_there_and_says_why():
    known = tomllib.loads((ROOT / constants.KNOWN).read_text(encoding="utf-8"))["quiet"]
    for entry in known:
        name, why = entry["name"], entry["why"]
        assert set(entry.get("of", ())) <= set(constants.all_files()), name
        path, *within = name.split("::")
        file, _, function = name.partition(".")
        paths = [path, *["tests/engines.py"][: len(within) - 1]] if within else [f"course_utils/{file}.py"]
        text = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)  # of a class, also what it inherits
        assert f"def {within[-1] if within else function.rpartition('.')[2]}(" in text, name
        assert len(why) > 10, name


def test_the_files_are_those_of_the_package_that_have_tests(tmp_path, monkeypatch):
    assert len(constants.all_files()) > 80
    for name in ("course_utils/a.py", "course_utils/b.py", "course_utils/c/d.py", "tests/test_a.py", "tests/test_c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(constants, "ROOT", tmp_path)
    assert constants.all_files() == ["a", "c/d"]


NOTICED = {"functions": {"mean": "noticed"}, "tests": [], "calling": 3, "broken": []}
MAY = NOTICED | {"functions": {"every": "unnoticed"}}
QUIET = NOTICED | {"functions": {"pack": "unnoticed"}, "broken": ["tests/test_int4.py::test_b"]}


@pytest.mark.parametrize(("last", "code"), [(NOTICED, 0), (MAY, 0), (QUIET, 1), (None, None)])
def test_the_command_tries_each_file_in_a_copy_and_fails_when_something_goes_unnoticed(
    tmp_path, monkeypatch, capsys, last, code
):
    file = "exercises/quizzes" if last is MAY else "int4"
    answers = {"stats": NOTICED, file: last}

    def run(command, *, cwd, **options):
        assert cwd == tmp_path / "constants" and cwd.is_dir() and command[-2] == "--here"
        answer = answers[command[-1]]
        return types.SimpleNamespace(returncode=answer is None, stdout=json.dumps(answer), stderr="the reason")

    monkeypatch.setattr(constants.files, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(constants, "copy_checkout", lambda folder, root: folder.mkdir())
    monkeypatch.setattr(constants.subprocess, "run", run)
    if last is None:
        with pytest.raises(constants.ConstantsError, match="int4 could not be tried:\nthe reason"):
            constants.main(["stats", file])
        return
    assert constants.main(["stats", file]) == code
    said = capsys.readouterr().out
    assert said.startswith(f"stats.py\n{file}.py\n")
    assert (
        ("int4.pack: unnoticed\n" in said) == ("test_b: fails although nothing is replaced" in said) == (last is QUIET)
    )
    assert ("exercises/quizzes.every: unnoticed, and may: it always is the same" in said) == (last is MAY)


def test_what_is_tried_here_is_told_as_json(monkeypatch, capsys):
    monkeypatch.setattr(constants, "try_file", lambda file: {"functions": file})
    for file in ("stats", "int4"):
        assert constants.main(["--here", file]) == 0
        assert json.loads(capsys.readouterr().out) == {"functions": file}


def test_an_unknown_file_is_refused(capsys):
    with pytest.raises(SystemExit):
        constants.main(["nonsense"])
    assert "unknown: nonsense; there are: __main__, affine, " in capsys.readouterr().err
