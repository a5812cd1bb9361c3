"""The web edition: everything is on it, every link holds, nothing is asked of another machine, and everybody can read it.

The site is built once for all workers. What needs a browser is skipped where there is none, but fails where COURSE_BROWSER=1.
"""

import functools
import http.server
import inspect
import json
import os
import re
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import filelock
import nbformat
import pytest
from bs4 import BeautifulSoup

from course_utils import exercises, report
from course_utils.tools import badges, site
from tests import toys
from tests.test_browser import chromium
from tests.test_house import PUBLIC
from tests.toys import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# Axe looks at each word of a program and each cell of a table for its contrast, which takes minutes in a long lesson. On these
# pages it may; on others programs lose their colours, and tables the rows after the third, before it looks.
WITH_ALL = ("notebooks/00_start_here.html", "docs/add-an-engine.html")
# Pages of the API are made alike, from one stylesheet: the colours of two of them are those of all.
LOOKS = (("light", {}), ("dark", {"runOnly": ["color-contrast"]}))
LOOKS_ALIKE = (("light", {"rules": {"color-contrast": {"enabled": False}}}),)
SHORTEN = """() => {
    document.querySelectorAll(".highlight pre").forEach(pre => pre.textContent = pre.textContent);
    document.querySelectorAll("tbody tr:nth-child(n+4)").forEach(row => row.remove());
}"""
THEME = "theme => { document.documentElement.dataset.theme = document.documentElement.dataset.mode = theme; }"
TOO_WIDE = """() => document.documentElement.scrollWidth > innerWidth || document.body.scrollWidth > innerWidth"""
FONT = """() => Math.min(...[...document.querySelectorAll("article p, article li, article td")]
    .filter(e => e.offsetParent).map(e => parseFloat(getComputedStyle(e).fontSize)))"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the built site."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared
    with filelock.FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            site.build(shared / "site")
    return shared / "site"


@pytest.fixture(scope="module")
def pages(built):
    """All pages as a dict of their path within the site → `BeautifulSoup`."""
    return {
        path.relative_to(built).as_posix(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(built.rglob("*.html"))
        if "_static" not in path.parts
    }


@pytest.fixture(scope="module")
def address(built):
    """The address under which the site is served on this machine."""
    handler = functools.partial(Quiet, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def words(text):
    return " ".join(text.split())


def outputs(path):
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]


def test_every_lesson_document_and_module_has_its_page(pages):
    expected = {f"notebooks/{path.stem}.html" for path in NOTEBOOKS} | {"index.html", "search.html"}
    expected |= {f"docs/api/{name}.html" for name in site.modules()}
    for path in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in site.PAGES_AT_THE_ROOT)]:
        if path != ROOT / "docs" / "index.md":
            expected.add(path.relative_to(ROOT).with_suffix(".html").as_posix())
    assert set(pages) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_lesson_shows_every_picture_text_table_and_answer_of_its_notebook(pages, path):
    page, found = pages[f"notebooks/{path.stem}.html"].article, outputs(path)
    data = [output.get("data", {}) for output in found]
    assert len(page.select(".cell_output img")) == sum("image/png" in each for each in data) > 0
    tables = sum(("text/markdown" in each) + each.get("text/html", "").count("<table") for each in data)
    assert len(page.select(".cell_output table")) == tables
    shown = words(page.get_text())
    for output in found:
        assert words(output.get("text", "")) in shown
    for each in data:
        if "text/html" in each:
            assert words(BeautifulSoup(each["text/html"], "html.parser").get_text()) in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_widget_leaves_its_still_version_and_no_script(pages, path):
    page = pages[f"notebooks/{path.stem}.html"]
    widgets = [output for output in outputs(path) if site.WIDGET_VIEW in output.get("data", {})]
    stills = [
        block for block in page.select(".cell") if "explorer.still()" in block.select_one(".cell_input").get_text()
    ]
    assert len(stills) == len(widgets)
    assert all(block.select_one(".cell_output img") for block in stills)
    assert not page.select("script[type^='application/vnd.jupyter']") and "html-manager" not in str(page)


def test_every_link_and_picture_leads_to_something(pages, built):
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    broken, repository = [], badges.setting()
    for name, page in pages.items():
        for tag in page.select("[href], [src]"):
            target = tag.get("href", tag.get("src"))
            if files := re.match(rf"{repository.address}/(?:blob|tree)/{repository.branch}/(.+)", target):
                if not (ROOT / unquote(files[1].partition("#")[0])).exists():
                    broken.append(f"{name}: {target}")
            if urlsplit(target).scheme:
                continue
            file, anchor = urldefrag(target)
            path = (built / name).parent / unquote(file.partition("?")[0]) if file else built / name
            local = Path(os.path.relpath(path, built)).as_posix()
            if not path.is_file() or (anchor and local in anchors and unquote(anchor) not in anchors[local]):
                broken.append(f"{name}: {target}")
    assert not broken, "\n".join(broken)


def test_every_picture_has_words_for_who_cannot_see_it(pages):
    for name, page in pages.items():
        for picture in page.select("img"):
            assert len(picture.get("alt", "").split()) >= 4, f"{name}: {picture}"
    inside = [picture["alt"] for page in pages.values() for picture in page.select(".cell_output img")]
    assert len(set(inside)) == len(inside), "two pictures have the same words"


def entries(pages):
    """Yield the entries of the glossary as `(names, anchor, definition)`."""
    for definition in pages["docs/glossary.html"].select("dl.glossary dd"):
        terms = []
        for sibling in definition.find_previous_siblings():
            if sibling.name == "dd":
                break
            terms.insert(0, sibling)
        yield [simple(term.find(string=True)) for term in terms], terms[0]["id"], definition


def simple(text):
    return words(text.lower().replace("-", " "))


def test_the_first_mention_of_a_term_leads_to_the_glossary(pages):
    names = {anchor: names for names, anchor, _ in entries(pages)}
    for path in NOTEBOOKS:
        article = pages[f"notebooks/{path.stem}.html"].article
        links = [(urldefrag(link["href"]).fragment, simple(link.get_text())) for link in article.select("a.term")]
        assert len({anchor for anchor, _ in links}) == len(links) >= 5, "a term is linked once in a lesson"
        assert all(text.rstrip("s") in {name.rstrip("s") for name in names[anchor]} for anchor, text in links)
        assert not article.select(":is(h1, h2, h3, h4, table, pre, .cell_output) a.term")
        within = article.select("h1, h2, h3, h4, table, pre, code, .cell_output, a:not(.term)")
        closed = {id(text) for tag in within for text in tag.find_all(string=True)}
        open_text = simple("¦".join(text for text in article.find_all(string=True) if id(text) not in closed))
        for anchor, each in names.items():
            if any(re.search(rf"(?<![\w-]){re.escape(name)}s?(?![\w-])", open_text) for name in each):
                assert anchor in {anchor for anchor, _ in links}, f"{path.stem} mentions {each}, and nothing is linked"


def test_an_entry_of_the_glossary_is_two_sentences_and_names_a_lesson_that_has_the_term(pages):
    wrong = []
    for names, _, definition in entries(pages):
        lesson = definition.select_one("a[href*=notebooks]")
        page = pages[os.path.normpath(f"docs/{lesson['href']}").replace(os.sep, "/")]
        sentences = re.findall(r"[.?](?=\s)", words(definition.get_text()))
        if len(sentences) != 2 or not any(name in simple(page.article.get_text(" ")) for name in names):
            wrong.append(f"{names}, {len(sentences)} sentences, {lesson['href']}")
    assert not wrong, "\n".join(wrong)


def test_the_index_leads_to_every_exercise_in_its_lesson(pages):
    page, names = pages["docs/exercises.html"].article, {path.stem[:2]: path.stem for path in NOTEBOOKS}
    for exercise in exercises.every().values():
        (link,) = page.select(f"a[href='../notebooks/{names[exercise.notebook]}.html#ask-{exercise.id}']")
        assert link.get_text() == exercise.title
        row = words(link.find_parent("tr").get_text(" "))
        assert row.endswith(f"{exercise.id} {exercise.minutes} {exercise.difficulty} {exercise.objective}")


def test_formulas_are_written_as_mathml(pages):
    formulas = pages["docs/glossary.html"].select("math")
    assert formulas and not pages["docs/glossary.html"].select("script[src*=mathjax i]")
    assert any(formula.select("mfrac") for formula in formulas)


def test_the_api_has_every_public_name_and_no_solution_of_an_exercise(pages):
    documented = {tag["id"] for page in pages.values() for tag in page.select("dt[id^='course_utils.']")}
    documented = {name.removeprefix("course_utils.") for name in documented}
    wanted = {f"{module}.{name.partition('(')[0]}" for module, names in PUBLIC.items() for name in names}
    assert {name for name in wanted if not name.startswith("formats.")} <= documented
    shown = words(pages["docs/api/exercises.html"].article.get_text())
    for exercise in exercises.every().values():
        assert words(inspect.getdoc(exercise.solution).splitlines()[0])[:60] not in shown


@pytest.fixture
def small_course(tmp_path, monkeypatch):
    """A course of two notebooks with other numbers than ours: what is gathered from a course is gathered from this one."""
    for name, minutes, title in (
        ("00_a.ipynb", 30, "Start here: what it is"),
        ("01_b.ipynb", 90, "Numbers: how they go"),
    ):
        toys.write_notebook(tmp_path / "notebooks" / name, minutes=minutes)
        toys.edit(tmp_path / "notebooks" / name, lambda n, title=title: n.cells[0].update(source=f"# {title}"))
    (tmp_path / "notebooks" / "draft.ipynb").touch()
    (tmp_path / "docs" / "_build").mkdir(parents=True)
    for name in ("docs/index.md", "docs/more.md", "docs/conf.py", "docs/_build/old.md", *site.PAGES_AT_THE_ROOT):
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "docs" / "api").mkdir()
    machine = {"cpu": "Z80", "isa": ["avx2", "amx"]}
    entry = {"value": 2.5, "unit": "ms", "low": 2, "high": 3, "n": 7, "source": "measured", "machine": "abc"}
    records = {"FP|32": {"latency": entry}, "blog": {"size": {"value": 5, "unit": "×", "source": "cited"}}}
    reached = {"test": 0.5, "low": 0.25, "high": 0.75}
    trained = {
        "recipe": {},
        "seconds": 600,
        "machine": machine,
        "licence": "MIT",
        "bytes": 1234,
        "sha256": "0123456789abcdef",
    }
    contents = {
        "ledger.json": {"version": 1, "machines": {"abc": machine}, "records": records},
        "manifest.json": {
            "net": trained | {"accuracy": reached},
            "words": trained | {"loss": reached, "origin": "here", "seconds": 60},
            "text": {"bytes": 5, "sha256": "f" * 64, "licence": "CC0"},
        },
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "DOCS", tmp_path / "docs")
    return tmp_path


def rows(table):
    """The rows of a Markdown table below its head, each a list of cells."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_tables_of_a_page_have_what_ledger_manifest_and_notebooks_say(small_course):
    assert rows(site.course_map()) == [
        ["[00 Start here](/notebooks/00_a.ipynb)", "30", "What it is"],
        ["[01 Numbers](/notebooks/01_b.ipynb)", "90", "How they go"],
    ]
    assert "2 lessons, 2 hours with the exercises." in site.course_map()
    assert site.lessons().splitlines()[-3:] == [
        "00 Start here </notebooks/00_a.ipynb>",
        "01 Numbers </notebooks/01_b.ipynb>",
        "```",
    ]
    assert rows(site.machines()) == [["cpu", "Z80"], ["isa", "avx2, amx"]]
    assert rows(site.records()) == [
        [r"FP\|32", "latency", "2.5 ms [2, 3]", "7", "measured", "machine 1"],
        ["blog", "size", "5.00×", "–", "cited", "–"],
    ]
    assert rows(site.data_files()) == [
        ["`net`", "1,234", "`0123456789ab…`", "MIT", "–"],
        ["`words`", "1,234", "`0123456789ab…`", "MIT", "here"],
        ["`text`", "5", "`ffffffffffff…`", "CC0", "–"],
    ]
    assert rows(site.checkpoints()) == [
        ["`net`", "10", "Z80", "accuracy 0.5000 [0.2500, 0.7500]"],
        ["`words`", "1", "Z80", "loss 0.5000 [0.2500, 0.7500]"],
    ]


def test_what_stands_in_pages_is_of_the_course_that_is_here(small_course, monkeypatch):
    def exercise_index():
        return ""  # of exercises there are ours only

    monkeypatch.setattr(site, "exercise_index", exercise_index)
    monkeypatch.setattr(site.report, "stored", dict)
    here = site.parts()
    assert here["course_map"] == site.course_map() and here["machines"] == site.machines()
    with monkeypatch.context() as patch:
        patch.setattr(site, "ROOT", ROOT)
        patch.delenv("COURSE_DATA")
        ours = site.parts()
    same = {name for name in here if here[name] == ours[name]}
    assert set(here) == set(ours) and same == {"exercise_index", "commands", "stored_reports", "module_index"}


def test_the_exercises_are_listed_under_the_title_of_their_lesson(monkeypatch):
    ours, every = site.notebooks(), exercises.every()
    for title, few in (("Numbers", list(every.values())[:3]), ("Figures", list(every.values())[2:9])):
        for notebook in ours.values():
            notebook.cells[0].source = f"# {title}: and more"
        monkeypatch.setattr(site, "notebooks", lambda: ours)
        monkeypatch.setattr(exercises, "every", lambda few=few: {e.id: e for e in few})
        page = site.exercise_index()
        shown = re.findall(r"^\| \[(.*)\]\(#ask-(.*?)\) \| `(.*?)` \| (\d+) \| ", page, re.M)
        assert shown == [(e.title, e.id, e.id, str(e.minutes)) for e in few]
        numbers = re.findall(rf"^## \[(\d\d) {title}\]\(/notebooks/(\d\d)_", page, re.M)
        assert numbers == [(n, n) for n in sorted({e.notebook for e in few})]


def test_the_address_to_clone_is_that_of_the_setting(monkeypatch):
    for repository in ("me/course", "you/other"):
        monkeypatch.setattr(site.badges, "setting", lambda r=repository: badges.Course(r, "main"))
        assert (
            f"git clone https://github.com/{repository}\ncd {repository[repository.index('/') + 1 :]}\n"
            in site.commands()
        )


def test_a_stored_report_is_a_row(monkeypatch):
    (content, *_) = report.stored().values()
    for rounds in (5, 7):
        changed = content | {"conditions": content["conditions"] | {"rounds": rounds}, "date": "1999-01-02"}
        monkeypatch.setattr(site.report, "stored", lambda changed=changed: {"one": changed, "two": changed})
        (row, again) = rows(site.stored_reports())
        assert row == again and row[0].endswith("), 1999-01-02") and row[1] == str(rounds)
        assert row[3] == f"{content['aa_test']['resolution']:.1%}"
        assert row[5] == f"{content['ceilings']['bandwidth'] / 1e9:.1f}"


def test_modules_of_the_package_are_found_with_their_first_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(site.course_utils, "__path__", [*site.course_utils.__path__, str(tmp_path)])
    before = site.modules()
    (tmp_path / "zebra.py").write_text('"""Stripes,\nblack and white.\n\nMore.\n"""\n')
    (tmp_path / "_hidden.py").touch()
    assert site.modules() == [*before[:-1], "zebra", "tools"]
    assert rows(site.module_index())[-2] == ["[`zebra`](/docs/api/zebra.rst)", "Stripes, black and white."]
    assert len(rows(site.module_index())) == len(before) + 1
    sys.modules.pop("course_utils.zebra")


def test_the_tree_for_sphinx_lies_as_the_repository_does(small_course, tmp_path, monkeypatch):
    for modules in (["stats"], ["affine", "tables"]):
        monkeypatch.setattr(site, "modules", lambda modules=modules: modules)
        target = tmp_path / modules[0]
        target.mkdir()
        site.assemble(target)
        found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        api = {f"docs/api/{name}.rst" for name in modules}
        pages = {"index.md", "docs/more.md", "notebooks/00_a.ipynb", "notebooks/01_b.ipynb", *site.PAGES_AT_THE_ROOT}
        assert found == pages | api
        assert (target / "docs/api" / f"{modules[0]}.rst").read_text(encoding="utf-8") == site.api_page(modules[0])


@pytest.fixture
def visit(browser, address):
    """Return a function that opens a page of the site and fails when anything is asked of another machine or is not there."""
    contexts = []

    def opened(width, height=900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.trouble = []
        page.on("request", lambda r: r.url.startswith((address, "data:")) or page.trouble.append(f"asks for {r.url}"))
        page.on("response", lambda r: r.status < 400 or page.trouble.append(f"{r.status} for {r.url}"))
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()


def troubles(page, name, width):
    """What is wrong with the size of a page that is open."""
    if page.evaluate(TOO_WIDE):
        yield f"{name} is wider than {width} pixels"
    if (smallest := page.evaluate(FONT)) < 12:
        yield f"{name} has text of {smallest} pixels"


def test_every_page_fits_a_telephone_and_asks_nobody(visit, address, pages):
    page, found = visit(390), []
    for name in pages:
        page.goto(f"{address}/{name}", wait_until="load")
        found += troubles(page, name, 390)
    assert not [*found, *page.trouble], "\n".join([*found, *page.trouble])


def test_every_page_fits_a_desk_and_axe_finds_no_serious_fault_in_light_or_dark(visit, address, pages):
    from axe_playwright_python.sync_playwright import Axe

    page, found = visit(1400), []
    alike = [name for name in pages if name.startswith("docs/api/")][2:]
    for name in pages:
        page.goto(f"{address}/{name}", wait_until="load")
        found += troubles(page, name, 1400)
        page.add_style_tag(content="* { transition: none !important }")  # or colours are looked at half-way
        if name not in WITH_ALL:
            page.evaluate(SHORTEN)
        for theme, options in LOOKS if name not in alike else LOOKS_ALIKE:
            page.evaluate(THEME, theme)
            quick = {"resultTypes": ["violations"], "preload": False}
            for fault in Axe().run(page, options=options | quick).response["violations"]:
                if fault["impact"] in ("serious", "critical"):
                    found += [f"{name}, {theme}: {fault['id']}: {node['html'][:150]}" for node in fault["nodes"][:3]]
    assert not [*found, *page.trouble], "\n".join([*found, *page.trouble])


def test_search_finds_a_word_and_leads_to_the_lesson(visit, address):
    page = visit(1400)
    page.goto(f"{address}/search.html?q=oscillations")
    page.wait_for_selector("#search-results a")
    links = [link.get_attribute("href") for link in page.locator("#search-results a").all()]
    assert any("03_quantization_aware_training" in link for link in links)
    assert not page.trouble


def test_the_first_page_sells_the_course_in_one_screen(visit, address):
    page = visit(1400)
    page.goto(f"{address}/index.html")
    places = [
        page.locator("article img"),
        *(page.get_by_text(words, exact=True) for words in ("Read here.", "Run in the browser.")),
    ]
    places += [page.get_by_text("Run on your machine.", exact=True), page.locator("article table")]
    for place in places:
        box = place.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900, f"{place} ends at {box['y'] + box['height']}"


def test_a_warning_of_sphinx_leaves_the_old_site_in_place(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    for name in ("index.html", "objects.inv"):
        (tmp_path / "site" / name).write_text("old")
    monkeypatch.setattr("sphinx.cmd.build.build_main", lambda arguments: 1)
    with pytest.raises(RuntimeError, match="warnings above"):
        site.build(tmp_path / "site")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (tmp_path / "site" / "index.html").read_text() == "old"


def test_the_command_says_how_many_pages_there_are_or_why_there_are_none(tmp_path, monkeypatch, capsys):
    def build(folder):
        if "not" in folder.name:
            raise RuntimeError("a page is missing")
        if "no sphinx" in folder.name:
            raise ModuleNotFoundError(name="sphinx")
        for name in ("index.html", "docs/a.html", "_static/b.html", "a.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    monkeypatch.setattr(site, "build", build)
    monkeypatch.setattr(site.files, "results_dir", lambda: tmp_path)
    for arguments, folder in (([], "site"), ([str(tmp_path / "mine")], "mine")):
        monkeypatch.setattr("sys.argv", ["site", *arguments])
        site.main()
        assert capsys.readouterr().out == f"2 pages; the first is {tmp_path / folder / 'index.html'}\n"
    for folder, why in (("not", "a page is missing"), ("no sphinx", "sphinx is not installed: make setup")):
        monkeypatch.setattr("sys.argv", ["site", str(tmp_path / folder)])
        with pytest.raises(SystemExit, match=why):
            site.main()


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="name another folder"):
        site.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_picture_that_no_function_of_the_course_drew_is_named():
    cells = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("plt.plot([1, 2])")]).cells
    with pytest.raises(ValueError, match=r"drew the picture of this cell:\nplt\.plot"):
        site.alternative(cells, 0)


def test_the_words_of_a_picture_come_from_the_call_that_drew_it():
    cells = [
        nbformat.v4.new_markdown_cell("## The cliff"),
        nbformat.v4.new_code_cell("bits, other = 4, 5"),
        nbformat.v4.new_code_cell(
            'plots.lines(x, {"QAT": a, f"W{bits}": b}, xlabel="step", ylabel=f"loss, {unit}", title=f"At {bits} bits")'
        ),
        nbformat.v4.new_code_cell("plots.filters(w, labels)"),
    ]
    assert (
        site.alternative(cells, 2) == "At 4 bits. Curves over a common axis. Across: step. Up: loss, …. Shown: QAT, W4."
    )
    assert site.alternative(cells, 3).startswith("The cliff. The first filters of a convolution side by side")
