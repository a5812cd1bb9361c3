"""The links and the first cells say what the setting says, lead to files that are there, and are written whole or not at all."""

import re
from urllib.parse import parse_qs, urlsplit

import nbformat
import pytest

from course_utils import files
from course_utils.tools import badges
from tests.toys import ROOT, write_notebook

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
LINK = re.compile(r"\[Open in (\w+)\]\((\S+)\)")
SETTING = '[tool.other]\nbranch = "x"\n\n[tool.course] # here\nrepository = "owner/course"\nbranch = "main"\n'
README = "# Toys\n\n<!-- launch: here -->\n<!-- end of launch -->\n\nSee https://github.com/owner/course/blob/main/LICENSE.\n"


@pytest.fixture
def course(tmp_path):
    """A checkout with two notebooks, a README and a page that leads to the repository."""
    for name in ("00_one", "01_two"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "print(1)", parameters="N = 1")
    (tmp_path / "pyproject.toml").write_text(SETTING)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("git clone https://github.com/owner/course\n")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_in_step_with_the_setting():
    course, readme = badges.setting(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert badges.in_readme(readme, NOTEBOOKS[0].name, course) == readme, "run `make badges`"
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert badges.in_notebook(text, path.name, course) == text, "run `make badges`"


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_every_link_leads_to_a_file_that_is_there(path):
    text = path.read_text(encoding="utf-8")
    course, found = badges.setting(), dict(LINK.findall(text))
    assert set(found) == {"Binder", "Colab"}
    binder, colab = urlsplit(found["Binder"]), urlsplit(found["Colab"])
    assert (binder.netloc, binder.path) == ("mybinder.org", f"/v2/gh/{course.repository}/{course.branch}")
    (opened,) = parse_qs(binder.query)["urlpath"]
    beginning = f"/github/{course.repository}/blob/{course.branch}/"
    assert colab.netloc == "colab.research.google.com" and colab.path.startswith(beginning)
    for name in (opened.removeprefix("lab/tree/"), colab.path.removeprefix(beginning)):
        assert (ROOT / name).is_file() and (path.suffix == ".md" or name == f"notebooks/{path.name}")


def test_the_first_cell_is_the_same_in_every_notebook_but_for_its_number():
    cells = {path.name[:2]: nbformat.read(path, as_version=4).cells[1] for path in NOTEBOOKS}
    assert {cell.id for cell in cells.values()} == {badges.START}
    assert len({cell.source.replace(f'"{number}"', "") for number, cell in cells.items()}) == 1
    assert not any(cell.outputs for cell in cells.values()), (
        "the committed notebooks come from a machine that is large enough"
    )


def test_no_other_file_says_where_the_course_lives():
    repository = badges.setting().repository
    pages = (
        {path for pattern in badges.PAGES for path in ROOT.glob(pattern)} | set(NOTEBOOKS) | {ROOT / "pyproject.toml"}
    )
    sources = [*(ROOT / "course_utils").rglob("*.py"), *(ROOT / "docs").glob("**/*.*"), ROOT / "Makefile"]
    for path in {path for path in sources if path.is_file()} - pages:
        assert repository.encode() not in path.read_bytes(), (
            f"{path.name}: take it from course_utils.tools.badges.setting()"
        )


def test_a_second_time_nothing_changes(course):
    assert {path.name for path in badges.write(course)} == {"00_one.ipynb", "01_two.ipynb", "README.md"}
    before = contents(course)
    assert badges.write(course) == [] and contents(course) == before


def test_the_first_time_adds_the_cell_and_the_links_and_keeps_the_rest(course):
    before = nbformat.read(course / "notebooks" / "01_two.ipynb", as_version=4).cells
    badges.write(course)
    after = nbformat.read(course / "notebooks" / "01_two.ipynb", as_version=4).cells
    assert after[0].source.startswith(
        "# A toy\n\n[Open in Binder](https://mybinder.org/v2/gh/owner/course/main?urlpath="
    )
    assert after[1].id == "start" and 'launch.begin("01")' in after[1].source
    assert [cell.source for cell in after[2:]] == [cell.source for cell in before[1:]]
    assert [cell.execution_count for cell in after[1:]] == [1, 2, 3]


def test_another_repository_and_branch_are_written_everywhere(course):
    badges.write(course, "other-one/a.course", "v1.0/x")
    badges.write(course)
    everything = b"".join(contents(course).values()).decode()
    assert "owner/course" not in everything and badges.setting(course) == badges.Course("other-one/a.course", "v1.0/x")
    assert (course / "pyproject.toml").read_text().startswith('[tool.other]\nbranch = "x"\n')
    assert "/gh/other-one/a.course/v1.0%2Fx?" in everything and "/blob/v1.0/x/notebooks/00_one.ipynb" in everything
    assert (course / "docs" / "page.md").read_text() == "git clone https://github.com/other-one/a.course\n"
    assert "https://github.com/other-one/a.course/blob/v1.0/x/LICENSE" in (course / "README.md").read_text()
    assert "--branch v1.0/x '{address}'" in nbformat.read(course / "notebooks" / "00_one.ipynb", 4).cells[1].source


@pytest.mark.parametrize(
    ("repository", "branch", "said"),
    [
        ("name", None, "REPO=name is not owner/name"),
        ("https://github.com/a/b", None, "is not owner/name"),
        ("a/b c", None, "is not owner/name"),
        ("a/b'", None, "is not owner/name"),
        ("a/b", "x'; rm -rf ~; '", "is not the name of a branch"),
        ("a/b", "--upload-pack=x", "is not the name of a branch"),
        ("a/b", "a..b", "is not the name of a branch"),
    ],
)
def test_what_is_no_repository_or_branch_changes_nothing(course, repository, branch, said):
    before = contents(course)
    with pytest.raises(badges.SettingError, match=re.escape(said)):
        badges.write(course, repository, branch)
    assert contents(course) == before


def damage_readme(course):
    (course / "README.md").write_text("# Toys\n")


def damage_setting(course):
    (course / "pyproject.toml").write_text("[tool.other]\n")


def damage_title(course):
    write_notebook(course / "notebooks" / "01_two.ipynb", "1")
    text = (course / "notebooks" / "01_two.ipynb").read_text().replace("# A toy", "A toy")
    (course / "notebooks" / "01_two.ipynb").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"), [(damage_readme, "README.md"), (damage_setting, "tool.course"), (damage_title, "01_two.ipynb")]
)
def test_a_place_that_is_missing_is_named_and_nothing_is_written(course, damage, said):
    damage(course)
    before = contents(course)
    with pytest.raises(badges.SettingError, match=said):
        badges.write(course)
    assert contents(course) == before


def test_a_write_that_fails_keeps_the_old_setting_so_that_it_can_be_done_again(course, monkeypatch):
    def fails(path, text):
        if path.name == "README.md":
            raise OSError("no room")
        path.write_text(text, encoding="utf-8")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(files, "write_text", fails)
        badges.write(course, "other/one")
    assert badges.setting(course).repository == "owner/course"
    badges.write(course, "other/one")
    assert "owner/course" not in b"".join(contents(course).values()).decode()


def test_the_command_line_says_what_changed_or_in_one_sentence_why_nothing_did(course, capsys):
    assert badges.main(["--repository", "nonsense"], course) == 2
    assert capsys.readouterr().err == (
        "Nothing was written: REPO=nonsense is not owner/name, as in the address of a repository on GitHub.\n"
    )
    assert badges.main(["--repository", "other/one", "--branch", "v2"], course) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 files changed; the course lives in other/one, v2."


def test_a_course_lives_where_its_repository_is():
    addresses = [badges.Course(name, "main").address for name in ("owner/course", "other/fork")]
    assert addresses == ["https://github.com/owner/course", "https://github.com/other/fork"]
