"""The notebook runner, on toy notebooks."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course_utils import exercises
from course_utils.tools.clean import WIDGET_STATE, clean
from course_utils.tools.run import run
from tests.toys import ROOT, edit, write_notebook

RECORD = "from course_utils import ledger\nledger.record('toy', {quantity!r}, 1, source='cited')"


def launch(folder, **options):
    """Run the notebooks of `folder`; return exit code, printed text and the folder's results and ledger."""
    out, err = io.StringIO(), io.StringIO()
    places = {"results": folder / "results", "ledger": None if options.get("fast") else folder / "ledger.json"}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(folder, **places, **options)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), **places)


def outputs(path):
    return [cell.outputs for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def recorded(path):
    return set(json.loads(path.read_text())["records"]["toy"])


@pytest.fixture(scope="module", autouse=True)
def importable_course():
    """Kernels find `course_utils` even where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run over notebooks of which some fail, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("mixed") / "my notebooks"
    write_notebook(
        folder / "00_good.ipynb", RECORD.format(quantity="good"), "import sys; print(sys.executable)", "x = 1\nx"
    )
    write_notebook(
        folder / "01_raises.ipynb", "print('fine')", RECORD.format(quantity="bad"), "1 / 0", "print('never')"
    )
    write_notebook(folder / "02_killed.ipynb", "import os; os.kill(os.getpid(), 9)")
    write_notebook(folder / "03_after.ipynb", "import os; print(os.environ['COURSE_RUN'])")
    (folder / "04_broken.ipynb").write_text('{"cells": [')
    for name in (".00_good-leftover.ipynb.partial", ".ledger-leftover.json.partial"):
        (folder / name).touch()
    before = {path.name: path.read_bytes() for path in folder.glob("*.ipynb")}
    user = tmp_path_factory.mktemp("user")
    foreign = user / "kernels" / "python3" / "kernel.json"
    foreign.parent.mkdir(parents=True)
    foreign.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Another", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(user))
        patch.setenv("JUPYTER_DATA_DIR", str(user))
        result = launch(folder)
    return SimpleNamespace(folder=folder, before=before, **vars(result))


def test_one_failure_makes_the_exit_code_1_and_the_others_still_run(mixed):
    assert mixed.code == 1
    verdicts = {line.split()[0]: line.split(maxsplit=3)[3] for line in mixed.out.splitlines()[-6:-1]}
    assert verdicts == {
        "00_good": "ok",
        "01_raises": "FAILED cell 3/4",
        "02_killed": "FAILED cell 1/1",
        "03_after": "ok",
        "04_broken": "FAILED",
    }
    assert outputs(mixed.folder / "03_after.ipynb")[0][0].text == "full\n"


def test_progress_has_a_line_for_each_cell(mixed):
    lines = [line.split() for line in mixed.out.splitlines() if line.startswith("00_good  ") and " cell " in line]
    assert [line[:3] for line in lines] == [["00_good", "cell", f"{number}/3"] for number in (1, 2, 3)]
    if sys.platform == "linux":
        assert all(10 < float(line[5]) < 2000 and line[6] == "MiB" for line in lines)


def test_failure_names_notebook_cell_and_error(mixed):
    assert "01_raises failed: cell 3/4: ZeroDivisionError: division by zero" in mixed.err
    assert "02_killed failed: cell 1/1: the kernel died: killed by SIGKILL" in mixed.err
    assert "memory runs out" in mixed.err
    broken = mixed.err.partition("04_broken failed: ")[2]
    assert broken.startswith("04_broken.ipynb is no notebook (") and "Traceback" not in broken


def test_failure_leaves_the_committed_notebook_and_no_other_file(mixed):
    for name in ("01_raises.ipynb", "02_killed.ipynb", "04_broken.ipynb"):
        assert (mixed.folder / name).read_bytes() == mixed.before[name]
    left = {path.name for path in mixed.folder.iterdir()} - set(mixed.before)
    assert left <= {"ledger.json", ".run.lock"}


def test_failure_drops_the_records_of_that_notebook_alone(mixed):
    assert recorded(mixed.ledger) == {"good"}


def test_kernel_is_this_interpreter_whatever_kernel_the_user_installed(mixed):
    assert outputs(mixed.folder / "00_good.ipynb")[1][0].text.strip() == sys.executable


def test_second_run_gives_the_same_bytes(mixed):
    path = mixed.folder / "00_good.ipynb"
    first = path.read_bytes()
    assert first != mixed.before["00_good.ipynb"]
    result = launch(mixed.folder, only=["00"])
    assert result.code == 0
    assert "01_raises" not in result.out
    assert path.read_bytes() == first


def test_unknown_only_lists_the_notebooks(mixed):
    result = launch(mixed.folder, only=["00", "9"])
    assert result.code == 2
    assert "No notebook begins with '9'. There are: 00_good, 01_raises" in result.err


def test_no_notebooks_is_said(tmp_path):
    assert launch(tmp_path).code == 2


def test_second_run_at_the_same_time_is_refused(mixed):
    before = (mixed.folder / "00_good.ipynb").read_bytes()
    with filelock.FileLock(mixed.folder / ".run.lock"):
        result = launch(mixed.folder)
    assert result.code == 2
    assert "Another run" in result.err
    assert (mixed.folder / "00_good.ipynb").read_bytes() == before


def test_hanging_cell_is_stopped(tmp_path):
    write_notebook(tmp_path / "00_hangs.ipynb", "import time; time.sleep(60)")
    result = launch(tmp_path, timeout=2)
    assert result.code == 1
    assert "00_hangs failed: cell 1/1: TimeoutError" in result.err


def test_fast_mode_uses_the_smaller_numbers_and_leaves_the_committed_files(tmp_path):
    cell = "print(EPOCHS)\n" + RECORD.format(quantity="fast")
    path = write_notebook(tmp_path / "00_toy.ipynb", cell, parameters="EPOCHS = 30", fast={"EPOCHS": 2})
    stale = write_notebook(tmp_path / "01_stale.ipynb", "1", parameters="EPOCHS = 30", fast={"STEPS": 2})
    missing = write_notebook(tmp_path / "02_missing.ipynb", "1", fast={"EPOCHS": 2})
    before = [p.read_bytes() for p in (path, stale, missing)]
    result = launch(tmp_path, fast=True)
    assert result.code == 1
    assert outputs(result.results / "fast" / "00_toy.ipynb")[-1][0].text == "2\n"
    assert recorded(result.results / "fast" / "ledger.json") == {"fast"}
    assert "01_stale failed: its metadata hold fast values its `parameters` cell does not assign: STEPS." in result.err
    assert "02_missing failed: its metadata hold fast values, but no cell is tagged `parameters`." in result.err
    assert [p.read_bytes() for p in (path, stale, missing)] == before


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_no_kernel_and_no_file(tmp_path, number, code):
    write_notebook(tmp_path / "00_done.ipynb", "1")
    slow = write_notebook(tmp_path / "01_slow.ipynb", "import time\nopen('started', 'w').close()\ntime.sleep(60)")
    write_notebook(tmp_path / "02_never.ipynb", "2")
    before = slow.read_bytes()
    places = f"results={str(tmp_path)!r}, ledger={str(tmp_path / 'ledger.json')!r}"
    program = f"import sys; from course_utils.tools.run import run; sys.exit(run({str(tmp_path)!r}, {places}))"
    runner = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        wait_for((tmp_path / "started").exists)
        kernels = psutil.Process(runner.pid).children(recursive=True)
        assert kernels
        runner.send_signal(number)
        printed, _ = runner.communicate(timeout=30)
    finally:
        runner.kill()
    assert runner.returncode == code
    assert not any(kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE for kernel in kernels)
    assert slow.read_bytes() == before
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))
    table = printed.partition("notebook ")[2]
    assert [line.split(maxsplit=3)[3] for line in table.splitlines()[1:4]] == ["ok", "interrupted", "not run"]
    assert "Traceback" not in printed


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def test_clean_merges_streams_between_other_outputs_and_puts_stdout_first():
    texts = [("stderr", "e1"), ("stdout", "a"), ("stdout", "b"), None, ("stdout", "c")]
    cell = new_code_cell("x", execution_count=7)
    cell.outputs = [
        new_output("display_data", {"text/plain": "picture"})
        if text is None
        else new_output("stream", name=text[0], text=text[1])
        for text in texts
    ]
    notebook = clean(new_notebook(cells=[cell]))
    assert [output.get("text", "picture") for output in notebook.cells[0].outputs] == ["ab", "e1", "picture", "c"]
    assert notebook.cells[0].execution_count == 1


def test_clean_drops_what_differs_from_run_to_run_and_keeps_the_rest():
    cell = new_code_cell("x", id="mine", metadata={"execution": {"start": "now"}, "papermill": {}, "tags": []})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {}, "course": {"minutes": 4}})
    notebook.metadata["kernelspec"] = {"name": "my-venv", "display_name": "Mine"}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    cleaned = clean(notebook)
    assert cleaned.cells[0].metadata == {} and cleaned.cells[0].id == "mine"
    assert cleaned.metadata == {
        "course": {"minutes": 4},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_clean_gives_widgets_the_same_ids_each_time():
    def notebook(first, second):
        cell = new_code_cell("x")
        cell.outputs = [new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": second}})]
        state = {first: {"state": {}}, second: {"state": {"layout": f"IPY_MODEL_{first}"}}}
        widgets = {WIDGET_STATE: {"state": state, "version_major": 2, "version_minor": 0}}
        return new_notebook(cells=[cell], metadata={"widgets": widgets})

    one, two = (clean(notebook(*ids)) for ids in (("a" * 32, "b" * 32), ("c" * 32, "d" * 32)))
    one.cells[0].id = two.cells[0].id
    assert one == two
    assert one.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"] == f"{2:032x}"


def test_stale_injected_cell_is_dropped(tmp_path):
    path = write_notebook(tmp_path / "00_toy.ipynb", "print(N)", parameters="N = 1")

    def inject(notebook):
        notebook.cells.insert(2, new_code_cell("N = 5", metadata={"tags": ["injected-parameters"]}))

    edit(path, inject)
    assert launch(tmp_path).code == 0
    assert [cell.source for cell in nbformat.read(path, as_version=4).cells] == ["# A toy", "N = 1", "print(N)"]
    assert outputs(path)[-1][0].text == "1\n"


def exercise(folder, id, change=lambda source: source):
    """A notebook with the stub of an exercise, as the course's own have it."""
    stub = change(exercises.get(id).stub())
    name = exercises.get(id).solution.__name__
    write_notebook(
        folder / "00_toy.ipynb",
        "import torch\nfrom course_utils import exercises",
        f'{stub}\n\n\nexercises.check("{id}", {name})',
        "print('after')",
    )
    edit(folder / "00_toy.ipynb", lambda notebook: notebook.cells[2].metadata.update(tags=["exercise"]))
    return folder / "00_toy.ipynb"


def test_solved_edition_has_every_exercise_pass_and_leaves_the_stub_alone(tmp_path):
    path = exercise(tmp_path, "zero-point")
    before = path.read_bytes()
    result = launch(tmp_path, solved=True)
    assert result.code == 0 and path.read_bytes() == before
    solved = nbformat.read(tmp_path / "results" / "solved" / "00_toy.ipynb", as_version=4)
    assert exercises.get("zero-point").source().rstrip() in solved.cells[2].source
    assert "NotImplementedError" not in solved.cells[2].source
    assert solved.cells[2].outputs[0].text.startswith("✔ Scale and zero point")
    assert solved.cells[3].outputs[0].text == "after\n"


def test_unsolved_exercises_stop_nothing(tmp_path):
    path = exercise(tmp_path, "zero-point")
    assert launch(tmp_path).code == 0
    assert [output[0].text[:1] for output in outputs(path)[1:]] == ["○", "a"]


def test_solved_edition_fails_when_a_cell_asks_for_another_function(tmp_path):
    exercise(tmp_path, "zero-point", lambda stub: stub.replace("affine_range", "other"))
    result = launch(tmp_path, solved=True)
    assert result.code == 1 and "defines no affine_range" in result.err


def test_solved_edition_fails_when_the_check_does_not_pass(tmp_path, monkeypatch):
    path = exercise(tmp_path, "zero-point")

    def check_another(notebook):
        notebook.cells[2].source = notebook.cells[2].source.replace(", affine_range)", ", len)")

    edit(path, check_another)
    result = launch(tmp_path, solved=True)
    assert result.code == 1 and "an exercise is not solved" in result.err
    assert not (tmp_path / "results" / "solved" / "00_toy.ipynb").exists()
