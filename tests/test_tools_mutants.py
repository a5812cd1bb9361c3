"""`make mutants`: what is copied and drawn, what counts, and which survivors are excused."""

import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from course_utils.stats import Proportion
from course_utils.tools import mutants
from course_utils.tools.mutants import Mutant
from tests.toys import ROOT

NAME = "course_utils.stats.x_mcnemar__mutmut_{}"


def test_every_file_and_its_tests_are_there():
    for file, tests in mutants.FILES.items():
        assert (ROOT / f"course_utils/{file}.py").exists()
        assert all((ROOT / f"tests/test_{name}.py").exists() for name in tests), file


def test_a_change_belongs_to_its_file():
    assert Mutant(NAME.format(1), "killed").file == "stats"
    assert Mutant("course_utils.int4.x_pack__mutmut_3", "killed").file == "int4"
    assert Mutant("course_utils.integer.xǁIntegerModelǁrun__mutmut_1", "killed").file == "integer"
    assert Mutant("course_utils.rounding.awq.x_awq__mutmut_1", "killed").file == "rounding/awq"


def test_a_sample_is_drawn_from_each_file_and_always_the_same():
    some = [Mutant(NAME.format(i), "not checked") for i in range(50)]
    some += [Mutant(f"course_utils.affine.x_scale__mutmut_{i}", "not checked") for i in range(3)]
    drawn = mutants.drawn(some, 5)
    assert [sum(m.file == file for m in drawn) for file in ("stats", "affine")] == [5, 3]
    assert drawn == mutants.drawn(some, 5) and mutants.drawn(some, 0) == some
    last = [Mutant(f"course_utils.formats.x_layers__mutmut_{i}", "not checked") for i in range(9)]
    assert mutants.drawn([*last, *some], 5)[5:] == drawn, "whatever other files are tried"
    assert {m.name for m in drawn} != {m.name for m in some[:5] + some[50:]}, "not simply the first ones"


def test_the_summary_counts_what_was_noticed_and_leaves_out_what_makes_no_difference():
    verdicts = ["killed"] * 6 + ["timeout", "survived", "survived", "no tests"]
    tried = [Mutant(NAME.format(i), verdict) for i, verdict in enumerate(verdicts)]
    table, share = mutants.summary(tried, {tried[7].name})
    assert (share.successes, share.n) == (7, 9)
    assert table.rows == [["stats.py", "10", "7", "1", str(share)]]
    table, share = mutants.summary(tried[:2], set())
    assert (share.successes, share.n, len(table.rows)) == (2, 2, 1)


def test_a_survivor_may_if_the_list_has_its_function_and_its_very_change():
    known = [{"function": "course_utils.stats.x_mcnemar", "change": "- a\n+ b", "why": "it is the same"}]
    assert mutants.excused(known, Mutant(NAME.format(7), "survived"), "- a\n+ b") == "it is the same"
    assert mutants.excused(known, Mutant(NAME.format(7), "survived"), "- a\n+ c") is None
    assert mutants.excused(known, Mutant("course_utils.stats.x_other__mutmut_7", "survived"), "- a\n+ b") is None


def test_every_listed_survivor_says_why_and_its_line_is_still_there():
    for each in tomllib.loads((ROOT / mutants.KNOWN).read_text(encoding="utf-8"))["survivor"]:
        assert set(each) == {"function", "change", "why"} and len(each["why"]) > 10
        file = Mutant(f"{each['function']}__mutmut_1", "survived").file
        lines = {line.strip() for line in (ROOT / f"course_utils/{file}.py").read_text(encoding="utf-8").splitlines()}
        old = [line[2:] for line in each["change"].splitlines() if line.startswith("- ")]
        assert old and set(old) <= lines, f"{each['function']} has changed: look whether this is still true"


def test_an_unknown_file_is_refused(capsys):
    with pytest.raises(SystemExit):
        mutants.main(["nonsense"])
    assert "unknown: nonsense; there are: affine, " in capsys.readouterr().err


def test_the_copy_is_told_what_to_change_and_what_to_run(tmp_path):
    for chosen, tests in ((["int4", "rounding/awq", "rounding/gptq"], ["int4", "rounding"]), (["stats"], ["stats"])):
        (tmp_path / "pyproject.toml").write_text("[project]")
        mutants.configure(tmp_path, chosen)
        said = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
        assert list(said) == ["project", "tool"]
        assert said["tool"]["mutmut"]["only_mutate"] == [f"course_utils/{file}.py" for file in chosen]
        assert said["tool"]["mutmut"]["pytest_add_cli_args_test_selection"] == [f"tests/test_{t}.py" for t in tests]


@pytest.fixture
def mutmut(monkeypatch):
    """A mutmut that prints what is in `says` (by its first argument); what it was asked is in `asked`."""
    asked, says = [], {}

    def run(command, *, cwd, env, **options):
        assert command[:3] == [sys.executable, "-m", "mutmut"] and env["OMP_NUM_THREADS"] == "1"
        asked.append((cwd, *command[3:]))
        code, printed, error = says.get(command[3], (0, "", ""))
        return SimpleNamespace(returncode=code, stdout=printed, stderr=error)

    monkeypatch.setattr(mutants.subprocess, "run", run)
    return SimpleNamespace(asked=asked, says=says)


def test_what_mutmut_lists_and_shows_is_read(mutmut, tmp_path):
    assert mutants.listed(tmp_path) == [] and mutants.change(tmp_path, Mutant(NAME.format(1), "killed")) == ""
    lines = [f"    {NAME.format(1)}: killed", f"    {NAME.format(2)}: not checked", "something else: killed"]
    mutmut.says["results"] = (0, "\n".join(lines), "")
    one, two = mutants.listed(tmp_path)
    assert (one, two) == (Mutant(NAME.format(1), "killed"), Mutant(NAME.format(2), "not checked"))
    shown = "# what it is\n--- stats.py\n+++ stats.py\n@@ -1,3 +1,3 @@\n def f(a):\n-    return a\n+    return not a\n"
    mutmut.says["show"] = (0, shown, "")
    assert mutants.change(tmp_path, two) == "- return a\n+ return not a"
    assert mutmut.asked[-1] == (tmp_path, "show", NAME.format(2))
    mutmut.says["run"] = (1, "", "nothing matches none of them")
    assert mutants.mutmut(tmp_path, "run", "none of them") == ""
    mutmut.says["run"] = (1, "half-way", "out of memory")
    with pytest.raises(mutants.MutantsError, match="mutmut run failed:\nhalf-wayout of memory"):
        mutants.mutmut(tmp_path, "run")


@pytest.mark.parametrize("survivors", [1, 2])
def test_the_command_fails_when_fewer_are_noticed_than_asked(mutmut, tmp_path, monkeypatch, capsys, survivors):
    """Of ten changes some survive, and one of those that do may."""
    known = tomllib.loads((ROOT / mutants.KNOWN).read_text(encoding="utf-8"))["survivor"][0]
    names = [f"{known['function']}__mutmut_{number}" for number in range(10)]
    verdicts = ["survived"] * (1 + survivors) + ["killed"] * (9 - survivors)
    listed = "\n".join(f"  {name}: {verdict}" for name, verdict in zip(names, verdicts, strict=True))
    mutmut.says["results"] = (0, listed, "")
    changes = {names[0]: known["change"]}
    monkeypatch.setattr(mutants, "change", lambda folder, mutant: changes.get(mutant.name, "- a\n+ b"))
    monkeypatch.setattr(mutants, "copy_checkout", lambda folder, root: folder.mkdir())
    monkeypatch.setattr(mutants, "configure", lambda folder, chosen: (folder / "chosen").write_text(" ".join(chosen)))
    monkeypatch.setattr(mutants.files, "results_dir", lambda: tmp_path)
    file = Mutant(names[0], "").file
    assert mutants.main([file, "--sample", "0", "--workers", "3"]) == (survivors == 2)
    said = capsys.readouterr().out
    assert f"{names[0]}: survived, and may: {known['why']}" in said and f"{names[1]}: survived\n- a\n+ b" in said
    assert f"noticed: {Proportion(9 - survivors, 9)}; asked: 85%" in said
    folder = tmp_path / "mutants"
    assert (folder / "chosen").read_text() == file
    assert (folder, "run", "--max-children", "3", *names) in mutmut.asked


def test_without_mutmut_it_says_so(tmp_path):
    command = [sys.executable, "-c", "from course_utils.tools import mutants; mutants.mutmut('.', 'results')"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode and "MutantsError: mutmut results failed:" in run.stderr
