"""The drift alarm: toy notebooks that break in every way, and what is said about each."""

import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_output

from course_utils.tools import drift
from tests.toys import ROOT, edit, write_notebook

LIMIT = 3  # seconds for a cell
OLD, NEW, NEWER = (
    {"python": "3.11.7", "torch": v, "attrs": a} for v, a in (("2.14.1", "1"), ("2.15.0", "1"), ("2.16.0", "2"))
)


def committed(path, source, printed=""):
    """A notebook with a cell that prints 1, and one with `source` that is stored with `printed` as its output."""
    write_notebook(path, "print(1)", source)

    def run(notebook):
        for count, (cell, text) in enumerate(zip(notebook.cells[1:], ("1\n", printed), strict=True), start=1):
            cell.execution_count = count
            cell.outputs = [new_output("stream", name="stdout", text=text)] if text else []

    edit(path, run)
    return path


def compare(folder, report):
    """Let nbval report on the notebooks of `folder` as `make drift` does, with another limit."""
    options = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={LIMIT}", "--color=no", f"--junitxml={report}"]
    options += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval_sanitize.cfg"), "--rootdir", str(folder)]
    plugins = ["-p", "tests.nbval_plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, *plugins, str(folder)]
    subprocess.run(command, capture_output=True, timeout=120, cwd=ROOT)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The folder of the report on one good and four broken notebooks, and what `drift` returned."""
    folder = tmp_path_factory.mktemp("notebooks")
    committed(folder / "00_fine.ipynb", "print(2)", "2\n")
    committed(folder / "01_missing.ipynb", "import no_such_package")
    committed(folder / "02_slow.ipynb", "import time; time.sleep(60)")
    committed(folder / "03_killed.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    committed(folder / "04_changed.ipynb", "print(0.25)", "0.5\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = tmp_path_factory.mktemp("drift") / "newest.xml"
    compare(folder, report)
    code = drift.drift(report, folder, timeout=LIMIT, today="2026-11-26")
    assert {path.name: path.read_bytes() for path in folder.glob("*.ipynb")} == before
    return report.parent, code


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_each_cause_is_named_with_its_cell(broken):
    folder, code = broken
    assert code == 1
    lines = (folder / "newest.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| 0")]
    assert [row[:2] for row in rows] == [
        ["00_fine", "good"],
        ["01_missing", "dependency"],
        ["02_slow", "time-out"],
        ["03_killed", "memory"],
        ["04_changed", "changed output"],
    ]
    assert rows[1][2] == "cell 2/2: ModuleNotFoundError: No module named 'no_such_package'"
    assert rows[2][2] == f"cell 2/2: TimeoutError: it ran for more than {LIMIT} s."
    assert rows[3][2].startswith("cell 2/2: the kernel died: killed by SIGKILL")
    assert rows[4][2].startswith("cell 2: Cell outputs differ")
    assert "4 of 5 notebooks broke" in "\n".join(lines)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_the_evidence_is_in_the_summary(broken):
    summary = (broken[0] / "newest.md").read_text()
    changed = summary.partition("## 04_changed")[2]
    assert "0.25" in changed and "0.5" in changed
    assert "\x1b" not in summary


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_the_record_tells_good_from_broken(broken):
    record = json.loads((broken[0] / "newest.json").read_text())
    assert {name: list(known) for name, known in record.items()} == {
        "00_fine": ["good"],
        **dict.fromkeys(("01_missing", "02_slow", "03_killed", "04_changed"), ["broken"]),
    }
    assert record["00_fine"]["good"]["date"] == "2026-11-26"
    assert record["00_fine"]["good"]["versions"].keys() >= {"python", "nbval", "pytest"}


@pytest.fixture
def alarm(tmp_path, monkeypatch, capsys):
    """Judge a notebook on given versions, with what nbval would have said of it; return the summary."""
    committed(tmp_path / "notebooks" / "00_toy.ipynb", "print(2)", "2\n")

    def judge(today, versions, said=None):
        suite = ET.Element("testsuite")
        case = ET.SubElement(suite, "testcase", classname="x.00_toy.ipynb", name="Cell 1")
        if said:
            ET.SubElement(
                case, "failure"
            ).text = f"Notebook cell execution failed\nCell 1: {said}\n\nInput:\nprint(2)\n"
        ET.ElementTree(suite).write(tmp_path / "newest.xml")
        monkeypatch.setattr(drift, "versions", lambda: versions)
        code = drift.drift(tmp_path / "newest.xml", tmp_path / "notebooks", today=today)
        assert code == (1 if said else 0)
        return capsys.readouterr().out

    return judge


def test_versions_that_changed_since_the_last_good_run_stand_beside_a_broken_notebook(alarm):
    alarm("2026-11-20", OLD)
    text = alarm("2026-11-23", NEW, drift.DIFFER)
    assert "Broken since 2026-11-23, last good on 2026-11-20. In between these versions changed:" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == ["- torch 2.14.1 → 2.15.0"]


def test_what_stays_broken_is_broken_since_the_first_time(alarm):
    alarm("2026-11-20", OLD)
    alarm("2026-11-23", NEW, drift.DIFFER)
    text = alarm("2026-11-26", NEWER, drift.DIFFER)
    assert "Broken since 2026-11-23" in text and "torch 2.14.1 → 2.15.0" in text and "torch 2.16.0." in text
    assert "attrs" not in text


def test_another_cause_is_another_beginning(alarm, monkeypatch):
    alarm("2026-11-20", OLD)
    alarm("2026-11-23", NEW, drift.DIFFER)
    monkeypatch.setattr(drift, "_run_again", lambda path, timeout: "cell 2/2: ImportError: gone")
    text = alarm("2026-11-26", NEWER, "Cell execution caused an exception")
    assert "## 00_toy: dependency" in text and "Broken since 2026-11-26, last good on 2026-11-20" in text
    assert [line for line in text.splitlines() if line.startswith("- ")] == ["- torch 2.14.1 → 2.16.0", "- attrs 1 → 2"]


def test_a_good_run_ends_the_alarm_and_becomes_the_last_good_one(alarm):
    alarm("2026-11-20", OLD)
    alarm("2026-11-23", NEW, drift.DIFFER)
    assert "0 of 1 notebooks broke" in alarm("2026-11-24", NEW)
    text = alarm("2026-11-26", NEWER, drift.DIFFER)
    assert "last good on 2026-11-24" in text and "torch 2.15.0 → 2.16.0" in text


def test_without_a_record_the_lock_files_are_what_was_good(alarm):
    (torch,) = [
        line for line in (ROOT / "requirements-torch.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    text = alarm("2026-11-26", {"torch": "99.0", "of-no-lock": "1"}, drift.DIFFER)
    assert f"last good with the lock files. In between these versions changed:\n\n- torch {torch[7:]} → 99.0" in text
    assert "of-no-lock" not in text


def test_same_versions_are_said_to_be_innocent(alarm):
    alarm("2026-11-20", OLD)
    assert "with the same versions: it is not they" in alarm("2026-11-23", OLD, drift.DIFFER)


def test_an_error_that_does_not_come_back_is_named_with_nbvals_words(alarm):
    text = alarm("2026-11-20", OLD, "Cell execution caused an exception")
    assert "| 00_toy | error | cell 2: Cell execution caused an exception; it passed when run again |" in text


def test_notebooks_that_the_tests_did_not_reach_are_run(tmp_path):
    committed(tmp_path / "notebooks" / "00_missing.ipynb", "import no_such_package")
    assert drift.drift(tmp_path / "nightly.xml", tmp_path / "notebooks") == 1
    assert "| 00_missing | dependency | cell 2/2: ModuleNotFoundError" in (tmp_path / "nightly.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("newest.json", '{"00_toy": {"good": {}}}', "is no record of good versions"),
        ("newest.json", '{"00_toy": {"good": {"versions": 1}}}', "is no record of good versions"),
        ("newest.json", "[", "is no record of good versions"),
        ("newest.xml", "<testsuite>", "is no report of pytest's"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_kept(tmp_path, capsys, name, content, message):
    committed(tmp_path / "notebooks" / "00_toy.ipynb", "print(2)", "2\n")
    (tmp_path / "newest.xml").write_text("<testsuite/>")
    (tmp_path / name).write_text(content)
    assert drift.drift(tmp_path / "newest.xml", tmp_path / "notebooks") == 2
    said = capsys.readouterr().err
    assert name in said and message in said
    assert (tmp_path / name).read_text() == content
    assert not (tmp_path / "newest.md").exists()


def test_the_command_ends_with_the_code_of_its_judgement(monkeypatch):
    judged = []
    monkeypatch.setattr(drift, "drift", lambda report: judged.append(report) or len(judged) - 1)
    assert [drift.main([name]) for name in ("newest.xml", "nightly.xml")] == [0, 1]
    assert judged == [Path("newest.xml"), Path("nightly.xml")]


def test_no_notebooks_is_said(tmp_path, capsys):
    assert drift.drift(tmp_path / "newest.xml", tmp_path) == 2
    assert "no notebooks" in capsys.readouterr().err


def test_versions_have_no_local_part_and_names_one_spelling(monkeypatch):
    installed = [SimpleNamespace(metadata={"Name": "Torch_Vision"}, version="0.29.1.dev1+cpu")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: installed)
    assert drift.versions() == {"torch-vision": "0.29.1.dev1", "python": platform.python_version()}


def test_the_alarm_works_where_torch_does_not():
    program = "import sys; sys.modules['torch'] = None; import course_utils.tools.drift"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
