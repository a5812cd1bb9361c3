"""Make slides of the notebooks, as they are committed, by rules: `make slides`, one page a notebook into results/slides.

There is no second source. Headings start a slide, and what does not fit on one goes on to the next:

- text as it stands; a paragraph that asks for a prediction ends its slide, so that the answer is not beside it
- code of a few lines open, longer code folded, and none of imports, parameters and guesses
- pictures, tables and printed text, each as large as its slide allows; the still picture in the place of an explorer
- each question of the quiz, and each exercise with its stub, as a slide of its own

The pages ask no other machine: reveal.js is copied beside them from the package `sphinx-revealjs`.
"""

import argparse
import base64
import html
import importlib.metadata
import re
import shutil
import struct
import sys
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from course_utils import exercises, files
from course_utils.exercises.predictions import NO_GUESS

ROOT = Path(__file__).resolve().parents[2]
REVEAL = "reveal.js"  # the folder beside the pages
WIDTH, HEIGHT = 1280, 720  # pixels of a slide, which the browser then makes as large as its window
LINES, CHARACTERS = 14, 76  # of text on a slide
LINE = 42  # pixels of a line of text
WRAPPED = 17  # pixels of a letter, below which printed sentences are wrapped
SHORT = 6  # lines of code that are shown
HEADING = re.compile(r"(#{1,4}) (.*)")
PREDICT = re.compile(r"\*\*([Pp]redict|Before you run)")
LAUNCH = re.compile(r"\[Open in ")
CHORES = re.compile(r"import |from |(figure = )?explorer|ledger\.claim|exercises\.reveal")
HOW_TO_ANSWER = re.compile(r"<p>To answer: .*</p>$")
GUESSES = re.compile(r"([A-Z0-9_]+(, [A-Z0-9_]+)* = (None|\{.*None\}).*\n?)+")
STYLE = """
.reveal { font-size: 30px; }
.reveal .slides section { text-align: left; height: 100%; box-sizing: border-box; padding: 6px 20px; }
.reveal .jp-Cell { padding: 0; } .reveal .jp-InputPrompt, .reveal .jp-InputCollapser { display: none; }
.reveal .jp-RenderedHTMLCommon { font-size: 30px; line-height: 1.4; padding: 0; overflow: visible; }
.reveal h1, .reveal h2, .reveal h3, .reveal h4 { text-transform: none; margin: 0.2em 0 0.5em; line-height: 1.15; }
.reveal h1 { font-size: 52px; } .reveal h2 { font-size: 42px; } .reveal h3, .reveal h4 { font-size: 34px; }
.reveal .where { font-size: 18px; color: #5f5f5f; margin: 0 0 8px; }
.reveal .predict { border-left: 8px solid #c2571a; padding-left: 18px; }
.reveal img.picture { display: block; margin: 0 auto; border: 0; }
.reveal pre { width: 100%; box-shadow: none; margin: 6px 0; line-height: 1.25; overflow: auto; background: #f6f6f6; }
.reveal .jp-RenderedHTMLCommon pre.printed { max-height: 590px; background: none; white-space: pre; overflow: auto; }
.reveal .jp-RenderedHTMLCommon .highlight pre { font-size: inherit; padding: 8px; max-height: 590px; white-space: pre; }
.reveal .jp-RenderedHTMLCommon table { font-size: 23px; margin: 8px 0; }
.reveal .jp-RenderedHTMLCommon td, .reveal .jp-RenderedHTMLCommon th { max-width: none; padding: 3px 10px; text-align: left; }
.reveal details { font-size: 26px; margin: 6px 0; } .reveal summary { cursor: pointer; }
.reveal details.fold[open] { position: absolute; inset: 8px 20px; overflow: auto; z-index: 2; background: #fff;
    border: 1px solid #999; padding: 8px 16px; }
"""
# nbconvert's own template, without what it would fetch for every page; notebooks here have no formulas and no Mermaid.
TEMPLATE = """{%- extends 'reveal/index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block footer_js %}
<style>STYLE</style>
<script src="{{ resources.reveal.url_prefix }}/dist/reveal.js"></script>
<script>
Reveal.initialize({width: WIDTH, height: HEIGHT, margin: 0.02, hash: true, slideNumber: "c/t", center: false, transition: "none"});
</script>
{% endblock %}"""
for _name, _value in (("STYLE", STYLE), ("WIDTH", WIDTH), ("HEIGHT", HEIGHT)):
    TEMPLATE = TEMPLATE.replace(_name, str(_value))


class SlidesError(RuntimeError):
    """No slides can be made; the message says why and what to do."""


class _Deck:
    """Slides that fill one after the other; each has pieces of Markdown, with HTML in it."""

    def __init__(self):
        self.slides = []  # (type, pieces)
        self.where, self.lines = "", 0

    def start(self, kind="subslide", heading=None):
        """Begin a slide, a new column of them where `kind` is "slide"; without a heading it says where we are."""
        if heading is not None:
            self.where = re.sub(r"[#*`]", "", heading).strip()
        where = f'<p class="where">{html.escape(self.where)}</p>' if self.where else ""
        self.slides.append((kind, [heading or where]))
        self.lines = 2 if heading else 1

    def add(self, piece, lines):
        """Put a piece that takes so many lines on this slide if there is room, or on a new one."""
        self.room(lines)
        self.slides[-1][1].append(piece)
        self.lines += lines

    def room(self, lines):
        """Start a new slide unless this one has room for so many lines."""
        if not self.slides or (self.lines + lines > LINES and self.lines > 2):
            self.start()

    def end(self):
        """What comes next goes on a new slide."""
        self.lines = LINES

    def cells(self):
        for kind, pieces in self.slides:
            yield new_markdown_cell("\n\n".join(pieces), metadata={"slideshow": {"slide_type": kind}})


def deck(notebook, number):
    """Return the slides of a committed `notebook`, the one with this `number` ("00"), as a notebook of Markdown cells."""
    made = _Deck()
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "markdown":
            _add_text(made, cell.source)
        elif "exercise" in tags:
            stub = cell.source.rpartition("\n\n")[0].strip()
            made.add(_code(stub), _height_of_code(stub))
            made.end()
        elif "exercises.quiz(" in cell.source:
            for question in exercises.quiz(number).questions:
                made.start()
                made.add(HOW_TO_ANSWER.sub("", exercises.quiz(question.id)._repr_html_()), LINES)
        elif "parameters" not in tags:
            _add_run(made, cell)
    return new_notebook(cells=list(made.cells()), metadata={"title": made.slides[0][1][0].strip("# ")})


def _add_text(made, source):
    for block in _blocks(_linked(source)):
        if heading := HEADING.fullmatch(block):
            made.start("slide" if len(heading[1]) <= 2 else "subslide", block)
        elif LAUNCH.match(block):
            continue
        elif PREDICT.search(block):
            made.add(f'<div class="predict">\n\n{block}\n\n</div>', _height(block))
            made.end()
        elif block.startswith("<details>"):
            made.add(block.replace("<details>", '<details class="fold">', 1), 1)
        else:
            made.add(block, _height(block))


def _add_run(made, cell):
    """Add a code cell that was run: its code, open if it is short and fits on one slide with what it showed, and that."""
    code = cell.source.strip()
    shown = [piece for output in cell.outputs for piece in _pieces(output, made.where)]
    short = len(code.splitlines()) <= SHORT and _height_of_code(code) + sum(lines for _, lines in shown) <= LINES - 1
    if CHORES.match(code) or GUESSES.fullmatch(code) or not (shown or short):
        code = None
    elif short:
        made.room(_height_of_code(code) + sum(lines for _, lines in shown))
        made.add(_code(code), _height_of_code(code))
    for piece, lines in shown:
        made.add(piece, lines)
    if shown and code and not short:
        made.add(f'<details class="fold"><summary>code</summary>\n\n{_code(code)}\n\n</details>', 0)


def _code(code):
    size = _size(code, 20)
    return f'<div style="font-size: {size:.1f}px">\n\n```python\n{code}\n```\n\n</div>'


def _height_of_code(code):
    return len(code.splitlines()) * _size(code, 20) * 1.25 / LINE + 0.9


def _size(text, largest):
    """Return the pixels of a letter with which `text` fits on a slide, if they are not too few to read: then it is scrolled."""
    lines = text.splitlines()
    fits = 1.6 * (WIDTH - 80) / max(map(len, lines)), (HEIGHT - 150) / 1.25 / len(lines)
    return max(min(largest, *fits), 11)


def _pieces(output, subject):
    """Yield `(HTML, lines)` of one output of a cell, which is about `subject`."""
    kinds = output.get("data", {})
    if "image/png" in kinds:
        yield _picture(kinds["image/png"], subject)
    elif "application/vnd.jupyter.widget-view+json" in kinds:
        return  # its still picture follows
    elif text := (output.get("text") or kinds.get("text/plain", "")).rstrip():
        yield _printed(text.replace(f"   ({NO_GUESS})", ""))


def _picture(data, subject):
    width, height = struct.unpack(">II", base64.b64decode(data[:64])[16:24])
    scale = min((WIDTH - 60) / width, (HEIGHT - 110) / height, 1.6)  # drawn larger it looks coarse
    source = "data:image/png;base64," + data.replace("\n", "")
    alt = html.escape(f"Picture: {subject}")
    tag = f'<img class="picture" src="{source}" alt="{alt}" width="{width * scale:.0f}" height="{height * scale:.0f}">'
    return tag, min(height * scale / LINE + 0.4, LINES - 1)


def _printed(text):
    size, style = _size(text, 22), ""
    lines = [len(line) for line in text.splitlines()]
    if size < WRAPPED and len(lines) <= SHORT:  # sentences, and no table: better in two lines than too small
        size, style = WRAPPED, "; white-space: pre-wrap"
        lines = [row for length in lines for row in range(1 + int(0.6 * size * length // (WIDTH - 80)))]
    takes = min(len(lines) * size * 1.25 / LINE + 0.6, LINES - 1)
    return f'<pre class="printed" style="font-size: {size:.1f}px{style}">{_unblanked(html.escape(text))}</pre>', takes


def _unblanked(text):
    # An empty line would end a block of HTML in Markdown.
    return re.sub(r"\n(?=\n)", "\n&#8203;", text)


def _blocks(source):
    """Return paragraphs, headings, whole lists, tables, fenced code and `<details>` of Markdown, long lists item by item."""
    blocks, inside = [""], ""
    for line in source.splitlines():
        if not inside and not line.strip() or HEADING.match(line) and not inside:
            blocks.append("")
        if line.strip() or inside:
            blocks[-1] += line + "\n"
        if inside and inside in line:
            inside = ""
        elif line.startswith("```"):
            inside = "```"
        elif line.startswith("<details>") and "</details>" not in line:
            inside = "</details>"
        elif HEADING.match(line) and not inside:
            blocks.append("")
    found = [block.strip() for block in blocks if block.strip()]
    return [part for block in found for part in _items(block)]


def _items(block):
    if _height(block) > LINES / 2 and re.match(r"[-*] ", block):
        return re.split(r"\n(?=[-*] )", block)
    return [block]


def _height(block):
    """Return about how many lines a block takes."""
    lines = block.splitlines()
    if block.startswith("|"):
        return sum(0.9 + 0.8 * (len(line) // 130) for line in lines)
    return sum(-(-len(line) // CHARACTERS) for line in lines) + 0.6


def _linked(source):
    return re.sub(r"\((\d\d_\w+)\.ipynb", r"(\1.html", source)


def make(folder=ROOT / "notebooks", target=None):
    """Write the slides of every notebook in `folder` to `target` (results/slides); return the paths of the pages.

    Raises `SlidesError` without the package that brings reveal.js.
    """
    try:
        distribution = importlib.metadata.distribution("sphinx-revealjs")
    except importlib.metadata.PackageNotFoundError:
        raise SlidesError(
            "reveal.js is not here: `pip install sphinx-revealjs` brings it, as `make setup` does."
        ) from None
    target = Path(target or files.results_dir() / "slides")
    reveal = Path(distribution.locate_file("sphinx_revealjs/_static/revealjs"))
    for part in ("LICENSE", "dist/reveal.css", "dist/reveal.js", "dist/theme/white.css"):
        (target / REVEAL / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(reveal / part, target / REVEAL / part)
    fonts = "dist/theme/fonts/source-sans-pro"
    shutil.copytree(reveal / fonts, target / REVEAL / fonts, dirs_exist_ok=True)
    exporter = SlidesExporter(raw_template=TEMPLATE, reveal_url_prefix=REVEAL, reveal_theme="white")
    pages = []
    for path in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")):
        page, _ = exporter.from_notebook_node(deck(nbformat.read(path, as_version=4), path.name[:2]))
        files.write_text(target / f"{path.stem}.html", page)
        pages.append(target / f"{path.stem}.html")
    return pages


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m course_utils.tools.slides", description=__doc__.partition("\n")[0])
    parser.parse_args(arguments)
    try:
        for page in make():
            print(page)
    except (SlidesError, OSError) as error:
        print(f"No slides were made. {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
