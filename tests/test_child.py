"""What needs a process of its own: the environment it starts with, its memory."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from course_utils import child


def allocate(megabytes):
    assert len(bytearray(b"x") * (megabytes * 1_000_000)) == megabytes * 1_000_000


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(text):
    raise LookupError(text)


def test_peak_memory_is_what_the_function_took_even_if_it_gave_it_back():
    mine = psutil.Process().memory_info().rss
    found = child.peak_memory(allocate, 200)
    assert found.added == pytest.approx(200e6, rel=0.1)
    assert found.total > found.added
    assert psutil.Process().memory_info().rss < mine + 100e6


def test_in_this_process_too_more_is_more():
    small, large = (child.run_and_watch(allocate, (megabytes,)) for megabytes in (100, 300))
    assert large.added - small.added == pytest.approx(200e6, rel=0.2)


def test_on_a_mac_the_peak_is_what_the_system_says(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(child, "Path", lambda path: tmp_path / "absent")
    monkeypatch.setattr(child, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**40))
    assert child._peak_rss() == 2**40


def test_the_error_of_the_measured_function_comes_through():
    with pytest.raises(LookupError, match="not here"):
        child.peak_memory(fail, "not here")


def test_a_killed_process_is_an_error_about_memory():
    with pytest.raises(MemoryError, match="killed"):
        child.peak_memory(die)


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    busy = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(300)"
    parent = subprocess.Popen([sys.executable, "-c", f"from course_utils import child; child.in_child(exec, {busy!r})"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    try:
        parent.kill()
        parent.wait()
        process.wait(timeout=30)
    finally:
        if process.is_running():
            process.kill()


def test_a_function_that_a_fresh_process_cannot_import_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="fresh process"):
        child.peak_memory(lambda: None)
    with pytest.raises(ValueError, match="fresh process"):
        child.peak_memory(allocate, lambda: None)
    monkeypatch.setattr(allocate, "__module__", "__main__")
    monkeypatch.setattr("__main__.allocate", allocate, raising=False)
    with pytest.raises(ValueError, match="allocate is defined in this session"):
        child.peak_memory(allocate, 1)


def surroundings():
    return {"said": os.environ.get("COURSE_SAID"), "threads": torch.get_num_threads(), "process": os.getpid()}


def test_the_environment_of_a_child_is_there_before_its_libraries_and_leaves_ours_alone(monkeypatch):
    monkeypatch.setenv("COURSE_SAID", "ours")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = child.in_child(surroundings, env={"COURSE_SAID": "theirs", "OMP_NUM_THREADS": 1})
    assert found["said"] == "theirs" and found["threads"] == 1 and found["process"] != os.getpid()
    assert (os.environ["COURSE_SAID"], os.environ["OMP_NUM_THREADS"]) == ("ours", "2")
    assert child.in_child(os.getenv, "COURSE_SAID") == "ours"
    assert child.in_child(os.getenv, "COURSE_SAID", env={"COURSE_SAID": None}) is None
    assert os.environ["COURSE_SAID"] == "ours"


def test_a_child_gives_back_the_result_of_a_function_with_arguments():
    assert child.in_child(divmod, 17, 5) == (3, 2)
