"""What must hold of a committed notebook and nbval does not look at; each guard returns its complaints, best none."""

import copy
import re

import nbformat
import papermill

from course_utils.tools.clean import clean, to_text

MAX_BYTES = 1_000_000
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
REASONS = {"times-things", "this-machine", "trains"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(root|home|tmp|work|Users)\b|\b[A-Za-z]:\\+Users\b")


def read(path):
    """Return the notebook at `path`, checked against the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed_in_order(notebook, path):
    """Code cells were run once each, from top to bottom: nbval passes a notebook without outputs."""
    counts = [cell.execution_count for cell in _code(notebook)]
    if not counts:
        yield "no code cells"
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, expected 1..{len(counts)}"


def no_errors(notebook, path):
    """No traceback and no refuted claim is stored."""
    for number, cell in enumerate(_code(notebook), start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {number} stores {output.ename}: {output.evalue}"
            elif "✘" in _text(output):
                yield f"cell {number} stores a claim that does not hold"


def no_machine_paths(notebook, path):
    """Nothing tells where somebody keeps the course."""
    for cell in notebook.cells:
        for text in [cell.source, *map(_text, cell.get("outputs", ()))]:
            for found in MACHINE_PATH.finditer(text):
                yield f"machine path {found.group()!r} in {_around(text, found)!r}"


def no_churn(notebook, path):
    """A second run would give the same bytes: no time stamps, papermill metadata, random widget ids."""
    if to_text(clean(copy.deepcopy(notebook))) != path.read_text(encoding="utf-8"):
        yield "is not as the runner writes it: run `make run-all` and commit the result"


def small(notebook, path):
    """GitHub shows it, and a clone stays quick."""
    if path.stat().st_size > MAX_BYTES:
        yield f"{path.stat().st_size:,} bytes, at most {MAX_BYTES:,}"


def one_title(notebook, path):
    """Exactly one H1, the page's title."""
    texts = [re.sub(r"(?ms)^```.*?^```", "", cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [line for text in texts for line in text.splitlines() if line.startswith("# ")]
    if len(titles) != 1:
        yield f"{len(titles)} first-level headings, expected 1: {titles}"


def reasons_given(notebook, path):
    """A cell that nbval does not compare says why."""
    for number, cell in enumerate(_code(notebook), start=1):
        tags = set(cell.metadata.get("tags", ()))
        if tags & NOT_COMPARED and not tags & REASONS:
            yield f"cell {number} is not compared, but has no tag out of {sorted(REASONS)}"


def pictures_present(notebook, path):
    """As many pictures as the metadata (`course.pictures`) promise: nbval compares none."""
    found = sum("image/png" in output.get("data", ()) for cell in _code(notebook) for output in cell.outputs)
    expected = notebook.metadata.get("course", {}).get("pictures", 0)
    if found != expected:
        yield f"{found} pictures, expected {expected}"


def fast_values_fit(notebook, path):
    """The names of the fast mode (`course.fast`) are assigned in the one cell tagged `parameters`."""
    tagged = [cell for cell in _code(notebook) if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells tagged `parameters`, expected 1"
    for name in set(notebook.metadata.get("course", {}).get("fast", {})) - set(papermill.inspect_notebook(notebook)):
        yield f"fast value {name} is not assigned in the `parameters` cell"


GUARDS = (
    executed_in_order,
    no_errors,
    no_machine_paths,
    no_churn,
    small,
    one_title,
    reasons_given,
    pictures_present,
    fast_values_fit,
)


def complaints(path):
    """Return what all guards have against the notebook at `path`, as a dict: name of the guard → list of sentences."""
    notebook = read(path)
    found = {guard.__name__: list(guard(notebook, path)) for guard in GUARDS}
    return {name: sentences for name, sentences in found.items() if sentences}


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _text(output):
    # Everything a reader sees as text; pictures are base64 and could hold any letters.
    parts = [output.get("text", ""), *output.get("traceback", ())]
    parts += [
        str(data) for kind, data in output.get("data", {}).items() if kind == "image/svg+xml" or "image" not in kind
    ]
    return "\n".join(parts)


def _around(text, found):
    return text[max(found.start() - 20, 0) : found.end() + 30]
