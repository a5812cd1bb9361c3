"""What notebooks need is read off what the runner prints, whole or not at all."""

import json

import pytest

from course_utils import cpu, launch
from course_utils.tools import needs
from course_utils.tools.run import run
from tests.toys import edit, write_notebook

LOG = """\
00_toy    cell 1/3     1.2 s    500 MiB
00_toy    cell 2/3    60.4 s   1200 MiB
00_toy    cell 3/3     0.1 s    900 MiB
01_toy    cell 1/3     9.0 s    100 MiB
"""


@pytest.fixture
def notebooks(tmp_path):
    """Two notebooks with three cells each, under two headings."""
    for name in ("00_toy", "01_toy"):
        path = write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "print(1)", "print(2)", "print(3)")
        edit(path, lambda notebook: notebook.cells[0].update(source="# A toy\n\n## First\n"))
        edit(path, lambda notebook: notebook.cells.insert(2, needs.nbformat.v4.new_markdown_cell("### 2. The peak")))
    return tmp_path / "notebooks"


def test_the_highest_cell_gives_memory_and_section_and_all_give_the_time(notebooks):
    assert needs.needs(LOG, notebooks) == {
        "00_toy": {"memory_mib": 1200, "section": "2. The peak", "seconds": 62, "cores": cpu.cores()}
    }


def test_a_notebook_with_other_cells_than_the_log_is_left_out(notebooks):
    edit(notebooks / "00_toy.ipynb", lambda notebook: notebook.cells.pop())
    assert needs.needs(LOG, notebooks) == {}


def test_what_the_runner_prints_is_understood(notebooks, capsys, tmp_path):
    assert run(notebooks, only=["01"], ledger=tmp_path / "ledger.json") == 0
    printed = capsys.readouterr().out
    if " - MiB" in printed:
        pytest.skip("this system does not tell the peak of a process")
    (found,) = needs.needs(printed, notebooks).values()
    assert 10 < found["memory_mib"] < 500


def test_a_record_replaces_what_it_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / launch.NEEDS
    needs.record({"01": {"memory_mib": 1}, "00": {"memory_mib": 2}}, path)
    needs.record({"01": {"memory_mib": 3}}, path)
    notebooks = json.loads(path.read_text())["notebooks"]
    assert [(name, need["memory_mib"]) for name, need in notebooks.items()] == [("00", 2), ("01", 3)]
    assert all({"cpu", "memory_gib", "date"} <= need.keys() for need in notebooks.values())


def test_a_log_of_nothing_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "log.txt").write_text("No notebook begins with '09'.\n")
    assert needs.main([str(tmp_path / "log.txt")]) == 1
    assert "nothing was recorded" in capsys.readouterr().err
    assert not (tmp_path / launch.NEEDS).exists()
    monkeypatch.setattr(needs, "needs", lambda log: {"00_toy": {"memory_mib": 7}})
    assert needs.main([str(tmp_path / "log.txt")]) == 0
    assert json.loads((tmp_path / launch.NEEDS).read_text())["notebooks"]["00_toy"]["memory_mib"] == 7
