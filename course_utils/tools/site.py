"""Build the web edition of the course into results/site: `make site`, or `python -m course_utils.tools.site [FOLDER]`.

Sphinx reads a tree that is assembled here for each build: the committed notebooks with their outputs, the pages of `docs/`, and
what is generated from the package and from `data/`. It lies as the repository does, so that links hold on both. Nothing is
executed, and a warning is an error.
"""

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

import course_utils
from course_utils import backends, exercises, files, ledger, plots, report, widgets
from course_utils.tools import badges

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PAGES_AT_THE_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")


def notebooks():
    """Return the committed lessons as a dict of file name → notebook (nbformat 4), in the order of the course."""
    paths = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {path.name: nbformat.read(path, as_version=4) for path in paths}


def lesson(notebook):
    """Make of a notebook what its page shows, in place; return it.

    Widgets go, since no kernel moves them here, and their still versions stay; every picture gets a text alternative, every
    exercise a name to link to.
    """
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        if cell.get("id") == badges.START:
            cell.metadata |= {"tags": ["hide-input"], "mystnb": {"code_prompt_show": "Show the first cell, for Colab"}}
        if cell.cell_type == "markdown" and cell.get("id", "").startswith("ask-"):
            cell.source = f"({cell.id})=\n{cell.source}"
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop(WIDGET_VIEW, None)
            if "image/png" in output.get("data", {}):
                cell.metadata["mystnb"] = {"image": {"alt": alternative(notebook.cells, number)}}
    return notebook


def alternative(cells, number):
    """Return a text alternative for the picture of the code cell `cells[number]`: its title, what is drawn, and the axes.

    All of it is taken from the call that drew it and from the docstring of the function or widget that was called; a picture
    without a title has that of its section. Raises `ValueError` when the cell calls neither.
    """
    before = [cell for cell in cells[: number + 1] if cell.cell_type == "code"]
    known = _constants(before)
    call = next(iter(_calls(cells[number].source, "plots")), None)
    if call is not None:
        drawn = getattr(plots, call.func.attr)
    elif _calls(cells[number].source, "explorer"):
        call = next(call for cell in reversed(before) for call in _calls(cell.source, "widgets"))
        drawn = getattr(widgets, call.func.attr)
    else:
        raise ValueError(f"no function of course_utils.plots drew the picture of this cell:\n{cells[number].source}")
    said = {keyword.arg: _words(keyword.value, known) for keyword in call.keywords}
    labels = [_words(key, known) for node in ast.walk(call) if isinstance(node, ast.Dict) for key in node.keys]
    parts = [
        said.get("title") or _heading(cells[:number]),
        *(["Several settings side by side"] if inspect.isclass(drawn) else []),
        _what(drawn),
        *(f"{axis}: {said[name]}" for name, axis in (("xlabel", "Across"), ("ylabel", "Up")) if said.get(name)),
        *([f"Shown: {', '.join(labels)}"] if all(labels) and labels else []),
    ]
    return ". ".join(part.rstrip(".: ") for part in parts) + "."


def _calls(source, module):
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func).startswith(f"{module}.") and call.func.attr != "setup"]


def _constants(cells):
    # Names that cells assign a number or a text: titles are made of them.
    found = {}
    for node in (node for cell in cells for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assign)):
        names, values = (getattr(side, "elts", [side]) for side in (node.targets[0], node.value))
        pairs = zip(names, values, strict=False)
        found |= {ast.unparse(name): str(value.value) for name, value in pairs if isinstance(value, ast.Constant)}
    return found


def _words(node, known):
    # What is not known when nothing is executed becomes an ellipsis.
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return known.get(ast.unparse(node.value), "…")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _heading(cells):
    sources = [cell.source for cell in cells if cell.cell_type == "markdown"]
    return re.findall(r"^#+ (.+)$", "\n".join(sources), re.M)[-1]


def _what(drawn):
    # The first sentence of the docstring, without what it says of the arguments.
    sentence = re.split(r"[.?](?:\s|$)", " ".join(inspect.getdoc(drawn).split()))[0].removeprefix("Draw ")
    sentence = re.sub(r" ?(\([^)]*\)|\{[^}]*\}|`\([^)]*\)`)", "", sentence)
    clauses = [clause for clause in sentence.split("; ") if not clause.startswith("`")]
    parts = [part for clause in clauses for part in clause.split(": ")]
    said = ": ".join(part for part in parts if not re.search(r"\bdict\b|→|\brows? of\b", part)).replace("`", "")
    return said[0].upper() + said[1:]


def _title(notebook):
    return re.search(r"^# (.+)$", notebook.cells[0].source, re.M)[1]


# Parts of pages


def course_map():
    """Return the lessons with their minutes and what each is about, as a Markdown table."""
    rows, total = [], 0
    for name, notebook in notebooks().items():
        minutes = notebook.metadata["course"]["minutes"]
        title, _, about = _title(notebook).partition(": ")
        rows.append([f"[{name[:2]} {title}](/notebooks/{name})", str(minutes), about[:1].upper() + about[1:]])
        total += minutes
    return f"{_table(['lesson', 'minutes', 'about'], rows)}\n\n{len(rows)} lessons, {total / 60:.0f} hours with the exercises."


def lessons():
    """Return the table of contents of the lessons, which the sidebar shows, in Markdown."""
    entries = [
        f"{name[:2]} {_title(notebook).partition(': ')[0]} </notebooks/{name}>"
        for name, notebook in notebooks().items()
    ]
    return "\n".join(["```{toctree}", ":hidden:", ":caption: Lessons", "", *entries, "```"])


def commands():
    """Return what brings the course to a machine and opens it, in Markdown."""
    address = badges.setting().address
    return f"```sh\ngit clone {address}\ncd {address.rpartition('/')[2]}\nmake lab\n```"


def exercise_index():
    """Return all exercises, grouped by lesson, as Markdown tables with links into the lessons."""
    parts, names = [], {name[:2]: (name, notebook) for name, notebook in notebooks().items()}
    for number in sorted({exercise.notebook for exercise in exercises.every().values()}):
        name, notebook = names[number]
        here = [exercise for exercise in exercises.every().values() if exercise.notebook == number]
        rows = [[f"[{e.title}](#ask-{e.id})", f"`{e.id}`", str(e.minutes), e.difficulty, e.objective] for e in here]
        parts += [f"## [{number} {_title(notebook).partition(': ')[0]}](/notebooks/{name})"]
        parts += [_table(["exercise", "id", "minutes", "difficulty", "you will"], rows)]
        parts += [f'And a quiz of {len(exercises.quiz(number).questions)} questions: `exercises.quiz("{number}")`.']
    return "\n\n".join(parts)


def machines():
    """Return the machines whose numbers are in the ledger, as a Markdown table."""
    facts = ledger.read(files.data_dir() / "ledger.json")["machines"].values()
    rows = [[k, *[", ".join(m[k]) if isinstance(m[k], list) else str(m[k]) for m in facts]] for k in next(iter(facts))]
    return _table(["", *[f"machine {number}" for number, _ in enumerate(facts, 1)]], rows)


def records():
    """Return every number of the ledger with its source and machine, as a Markdown table."""
    content = ledger.read(files.data_dir() / "ledger.json")
    place = {key: f"machine {number}" for number, key in enumerate(content["machines"], 1)}
    rows = [
        [
            subject,
            quantity,
            ledger.format_entry(entry | {"source": "measured"}),
            str(entry.get("n", "–")),
            entry["source"],
        ]
        + [place.get(entry.get("machine"), "–")]
        for subject, quantities in content["records"].items()
        for quantity, entry in quantities.items()
    ]
    return _table(["of", "what", "value [95 %]", "n", "source", "machine"], rows)


def stored_reports():
    """Return what each stored report says of its machine: the A/A test, the ceilings, the conditions, as a Markdown table."""
    rows = []
    for content in report.stored().values():
        tie, ceilings, conditions = content["aa_test"], content["ceilings"], content["conditions"]
        peaks = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in ceilings["operations"].items())
        rows.append(
            [
                f"{content['machine']['cpu']} ({', '.join(content['machine']['isa'])}), {content['date']}",
                str(conditions["rounds"]),
                f"{tie['contained']} of {tie['repeats']}",
                f"{tie['resolution']:.1%}",
                peaks,
                f"{ceilings['bandwidth'] / 1e9:.1f}",
            ]
        )
    head = ["report", "rounds", "A/A intervals that hold 1", "resolution", "10⁹ operations a second", "GB a second"]
    return _table(head, rows)


def data_files():
    """Return the files of `data/` with size, checksum, licence and origin, as a Markdown table."""
    rows = [
        [f"`{name}`", f"{entry['bytes']:,}", f"`{entry['sha256'][:12]}…`", entry["licence"], entry.get("origin", "–")]
        for name, entry in files.read_manifest().items()
    ]
    return _table(["file", "bytes", "sha256", "licence", "origin"], rows)


def checkpoints():
    """Return the trained networks with what training took and what they reach, as a Markdown table."""
    rows = []
    for name, entry in files.read_manifest().items():
        if "recipe" in entry:
            kind, reached = next((k, entry[k]) for k in ("accuracy", "loss") if k in entry)
            scored = f"{kind} {reached['test']:.4f} [{reached['low']:.4f}, {reached['high']:.4f}]"
            rows.append([f"`{name}`", f"{entry['seconds'] / 60:.0f}", entry["machine"]["cpu"], scored])
    return _table(["network", "minutes to train", "on", "on the test data [95 %]"], rows)


def module_index():
    """Return the public modules of the package with the first sentence of each, as a Markdown table."""
    rows = [[f"[`{name}`](/docs/api/{name}.rst)", _summary(name)] for name in modules()]
    return _table(["module", "what it holds"], rows)


def modules():
    """Return the names of the public modules of the package, those of one level; `tools` last, which only the Makefile calls."""
    names = [m.name for m in pkgutil.iter_modules(course_utils.__path__) if not m.name.startswith("_")]
    return sorted(names, key=lambda name: (name == "tools", name))


def parts():
    """Return what stands in the pages as `{{ name }}`: dict of name → Markdown."""
    makers = (
        lessons,
        course_map,
        commands,
        exercise_index,
        machines,
        records,
        stored_reports,
        data_files,
        checkpoints,
        module_index,
    )
    return {maker.__name__: maker() for maker in makers} | {"launch": badges.setting().links(next(iter(notebooks())))}


def _table(header, rows):
    # Not `Table`, which escapes what looks like Markdown, and sets numbers right.
    cells = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells])


# The API


def api_page(name):
    """Return the page of one module of the package in reStructuredText, its public names each documented once.

    A name that one module offers from another is documented where it is offered. Left out are the solutions of exercises, and
    the engines, which all have the same few functions and whose packages need not be here.
    """
    module = f"course_utils.{name}"
    lines = [module, "=" * len(module), ""]
    for path in [module, *_inside(module)]:
        shown = importlib.import_module(path)
        offered = sorted({n for m in _offering() if m is not shown for n in m.__all__ if _home(m, n) == path})
        if path != module:
            lines += [path, "-" * len(path), ""]
        lines += [f".. automodule:: {path}", *(["   :no-index:"] if path != module else [])]
        if not path.startswith("course_utils.tools."):
            lines += ["   :members:", *([f"   :exclude-members: {', '.join(offered)}"] if offered else [])]
        lines += [""]
    return "\n".join(lines)


def _inside(module):
    package = importlib.import_module(module)
    inside = [m.name for m in pkgutil.iter_modules(getattr(package, "__path__", ()))]
    hidden = {exercises: exercises.MODULES.values(), backends: backends.FAMILIES}.get(package, ())
    return [f"{module}.{name}" for name in inside if not name.startswith("_") and name not in hidden]


def _offering():
    found = [importlib.import_module(f"course_utils.{name}") for name in modules()]
    return [module for module in found if hasattr(module, "__all__")]


def _home(module, name):
    return getattr(getattr(module, name), "__module__", None)


def _summary(name):
    return inspect.getdoc(importlib.import_module(f"course_utils.{name}")).split("\n\n")[0].replace("\n", " ")


# Building


def assemble(target):
    """Write the tree that Sphinx reads into the folder `target`, which must be empty."""
    shutil.copytree(DOCS, target / "docs", ignore=shutil.ignore_patterns("_*", "conf.py", "*.ipynb"))
    (target / "docs" / "index.md").rename(target / "index.md")
    for name in PAGES_AT_THE_ROOT:
        shutil.copy(ROOT / name, target)
    for name in modules():
        (target / "docs" / "api" / f"{name}.rst").write_text(api_page(name), encoding="utf-8")
    (target / "notebooks").mkdir()
    for name, notebook in notebooks().items():
        nbformat.write(lesson(notebook), target / "notebooks" / name)


def build(target):
    """Build the site into the folder `target`, which is replaced in one step when all went well.

    Raises `RuntimeError` when `target` holds something else than a site, or when Sphinx warns of anything; its lines, on stderr,
    say of what. `target` then stays as it was.
    """
    from sphinx.cmd.build import build_main

    target = Path(target)
    if target.exists() and not (target / "objects.inv").exists():
        raise RuntimeError(f"{target} is there and is no site that was built before: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        source, html = Path(scratch, "source"), Path(scratch, "html")
        source.mkdir()
        assemble(source)
        options = ["-q", "-W", "--keep-going", "-j", "auto", "-c", str(DOCS), "-d", str(Path(scratch, "doctrees"))]
        if build_main([*options, str(source), str(html)]):
            raise RuntimeError("the site was not built: Sphinx's warnings above say why")
        if target.exists():
            target.rename(Path(scratch, "old"))
        html.rename(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=None, help="default: results/site")
    folder = parser.parse_args().folder or files.results_dir() / "site"
    try:
        build(folder)
    except RuntimeError as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: make setup, or pip install 'squeeze-and-speed-up[site]'")
    pages = [page for page in folder.rglob("*.html") if "_static" not in page.parts]
    print(f"{len(pages)} pages; the first is {folder / 'index.html'}")


if __name__ == "__main__":
    main()
