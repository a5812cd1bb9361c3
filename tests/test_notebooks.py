"""The guards over the committed notebooks; what their cells print is compared by `make test-notebooks`."""

import pytest

from tests import guards
from tests.toys import ROOT

NOTEBOOKS = ROOT / "notebooks"
EXPECTED = (
    "00_start_here",
    "01_precision_basics",
    "02_post_training_quantization",
    "03_quantization_aware_training",
    "04_benchmarking",
    "05_int4_experiments",
    "06_deployment",
)


def test_every_notebook_is_there_and_no_other():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(EXPECTED)


@pytest.mark.parametrize("guard", guards.GUARDS, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("name", EXPECTED)
def test_guard(name, guard):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert list(guard(guards.read(path), path)) == []


def test_at_least_three_of_four_cells_that_print_are_compared():
    """Prints, for `pytest -rP`, which are not, or not their numbers, and why."""
    whole = words = 0
    others = []
    for name in EXPECTED:
        for cell in guards.read(NOTEBOOKS / f"{name}.ipynb").cells:
            if cell.cell_type != "code" or not any(map(prints, cell.outputs)):
                continue
            tags = set(cell.metadata.get("tags", ()))
            reason = ", ".join(tags & guards.REASONS)
            if tags & guards.NOT_COMPARED:
                others.append(f"{name}, {cell.id}: not compared, {reason}")
            elif guards.NUMBERS_VARY in tags:
                words += 1
                others.append(f"{name}, {cell.id}: compared but for its numbers, {reason}")
            else:
                whole += 1
    print(*others, sep="\n")
    n = whole + len(others)
    print(f"{n} cells print: {whole} compared whole, {words} but for their numbers, {len(others) - words} not")
    assert whole + words >= 0.75 * n
    assert whole >= 0.65 * n, "numbers vary where they must, not where it is easy"


def prints(output):
    return output.output_type == "stream" or {"text/plain", "text/html"} & set(output.get("data", ()))
