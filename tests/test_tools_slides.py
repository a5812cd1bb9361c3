"""`make slides`: pages made of the notebooks by rules; they fit the screen, answer to keys, and ask no other machine.

What a browser must show needs playwright and a Chromium of the system, as in test_browser.py.
"""

import importlib.metadata
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils import exercises
from course_utils.tools import slides
from tests.test_browser import chromium
from tests.toys import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# Of each slide: what is on it, and how far down it reaches, in pixels of a slide; what is folded or scrolls counts as closed.
SEEN = """() => Reveal.getSlides().map(slide => {
    const {h, v} = Reveal.getIndices(slide);
    Reveal.slide(h, v);
    const top = slide.getBoundingClientRect().top;
    const shown = [...slide.querySelectorAll("*")].filter(each => {
        const box = each.closest("pre"), fold = each.closest("details:not([open])");
        return !(box && box !== each) && !(fold && !each.closest("summary") && fold !== each);
    });
    return {
        name: `${h}/${v}`,
        bottom: Math.max(...shown.map(each => each.getBoundingClientRect().bottom - top)) / Reveal.getScale(),
        pictures: [...slide.querySelectorAll("img")].map(each => [each.naturalWidth, each.offsetHeight, each.alt]),
        words: slide.innerText.trim(),
    };
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The slides of all notebooks: name of the notebook → page."""
    return {page.stem: page for page in slides.make(target=tmp_path_factory.mktemp("my slides"))}


@pytest.fixture(scope="module")
def visited(pages):
    """What a browser saw: name of the notebook → its slides; and the addresses that were asked for."""
    asked, seen, moved = [], {}, []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.on("request", lambda request: asked.append(request.url))
        for name, file in pages.items():
            page.goto(file.as_uri())
            page.wait_for_function("window.Reveal && Reveal.isReady()")
            if not moved:
                for key in ("Space", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft"):
                    before = page.evaluate("Reveal.getIndices()")
                    page.keyboard.press(key)
                    after = page.evaluate("Reveal.getIndices()")
                    moved.append((key, after["h"] - before["h"], after["v"] - before["v"]))
            seen[name] = page.evaluate(SEEN)
    return seen, asked, moved


def ran(source, text=None, **kinds):
    """Return a code cell that was run, and printed `text` or shows `kinds`."""
    outputs = [new_output("stream", text=text)] if text else []
    outputs += [new_output("display_data", {kind.replace("_", "/"): value for kind, value in kinds.items()})]
    return new_code_cell(source, outputs=[output for output in outputs if output.get("data") != {}])


def deck(*cells):
    """Return the slides of a toy: their Markdown, without the slide of its title and those that hold a heading alone."""
    made = slides.deck(new_notebook(cells=[new_markdown_cell("# A toy"), new_markdown_cell("## Toy"), *cells]), "00")
    return [text for cell in made.cells[1:] if (text := cell.source.removeprefix("## Toy").strip())]


def test_each_notebook_has_a_page_with_every_slide_on_it(visited):
    seen, _, _ = visited
    assert list(seen) == [path.stem for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        made = slides.deck(nbformat.read(path, as_version=4), path.name[:2])
        assert len(seen[path.stem]) == len(made.cells) > 20
        assert all(slide["words"] or slide["pictures"] for slide in seen[path.stem])


def test_nobody_is_asked_but_this_machine(visited):
    _, asked, _ = visited
    assert len(asked) > 3 * len(NOTEBOOKS)
    assert not [address for address in asked if not address.startswith(("file:", "data:"))]


def test_nothing_reaches_below_its_slide(visited):
    seen, _, _ = visited
    for name, found in seen.items():
        assert not [(name, slide["name"], slide["bottom"]) for slide in found if slide["bottom"] > slides.HEIGHT]


def test_every_picture_of_the_notebook_is_seen_and_has_words_for_who_cannot(visited):
    seen, _, _ = visited
    for path in NOTEBOOKS:
        outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", ())]
        pictures = [picture for slide in seen[path.stem] for picture in slide["pictures"]]
        assert len(pictures) == sum("image/png" in output.get("data", ()) for output in outputs) > 0
        assert all(width > 0 and height > 100 and alt.startswith("Picture: ") for width, height, alt in pictures)


def test_keys_move_through_the_slides(visited):
    _, _, moved = visited
    assert moved == [
        ("Space", 1, 0),
        ("ArrowRight", 1, 0),
        ("ArrowDown", 0, 0),
        ("ArrowUp", 0, 0),
        ("ArrowLeft", -1, 0),
    ]


def test_each_section_starts_a_slide_and_no_text_of_the_lesson_is_lost(pages):
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        text = "\n".join(cell.source for cell in slides.deck(notebook, path.name[:2]).cells)
        for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
            for block in re.split(r"\n\n|\n(?=[-*|] ?)", slides._linked(cell.source)):
                assert block.strip() in text or block.startswith(("[Open in", "<details>")), block
        for heading in re.findall(r"^## .+$", text, re.M):
            assert re.search(rf"^{re.escape(heading)}$", text, re.M)


def test_each_exercise_and_each_question_has_a_slide_of_its_own():
    for path in NOTEBOOKS:
        made = [cell.source for cell in slides.deck(nbformat.read(path, as_version=4), path.name[:2]).cells]
        for exercise in (each for each in exercises.every().values() if each.notebook == path.name[:2]):
            (slide,) = [
                text for text in made if f"def {exercise.solution.__name__}(" in text and "NotImplemented" in text
            ]
            assert "exercises.check" not in slide
        for question in exercises.quiz(path.name[:2]).questions:
            (slide,) = [text for text in made if f"<b>{question.id}</b>" in text]
            assert slide.count("<details>") == len(question.options) and "To answer" not in slide


def test_what_asks_for_a_prediction_ends_its_slide():
    asked, answer = deck(new_markdown_cell("Text.\n\n**Predict:** how many?"), ran("print(8)", "8"))
    assert asked.rstrip().endswith("</div>") and "**Predict:** how many?" in asked and "8" in answer


def test_text_that_is_too_much_for_a_slide_goes_on_to_the_next_under_the_same_title():
    long = [f"{number}. " + 60 * "word " for number in range(6)]
    made = deck(new_markdown_cell("## A section\n\n" + "\n\n".join(long)))
    assert len(made) > 1 and made[0].startswith("## A section")
    assert all('<p class="where">A section</p>' in text for text in made[1:])
    assert all(text.strip() in "\n".join(made) for text in long)


def test_a_long_list_is_split_between_its_items():
    items = [f"- item {number} " + 30 * "word " for number in range(8)]
    made = deck(new_markdown_cell("## A list\n\n" + "\n".join(items)))
    assert len(made) > 1 and all(any(item.strip() in text for text in made) for item in items)


def test_short_code_is_shown_with_its_output_and_long_code_is_folded():
    (short,) = deck(ran("x = 1\nprint(x)", "1"))
    assert "```python\nx = 1" in short and "<details" not in short and ">1</pre>" in short
    (folded,) = deck(ran("\n".join(f"x{n} = {n}" for n in range(slides.SHORT + 1)) + "\nprint(x)", "1"))
    assert folded.index(">1</pre>") < folded.index('<details class="fold"') < folded.index("x3 = 3")


@pytest.mark.parametrize(
    "source", ["import torch\n\nfrom course_utils import data", "GUESS = None  # a number", "explorer = widgets.Bits()"]
)
def test_chores_and_guesses_are_no_slides(source):
    assert deck(new_code_cell(source)) == []
    assert deck(new_code_cell("TEST = 3", metadata={"tags": ["parameters"]})) == []


def test_of_an_explorer_the_still_picture_stays():
    live = ran("explorer", text_plain="live", **{"application_vnd.jupyter.widget-view+json": {"model_id": "1"}})
    assert deck(live) == []


def test_what_was_printed_is_as_large_as_fits_and_no_markup():
    (table,) = deck(ran("show()", "\n".join(150 * "a" for _ in range(9)) + "\n\n<b>"))
    size = float(re.search(r"font-size: ([\d.]+)px\">a", table)[1])
    assert 11 <= size < 22 and 150 * 0.6 * size < slides.WIDTH and "&lt;b&gt;" in table and "\n\n&lt;" not in table


def test_a_long_sentence_that_was_printed_is_wrapped_and_not_made_small():
    (sentence,) = deck(ran("show()", 40 * "many words "))
    assert f"font-size: {slides.WRAPPED:.1f}px; white-space: pre-wrap" in sentence


def test_nobody_has_guessed_yet_on_a_slide():
    (slide,) = deck(ran("exercises.reveal(GUESS, 3)", f"measured: 3   ({slides.NO_GUESS})\n"))
    assert "measured: 3</pre>" in slide and "```" not in slide


def test_solutions_stay_folded_and_whole():
    text = "Ask.\n\n<details><summary>Solution</summary>\n\nOne.\n\nTwo.\n</details>"
    (slide,) = deck(new_markdown_cell(text))
    assert '<details class="fold"><summary>Solution</summary>\n\nOne.\n\nTwo.\n</details>' in slide


def test_links_between_notebooks_lead_from_slides_to_slides():
    assert slides._linked("[01](01_precision_basics.ipynb)") == "[01](01_precision_basics.html)"


def test_no_formula_waits_for_a_library_that_is_not_there():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            text = re.sub(r"(?s)```.*?```|`[^`]*`", "", cell.source if cell.cell_type == "markdown" else "")
            assert not re.search(r"\$[^$\n]+\$|\\\(|\\\[", text), "slides have no MathJax: write formulas in letters"


def test_without_reveal_it_says_what_to_do(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert slides.main([]) == 2
    assert "pip install sphinx-revealjs" in capsys.readouterr().err


def test_the_command_names_the_pages_it_wrote(monkeypatch, capsys):
    monkeypatch.setattr(slides, "make", lambda: ["a.html", "b.html"])
    assert slides.main([]) == 0
    assert capsys.readouterr().out == "a.html\nb.html\n"
    monkeypatch.setattr(slides, "make", lambda: open("no such folder/page.html"))
    assert slides.main([]) == 2
    assert capsys.readouterr().err.startswith("No slides were made. ")
