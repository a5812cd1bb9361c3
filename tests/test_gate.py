"""Proof that the gate bites: faults planted in committed toy notebooks are caught by nbval, by a guard, or by both."""

import base64
import contextlib
import io
import shutil

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from course_utils.tools.clean import WIDGET_STATE
from course_utils.tools.run import run
from tests import guards
from tests.toys import edit, nbval, write_notebook

CLAIM = "print('✔ INT8 is smaller  (measured: 11.26 MB)')"
TABLE = "print('          median ms\\nFP32          12.5\\nINT8   3.1 [2.9, 3.3]\\n✔ INT8 is faster')"
NAMES = "00_untouched 01_changed 02_stripped 03_raising 04_measured 05_swapped 06_renumbered 07_stale".split()
TIMED = "08_slower 09_word 10_row 11_refuted 12_not_here".split()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A folder of notebooks as the runner commits them, all alike."""
    folder = tmp_path_factory.mktemp("gate")
    first = folder / f"{NAMES[0]}.ipynb"
    write_notebook(first, "print(N + 1)", CLAIM, "'93.62 %'", parameters="N = 1", fast={"N": 1})
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(folder, results=folder / "results", ledger=folder / "ledger.json") == 0
    for name in NAMES[1:]:
        shutil.copy(first, folder / f"{name}.ipynb")
    timed = folder / f"{TIMED[0]}.ipynb"
    write_notebook(timed, TABLE, parameters="N = 1", fast={"N": 1})
    edit(timed, vary)
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(folder, only=("08",), results=folder / "results", ledger=folder / "ledger.json") == 0
    for name in TIMED[1:]:
        shutil.copy(timed, folder / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def report(committed):
    """nbval's report on the folder after the faults were planted."""
    edit(committed / "01_changed.ipynb", change_output)
    edit(committed / "02_stripped.ipynb", strip)
    edit(committed / "03_raising.ipynb", raise_error)
    edit(committed / "04_measured.ipynb", measure_elsewhere)
    edit(committed / "05_swapped.ipynb", swap)
    edit(committed / "06_renumbered.ipynb", swap_and_renumber)
    edit(committed / "07_stale.ipynb", refute)
    edit(committed / "08_slower.ipynb", say("12.5", " 1,250.25"))
    edit(committed / "08_slower.ipynb", say("3.1 [2.9, 3.3]", "-4e-05 [-1, nan]"))
    edit(committed / "09_word.ipynb", say("FP32", "FP16"))
    edit(committed / "10_row.ipynb", say("INT8   3.1 [2.9, 3.3]\n", ""))
    edit(committed / "11_refuted.ipynb", say("✔", "✘ does not hold here:"))
    edit(committed / "12_not_here.ipynb", say("✔", "– not on this machine:"))
    return nbval(committed)


def vary(notebook):
    notebook.cells[2].metadata["tags"] = [guards.NUMBERS_VARY, "times-things"]


def say(old, new):
    def change(notebook):
        (output,) = notebook.cells[2].outputs
        assert old in output.text
        output.text = output.text.replace(old, new)

    return change


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


def swap(notebook):
    notebook.cells[1], notebook.cells[2] = notebook.cells[2], notebook.cells[1]


def swap_and_renumber(notebook):
    swap(notebook)
    for count, cell in enumerate(notebook.cells[1:], start=1):
        cell.execution_count = count


def refute(notebook):
    notebook.cells[3].source = notebook.cells[3].source.replace("✔", "✘ does not hold here:")


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


def test_swapped_cells_are_caught_by_a_guard_and_also_by_nbval(committed, report):
    assert "executed_in_order" in guards.complaints(committed / "05_swapped.ipynb")
    assert "FAILED" in verdicts(report, "05_swapped")


def test_swapped_cells_with_new_numbers_are_caught_by_nbval_alone(committed, report):
    assert guards.complaints(committed / "06_renumbered.ipynb") == {}
    assert "FAILED" in verdicts(report, "06_renumbered")


def test_claim_that_no_longer_holds_is_caught_by_nbval(committed, report):
    assert guards.complaints(committed / "07_stale.ipynb") == {}
    assert "FAILED" in verdicts(report, "07_stale")


@pytest.mark.parametrize("name", ["08_slower", "12_not_here"])
def test_other_numbers_pass_where_numbers_vary(committed, report, name):
    assert guards.complaints(committed / f"{name}.ipynb") == {}
    assert verdicts(report, name) == {"PASSED"}


@pytest.mark.parametrize("name", ["09_word", "10_row", "11_refuted"])
def test_and_nothing_else_does(report, name):
    assert "FAILED" in verdicts(report, name)


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


def vary_in_silence(notebook):
    notebook.cells[2].metadata["tags"] = [guards.NUMBERS_VARY]


def vary_and_ignore(notebook):
    notebook.cells[2].metadata["tags"] = ["nbval-ignore-output", guards.NUMBERS_VARY, "trains"]


def hide_claim(notebook):
    notebook.cells[3].source = 'ledger.claim("it holds", True)\nledger.claim("here, too", True, anywhere=False)'
    notebook.cells[3].metadata["tags"] = ["nbval-ignore-output", "times-things"]


def plant_picture(notebook):
    data = {"image/png": base64.b64encode(b"png").decode()}
    notebook.cells[2].outputs.append(new_output("display_data", data))


def delete_picture(notebook):
    notebook.metadata["course"]["pictures"] = 1  # one was there when it was committed


def plant_stale_fast_value(notebook):
    notebook.metadata["course"]["fast"]["EPOCHS"] = 1


def plant_second_parameters(notebook):
    notebook.cells.append(new_code_cell("M = 1", id="m", metadata={"tags": ["parameters"]}, execution_count=5))


def showing(**data):
    """A fault: the first output shows `data`, MIME types with "_" for "/"."""

    def plant(notebook):
        kinds = {kind.replace("_", "/", 1): content for kind, content in data.items()}
        notebook.cells[2].outputs.append(new_output("display_data", kinds))

    return plant


def saying(text):
    """A fault: a cell of Markdown."""
    return lambda notebook: notebook.cells.append(new_markdown_cell(text, id="text"))


def keeping(module="@jupyter-widgets/controls", **state):
    """A fault: a widget of `module` in the metadata that keeps `state`."""

    def plant(notebook):
        model = {"model_module": module, "model_module_version": "2.0.0", "model_name": "M", "state": state}
        widgets = {"state": {f"{1:032x}": model}, "version_major": 2, "version_minor": 0}
        notebook.metadata["widgets"] = {WIDGET_STATE: widgets}

    return plant


SCRIPT = "<p>fine</p><script>alert(1)</script>"
OUTSIDE = "https://example.org/a"
HARMLESS = (
    showing(
        text_html='<p style="color: red">a &lt;script&gt; <a href="#here">b</a></p><img src="data:image/png;base64,//+a">'
    ),
    showing(**{"image_svg+xml": '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>'}),
    saying(
        f"[a link]({OUTSIDE}), `<script>`, `![x]({OUTSIDE})` and $a <b$\n\n```html\n<script src='{OUTSIDE}'></script>\n```"
    ),
    keeping(value="<p>fine</p>", outputs=[{"output_type": "display_data", "data": {"text/html": "<pre>fine</pre>"}}]),
)
SCRIPTS = (
    showing(text_html=SCRIPT),
    showing(text_html='<img src="a.png" onerror="alert(1)">'),
    showing(text_html="<iframe srcdoc='x'></iframe>"),
    showing(text_html="<a href='javascript:alert(1)'>b</a>"),
    showing(text_html="<object data='a.svg'></object>"),
    showing(text_markdown="<ScRiPt>alert(1)</ScRiPt>"),
    showing(**{"image_svg+xml": "<svg onload='alert(1)'/>"}),
    showing(application_javascript="alert(1)"),
    showing(text_javascript="alert(1)"),
    showing(**{"application_vnd.bokehjs_exec.v0+json": ""}),
    saying(SCRIPT),
    keeping(value=SCRIPT),
    keeping(outputs=[{"output_type": "display_data", "data": {"text/html": SCRIPT}}]),
    keeping(outputs=[{"output_type": "display_data", "data": {"application/javascript": "alert(1)"}}]),
)
REQUESTS = (
    showing(text_html=f"<img src='{OUTSIDE}'>"),
    showing(text_html="<img src='//example.org/a'>"),
    showing(text_html=f"<img srcset='a.png 1x, {OUTSIDE} 2x'>"),
    showing(text_html=f"<a href='{OUTSIDE}'>b</a>"),
    showing(text_html=f"<link rel='stylesheet' href='{OUTSIDE}'>"),
    showing(text_html=f"<p style='background: url({OUTSIDE})'>b</p>"),
    showing(text_html=f"<style>p {{background: url({OUTSIDE})}}</style>"),
    showing(text_markdown=f"![b]({OUTSIDE})"),
    showing(**{"image_svg+xml": f"<svg><image xlink:href='{OUTSIDE}'/></svg>"}),
    saying(f"![b]({OUTSIDE})"),
    saying(f"![b][c]\n\n[c]: {OUTSIDE}"),
    saying(f"<img src={OUTSIDE}>"),
    keeping(value=f"<img src='{OUTSIDE}'>"),
    keeping(module="jupyter-somebody"),
)


@pytest.mark.parametrize("plant", HARMLESS)
def test_what_neither_runs_nor_asks_passes(committed, tmp_path, plant):
    assert planted(committed, tmp_path, plant) == {}


def planted(committed, tmp_path, fault):
    """Plant `fault` in a notebook that is fine; return the complaints."""
    path = tmp_path / "00_toy.ipynb"
    path.write_bytes((committed / "00_untouched.ipynb").read_bytes())
    edit(path, fault)
    return guards.complaints(path)


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
        (vary_in_silence, "reasons_given"),
        (vary_and_ignore, "reasons_given"),
        (hide_claim, "claims_compared"),
        (plant_picture, "pictures_present"),
        (delete_picture, "pictures_present"),
        (plant_stale_fast_value, "fast_values_fit"),
        (plant_second_parameters, "fast_values_fit"),
        *((fault, "runs_no_script") for fault in SCRIPTS),
        *((fault, "asks_nobody") for fault in REQUESTS),
    ],
)
def test_planted_fault_is_caught_by_its_guard_alone(committed, tmp_path, fault, guard):
    assert list(planted(committed, tmp_path, fault)) == [guard]
