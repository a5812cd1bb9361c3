"""README leads a newcomer to what exists, the project says who may do what with it, and the forms ask for what helps."""

import json
import re
import tomllib

import pytest
import yaml

from course_utils.tools import results
from tests.test_environment import make
from tests.toys import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, ADDRESS = PYPROJECT["project"], f"https://github.com/{PYPROJECT['tool']['course']['repository']}"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [
    f"docs/{name}.md" for name in ("architecture", "engines", "add-a-notebook", "add-an-engine", "add-an-exercise")
]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIRST_SCREEN = 14  # lines, some of which are paragraphs
WITHOUT_FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def verbs():
    return {line.split()[1] for line in make("help").stdout.splitlines()}


def slug(heading):
    """Return the name that GitHub gives to the place of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_two_commands_stand_within_the_first_screen():
    first = "\n".join(README.splitlines()[:FIRST_SCREEN])
    (block,) = re.findall(r"```sh\n(.*?)```", first, re.DOTALL)
    assert [" ".join(line.split()[:2]) for line in block.splitlines()] == ["git clone", "make run-all", "make test"]
    assert block.startswith(f"git clone {ADDRESS} && cd {ADDRESS.rpartition('/')[2]}\n")


def test_what_is_generated_has_its_place():
    for begin, end in ((results.BEGIN, results.END), ("<!-- launch: ", "<!-- end of launch -->")):
        assert README.count(begin) == README.count(end) == 1 and README.index(begin) < README.index(end)
    assert f"]({results.PICTURE.as_posix()})" in README


def test_the_map_has_every_notebook_in_order():
    rows = re.findall(r"^\| \[(\d\d) [^\]]+\]\(notebooks/([^)]+)\) \| \d+ \|", README, flags=re.MULTILINE)
    assert rows == [(path.name[:2], path.name) for path in NOTEBOOKS]


def test_no_figure_is_typed_by_hand():
    prose = re.sub(r"<!-- results.*?<!-- end of results -->", "", README, flags=re.DOTALL).replace("95 %", "")
    assert not re.findall(r"\d[\d.,]*\s?(?:[MGk]i?B|ms|%|×)", prose)


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    text = WITHOUT_FENCES.sub("", read(name))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, place = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert place in map(slug, headings), link


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name):
    spans = re.findall(r"`([^`\n]+)`", read(name)) + re.findall(r"```sh\n(.*?)```", read(name), re.DOTALL)
    named = {verb for span in spans for verb in re.findall(r"\bmake ([a-z-]+)", span)}
    assert named <= verbs(), named - verbs()


def test_every_make_target_is_explained():
    explained = {verb for name in PAGES[:2] for verb in re.findall(r"\bmake ([a-z-]+)", read(name))}
    assert verbs() - explained == set()


def test_the_citation_has_what_readers_of_it_need_and_the_version_of_the_project():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "repository-code"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["authors"] == [{"name": "The Squeeze & Speed Up contributors"}], "an entity, no invented person"
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"] == "MIT"
    assert citation["repository-code"] == ADDRESS
    assert citation["title"].startswith("Squeeze & Speed Up") and README.startswith("# Squeeze & Speed Up\n")


def test_code_and_text_have_their_licences_and_data_keep_their_own():
    assert read("LICENSE").startswith("MIT License\n") and PROJECT["license-files"] == ["LICENSE"]
    text = read("LICENSE-text")
    assert "https://creativecommons.org/licenses/by/4.0/legalcode" in text
    words = " ".join(text.split())
    for name, entry in json.loads(read("data/manifest.json")).items():
        assert f"{name.partition('/')[0]}/" in text
        for part in re.findall(
            r"MIT|BSD-3-Clause|Copyright \(c\) [^,]+|public domain|letters patent", entry["licence"]
        ):
            assert part in words, f"{name}: {entry['licence']}"
    for licence in ("LICENSE", "LICENSE-text", "data/manifest.json"):
        assert licence in README


def test_the_changelog_has_its_newest_part_first_and_the_version_of_the_project():
    parts = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert parts[0] == "Unreleased" or parts[0] == PROJECT["version"]
    assert PROJECT["version"] in read("CHANGELOG.md")
    kinds = set(re.findall(r"^### (\w+)", read("CHANGELOG.md"), flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_a_form_is_one_that_github_takes_and_asks_for_doctor(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    ids = [part["id"] for part in asked]
    assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in asked)
    doctor = next(part for part in asked if part["id"] == "doctor")
    assert "`make doctor`" in doctor["attributes"]["label"] and doctor["attributes"]["render"] == "text"


def test_there_are_forms_for_faults_ideas_and_reports_and_a_pull_request_asks_for_doctor():
    assert {path.stem for path in FORMS} == {"bug", "idea", "report", "config"}
    assert "`make doctor`" in read(".github/PULL_REQUEST_TEMPLATE.md")
