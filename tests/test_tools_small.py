"""The limit of a small machine is a real one, and who cannot set it is told."""

import os
import subprocess
import sys

import pytest

from course_utils.tools import small


@pytest.mark.parametrize(("version", "name"), [("memory", "memory.limit_in_bytes"), ("", "memory.max")])
def test_both_versions_of_control_groups_are_known(monkeypatch, tmp_path, version, name):
    (tmp_path / version).mkdir(exist_ok=True)
    monkeypatch.setattr(small, "GROUPS", tmp_path)
    monkeypatch.setattr(small.time, "sleep", lambda seconds: None)  # a folder of files, which no group is, does not go
    written = {}
    with small.limited(123) as folder:
        written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written[name] == "123"


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A folder that is taken for a control group, and which, like one that is not empty, does not go."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("control groups are Linux'")
    monkeypatch.setattr(small, "GROUPS", tmp_path)
    monkeypatch.setattr(small.time, "sleep", lambda seconds: None)
    return tmp_path


def test_what_goes_on_in_the_group_does_not_change_the_exit_code(pretended, capsys):
    assert small.main([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert capsys.readouterr().err == "" and len(list(pretended.iterdir())) == 1


def test_a_command_that_cannot_be_started_is_not_a_limit_that_cannot_be_set(pretended, capsys):
    assert small.main(["nosuchcommand"]) == 127
    error = capsys.readouterr().err
    assert error.startswith("nosuchcommand cannot be started: ") and "limit" not in error


def test_a_group_that_takes_nobody_in_is_no_limit(monkeypatch, pretended, capsys):
    def run(command, preexec_fn):
        raise subprocess.SubprocessError("Exception occurred in preexec_fn.")

    monkeypatch.setattr(small.subprocess, "run", run)
    assert small.main(["true"]) == 2
    error = capsys.readouterr().err
    assert "Exception occurred in preexec_fn" in error and "systemd-run" in error


def group_or_skip():
    try:
        with small.limited():
            pass
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")


def test_a_command_runs_on_one_core_and_keeps_its_exit_code():
    group_or_skip()
    code = "import os, sys; sys.exit(10 + len(os.sched_getaffinity(0)))"
    assert small.main([sys.executable, "-c", code]) == 11


def test_more_memory_than_the_limit_is_not_to_be_had():
    group_or_skip()
    code = f"bytearray({small.LIMIT + 2**20})"
    assert small.main([sys.executable, "-c", code]) == -9
    assert small.main([sys.executable, "-c", "bytearray(2**28)"]) == 0


def test_where_no_limit_can_be_set_there_is_another_way(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(small, "GROUPS", tmp_path / "none")
    assert small.main(["true"]) == 2
    assert "systemd-run" in capsys.readouterr().err
