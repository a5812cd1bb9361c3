"""Proof that the gate bites: faults planted in committed toy notebooks are caught by nbval, by a guard, or by both."""

import base64
import contextlib
import io

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from course_utils.tools.run import run
from tests import guards
from tests.toys import edit, nbval, write_notebook

CLAIM = "print('✔ INT8 is smaller  (measured: 11.26 MB)')"


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder of notebooks as the runner commits them, all alike."""
    folder = tmp_path_factory.mktemp("gate")
    for name in ("00_untouched", "01_changed", "02_stripped", "03_raising", "04_measured"):
        write_notebook(folder / f"{name}.ipynb", "print(N + 1)", CLAIM, "'93.62 %'", parameters="N = 1", fast={"N": 1})
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(folder, results=folder / "results", ledger=folder / "ledger.json") == 0
    return folder


@pytest.fixture(scope="module")
def report(committed):
    """nbval's report on the folder after the faults were planted."""
    edit(committed / "01_changed.ipynb", change_output)
    edit(committed / "02_stripped.ipynb", strip)
    edit(committed / "03_raising.ipynb", raise_error)
    edit(committed / "04_measured.ipynb", measure_elsewhere)
    return nbval(committed)


def change_output(notebook):
    notebook.cells[2].outputs[0].text = "3\n"


def strip(notebook):
    for cell in notebook.cells[1:]:
        cell.outputs, cell.execution_count = [], None


def raise_error(notebook):
    cell = notebook.cells[2]
    cell.source = "1 / 0"
    cell.outputs = [new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=["..."])]


def measure_elsewhere(notebook):
    claim, percentage = notebook.cells[3], notebook.cells[4]
    claim.outputs[0].text = claim.outputs[0].text.replace("11.26", "11.31")
    percentage.outputs[0].data["text/plain"] = "'93.68 %'"


def verdicts(report, name):
    return {line.split()[0] for line in report.stdout.splitlines() if "::Cell" in line and name in line}


def test_untouched_notebook_passes(committed, report):
    assert verdicts(report, "00_untouched") == {"PASSED"}
    assert guards.complaints(committed / "00_untouched.ipynb") == {}


def test_changed_output_is_caught_by_nbval(report):
    assert report.returncode == 1
    assert "FAILED" in verdicts(report, "01_changed")


def test_stripped_notebook_is_caught_by_a_guard(committed, report):
    assert "executed_in_order" in guards.complaints(committed / "02_stripped.ipynb")
    # nbval alone would let it pass, which is why the guard is there. Once it does not, the guard may go.
    assert verdicts(report, "02_stripped") == {"PASSED"}


def test_raising_cell_is_caught_by_both(committed, report):
    assert "FAILED" in verdicts(report, "03_raising")
    assert "no_errors" in guards.complaints(committed / "03_raising.ipynb")


def test_numbers_of_another_machine_pass(report):
    assert verdicts(report, "04_measured") == {"PASSED"}


def plant_refuted_claim(notebook):
    notebook.cells[3].outputs[0].text = "✘ does not hold here: INT8 is smaller\n"


def plant_path(notebook):
    notebook.cells[2].outputs[0].text = "/home/ada/course/data\n"


def plant_windows_path(notebook):
    notebook.cells[0].source += "\n\nOpen `C:\\Users\\ada`."


def plant_time_stamp(notebook):
    notebook.cells[2].metadata["execution"] = {"iopub.execute_input": "2025-01-01T00:00:00Z"}


def plant_papermill(notebook):
    notebook.metadata["papermill"] = {"duration": 1.5}


def plant_size(notebook):
    notebook.cells[0].source += "x" * guards.MAX_BYTES


def plant_second_title(notebook):
    notebook.cells.append(new_markdown_cell("# Another", id="another"))


def plant_silence(notebook):
    notebook.cells[2].metadata["tags"] = ["nbval-ignore-output"]


def plant_picture(notebook):
    data = {"image/png": base64.b64encode(b"png").decode()}
    notebook.cells[2].outputs.append(new_output("display_data", data))


def plant_stale_fast_value(notebook):
    notebook.metadata["course"]["fast"]["EPOCHS"] = 1


def plant_second_parameters(notebook):
    notebook.cells.append(new_code_cell("M = 1", id="m", metadata={"tags": ["parameters"]}, execution_count=5))


@pytest.mark.parametrize(
    ("fault", "guard"),
    [
        (plant_refuted_claim, "no_errors"),
        (plant_path, "no_machine_paths"),
        (plant_windows_path, "no_machine_paths"),
        (plant_time_stamp, "no_churn"),
        (plant_papermill, "no_churn"),
        (plant_size, "small"),
        (plant_second_title, "one_title"),
        (plant_silence, "reasons_given"),
        (plant_picture, "pictures_present"),
        (plant_stale_fast_value, "fast_values_fit"),
        (plant_second_parameters, "fast_values_fit"),
    ],
)
def test_planted_fault_is_caught_by_its_guard_alone(committed, tmp_path, fault, guard):
    path = tmp_path / "00_toy.ipynb"
    path.write_bytes((committed / "00_untouched.ipynb").read_bytes())
    edit(path, fault)
    assert list(guards.complaints(path)) == [guard]
