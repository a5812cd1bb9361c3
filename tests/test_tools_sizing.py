"""docs/jupyterhub.md says what was measured, and the course runs as it stands on a server: read-only, a home for each learner."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from course_utils.tools import badges, sizing
from tests.toys import ROOT

PAGE = (ROOT / "docs" / "jupyterhub.md").read_text(encoding="utf-8")
NEEDS = {
    "00_a": {"memory_mib": 1024, "seconds": 60, "cores": 2, "cpu": "A", "date": "2026-01-01"},
    "01_b": {"memory_mib": 2048, "seconds": 30, "cores": 1, "cpu": "A", "date": "2026-01-02"},
}
# A mount of its own, over the course; nobody else sees it.
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def can_mount():
    command = [*OWN_MOUNTS, "sh", "-c", READ_ONLY, str(ROOT / "docs"), "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


def test_the_page_is_as_the_tool_writes_it():
    assert sizing.written(PAGE) == PAGE, "run `make sizing`"


def test_what_belongs_to_no_mark_stays_and_a_lost_mark_is_named():
    begin, end = (mark.format("sizing") for mark in sizing.MARKS)
    text = PAGE.replace("# A class on one server", "# Mine").replace(begin, f"{begin}\nold")
    assert sizing.written(text) == PAGE.replace("# A class on one server", "# Mine")
    with pytest.raises(ValueError, match="the page needs .*sizing"):
        sizing.written(PAGE.replace(end, ""))


def test_a_core_is_shared_by_as_many_as_its_busy_minutes_leave_room_for():
    # Two minutes of a core in ten of a reader: five learners; half a minute in five: ten.
    shown = sizing.table(NEEDS, {"00_a": 10, "01_b": 5})
    assert shown.rows == [["00", "1.0", "2.0", "10", "5.0"], ["01", "2.0", "0.5", "5", "10.0"]]


def test_the_server_is_sized_by_the_largest_and_the_busiest():
    said = sizing.section(NEEDS, {"00_a": 10, "01_b": 5})
    assert "N learners need 2.0 · N GiB and N / 5.0 cores" in said
    assert "A, 2 cores, 2026-01-01" in said and "A, 1 cores, 2026-01-02" in said


def test_the_link_leads_to_where_the_course_lives():
    here = sizing.link(badges.Course("someone/quant", "v2"))
    assert "git-pull?repo=https://github.com/someone/quant&branch=v2&" in here
    assert re.search(r"urlpath=lab/tree/squeeze/notebooks/(\S+)", here)[1] == "00_start_here.ipynb"


def test_the_limit_in_the_page_is_above_what_was_measured():
    needs, _ = sizing.measured()
    limit = int(re.search(r"limits\.memory (\d+)G", PAGE)[1])
    assert limit > max(need["memory_mib"] for need in needs.values()) / 1024


def test_the_kernel_of_the_page_gives_each_user_a_place_of_their_own(tmp_path):
    command = re.search(r"-m ipykernel install(.*?)\nsudo", PAGE, re.S)[1].replace("\\\n", " ")
    command = command.replace("/opt/tljh/user", str(tmp_path))
    subprocess.run(f"{sys.executable} -m ipykernel install {command}", shell=True, check=True, capture_output=True)
    spec = json.loads((tmp_path / "share" / "jupyter" / "kernels" / "python3" / "kernel.json").read_text())
    assert spec["env"] == {
        "COURSE_PROGRESS": "${HOME}/.squeeze-progress.json",
        "COURSE_RESULTS": "${HOME}/squeeze-results",
    }
    program = """
        import sys
        from jupyter_client import KernelManager
        from jupyter_client.kernelspec import KernelSpecManager

        specs = KernelSpecManager(kernel_dirs=[sys.argv[1]], ensure_native_kernel=False)
        manager = KernelManager(kernel_name="python3", kernel_spec_manager=specs)
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(60)
            client.execute_interactive("import os; print(os.environ['COURSE_PROGRESS'])")
        finally:
            manager.shutdown_kernel(now=True)
    """
    home = tmp_path / "home of ada"
    home.mkdir()
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "share" / "jupyter" / "kernels")],
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == f"{home}/.squeeze-progress.json"


@pytest.mark.skipif(not can_mount(), reason="a folder cannot be mounted read-only here (unshare, mount)")
def test_a_learner_works_where_the_course_cannot_be_written(tmp_path):
    program = """
        import os, sys
        from pathlib import Path
        from course_utils import data, exercises, files, launch, models, workspace

        course, home = Path(sys.argv[1]), Path(sys.argv[2])
        try:
            (course / "data" / "x").touch()
            sys.exit("the course can be written, so this test proves nothing")
        except OSError:
            pass
        workspace.start(home / "squeeze")
        os.chdir(home / "squeeze")
        launch.begin("00")
        images, labels = next(iter(data.batches(data.fashion_mnist("test"), 2, limit=2)))
        models.load("resnet18")(images)
        exercises.check("round-half-even", exercises.get("round-half-even").solution)
        exercises.export("ada.csv", name="Ada")
        print(files.results_dir())
    """
    shared = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", READ_ONLY, str(ROOT)]
        + [sys.executable, "-B", "-c", textwrap.dedent(program), str(ROOT), str(tmp_path)],
        env=shared | {"HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "✔ Round half to even" in done.stdout and "not remembered" not in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "squeeze" / "results")
    assert "round-half-even" in (tmp_path / "squeeze" / ".progress.json").read_text()
    assert "round-half-even" in (tmp_path / "squeeze" / "ada.csv").read_text()
