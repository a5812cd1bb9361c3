"""What must hold of a committed notebook and nbval does not look at; each guard returns its complaints, best none."""

import ast
import copy
import re
from html.parser import HTMLParser

import mistune
import nbformat
import papermill

from course_utils.tools.clean import WIDGET_STATE, clean, to_text

MAX_BYTES = 1_000_000
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
NUMBERS_VARY = "numbers-vary"  # compared but for its numbers (`tests/nbval_plugin.py`)
REASONS = {"times-things", "this-machine", "trains"}
# What a viewer of notebooks shows and does not run; of these, HTML and pictures in text are looked into.
SHOWN = {
    *("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg", "image/svg+xml"),
    "application/vnd.jupyter.widget-view+json",
}
MARKUP = {"text/html", "image/svg+xml", "text/markdown"}
WIDGETS = "@jupyter-widgets/"  # the modules that every viewer has; another is fetched
RUNNING_TAGS = {"script", "iframe", "frame", "object", "embed", "applet", "base", "meta", "form"}
ADDRESS = re.compile(r"\b(?:https?|wss?|ftp):|^\s*//|url\(\s*['\"]?//|@import", re.I)
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
    """A cell that nbval does not compare, or not its numbers, says why."""
    for number, cell in enumerate(_code(notebook), start=1):
        tags = set(cell.metadata.get("tags", ()))
        if tags & (NOT_COMPARED | {NUMBERS_VARY}) and not tags & REASONS:
            yield f"cell {number} is not compared, or not its numbers, but has no tag out of {sorted(REASONS)}"
        if tags & NOT_COMPARED and NUMBERS_VARY in tags:
            yield f"cell {number} is not compared at all: take the tag {NUMBERS_VARY} away, or the other one"


def claims_compared(notebook, path):
    """What must hold anywhere is compared: in a cell that nbval passes over, nobody would see it refuted."""
    for number, cell in enumerate(_code(notebook), start=1):
        if NOT_COMPARED & set(cell.metadata.get("tags", ())):
            calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
            named = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "claim"]
            if any("anywhere" not in {keyword.arg for keyword in call.keywords} for call in named):
                yield f"cell {number} is not compared, and claims what must hold anywhere: give the claim a cell of its own"


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


def runs_no_script(notebook, path):
    """Who looks at it runs nothing: no script, frame or handler in an output, in a widget or in Markdown."""
    for place, kind in _kinds(notebook):
        if kind not in SHOWN:
            yield f"{place} stores {kind}, which a viewer may run"
    for place, page in _pages(notebook):
        for found in page.running:
            yield f"{place} holds {found}"


def asks_nobody(notebook, path):
    """Who looks at it, asks no other machine: no picture, style or widget comes from outside; links in Markdown may lead there."""
    for place, page in _pages(notebook):
        links = page.links if place.startswith("output") else ()
        for address in [*page.fetched, *links]:
            yield f"{place} asks for {address[:80]!r}"
    for module in {model.get("model_module", "") for model in _widgets(notebook)}:
        if not module.startswith(WIDGETS):
            yield f"a widget asks for the module {module!r}"


GUARDS = (
    executed_in_order,
    no_errors,
    no_machine_paths,
    no_churn,
    small,
    one_title,
    reasons_given,
    claims_compared,
    pictures_present,
    fast_values_fit,
    runs_no_script,
    asks_nobody,
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


class _Page(HTMLParser):
    """What would run, what would be fetched and what is linked to when a piece of HTML or SVG is shown."""

    def __init__(self, text):
        super().__init__()
        self.running, self.fetched, self.links, self.tag = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag in RUNNING_TAGS:
            self.running.append(f"<{tag}>")
        for name, value in attributes:
            if name.startswith("on"):
                self.running.append(f"{name}=")
            if re.match(r"\s*(javascript|vbscript|data:text/html)", value or "", re.I):
                self.running.append(f"{name}={value[:40]!r}")
            if ADDRESS.search(value or "") and not name.startswith("xmlns"):
                (self.links if (tag, name) == ("a", "href") else self.fetched).append(value)

    def handle_data(self, data):
        if self.tag == "style" and ADDRESS.search(data):
            self.fetched.append(data)


def _pages(notebook):
    """Yield `(place, _Page)` for everything in a notebook that is shown as HTML."""
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "markdown"), start=1):
        yield f"Markdown cell {number}", _Page(mistune.html(cell.source))
    for number, cell in enumerate(_code(notebook), start=1):
        yield from _shown(f"output of cell {number}", cell.outputs)
    for model in _widgets(notebook):
        state = model.get("state", {})
        yield from _shown("output in a widget", state.get("outputs", ()))
        for name, value in state.items():
            if isinstance(value, str):
                yield f"output in a widget's {name}", _Page(value)


def _shown(place, outputs):
    for output in outputs:
        for kind in MARKUP & output.get("data", {}).keys():
            text = "".join(output["data"][kind])  # lines, where a widget keeps them
            yield place, _Page(mistune.html(text) if kind == "text/markdown" else text)


def _kinds(notebook):
    places = [(f"cell {number}", cell.outputs) for number, cell in enumerate(_code(notebook), start=1)]
    places += [("a widget", model.get("state", {}).get("outputs", ())) for model in _widgets(notebook)]
    for place, outputs in places:
        yield from ((place, kind) for output in outputs for kind in output.get("data", ()))


def _widgets(notebook):
    return notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {}).values()


def _around(text, found):
    return text[max(found.start() - 20, 0) : found.end() + 30]
