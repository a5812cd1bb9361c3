"""Write the links to Binder and Colab, and the first cell of each notebook: `make badges REPO=owner/name BRANCH=...`.

Where the course lives is said once, in pyproject.toml under `[tool.course]`. Without arguments everything is written anew from
there. With them the setting is changed first, and with it every link to the repository in the course's pages.
"""

import argparse
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbformat.v4 import new_code_cell

from course_utils import files
from course_utils.tools.clean import clean, to_text

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "*.cff", "docs/**/*.md", ".github/**/*.md", ".github/**/*.yml")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+")
BRANCH = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]*(?<![/.])")
LINE = re.compile(r"^\[Open in Binder\]\(.*\n", re.MULTILINE)
PLACE = re.compile(r"(<!-- launch: [^\n]*-->\n)(.*?)(<!-- end of launch -->)", re.DOTALL)
START = "start"  # the id of the cell
TAGS = ["nbval-ignore-output", "this-machine"]  # it prints what this machine lacks, in the committed notebooks nothing
CELL = """\
# On Colab: fetches the course. Elsewhere: does nothing, or says that this machine is small.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.isdir("../course_utils"):
    address = os.environ.get("COURSE_REPOSITORY") or "{address}"
    clone = f"git clone -q --depth 1 --branch {branch} '{{address}}' .course"
    subprocess.run(f"test -d course || (rm -rf .course && {{clone}} && mv .course course)", shell=True, check=True)
    os.chdir("course/notebooks")
    sys.path.insert(0, os.path.dirname(os.getcwd()))

from course_utils import launch

launch.begin("{number}")"""


class SettingError(ValueError):
    """The setting, or a place to write it to, is not as it should be; the message says what to do."""


@dataclass(frozen=True)
class Course:
    """Where the course lives on GitHub: `repository`, which is owner/name, and a branch or tag."""

    repository: str
    branch: str

    def __post_init__(self):
        if not REPOSITORY.fullmatch(self.repository):
            raise SettingError(f"REPO={self.repository} is not owner/name, as in the address of a repository on GitHub")
        if not BRANCH.fullmatch(self.branch):
            raise SettingError(f"BRANCH={self.branch} is not the name of a branch or tag")

    @property
    def address(self):
        return f"https://github.com/{self.repository}"

    def binder(self, name):
        """Return the address that opens the notebook file `name` in JupyterLab on Binder."""
        ref = quote(self.branch, safe="")
        return f"https://mybinder.org/v2/gh/{self.repository}/{ref}?urlpath=lab/tree/notebooks/{quote(name)}"

    def colab(self, name):
        """Return the address that opens the notebook file `name` on Colab."""
        return f"https://colab.research.google.com/github/{self.repository}/blob/{self.branch}/notebooks/{quote(name)}"

    def links(self, name):
        """Return both as Markdown. They are words, not pictures: a picture would be asked for from another machine."""
        return f"[Open in Binder]({self.binder(name)}) · [Open in Colab]({self.colab(name)})"

    def cell(self, number):
        """Return the source of the first code cell of the notebook `number`."""
        return CELL.format(address=self.address, branch=self.branch, number=number)


def setting(root=ROOT):
    """Return the `Course` of pyproject.toml. Raises `SettingError` when it says none."""
    try:
        found = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["course"]
        return Course(found["repository"], found["branch"])
    except KeyError as error:
        raise SettingError(f"pyproject.toml has no {error} of the course: restore its section [tool.course]") from None


def in_notebook(text, name, course):
    """Return the `text` of the notebook file `name` with its links and its first cell."""
    notebook = nbformat.reads(text, as_version=4)
    head, number = notebook.cells[0], name[:2]
    if not head.source.startswith("# "):
        raise SettingError(f"{name} does not begin with a title: its links go below that")
    line = course.links(name) + "\n"
    if not LINE.search(head.source):
        title, _, rest = head.source.partition("\n")
        head.source = f"{title}\n\n{line}\n{rest.lstrip()}"
    head.source = LINE.sub(lambda _: line, head.source, count=1)
    if notebook.cells[1].id != START:
        notebook.cells.insert(1, new_code_cell(id=START, metadata={"tags": TAGS}))
    notebook.cells[1].source = course.cell(number)
    return to_text(clean(notebook))


def in_readme(text, first, course):
    """Return README's `text` with the links to the notebook file `first`, between the marks."""
    if not PLACE.search(text):
        raise SettingError("README.md has no place for the links: <!-- launch: ... --> and <!-- end of launch -->")
    return PLACE.sub(lambda found: f"{found[1]}{course.links(first)}\n{found[3]}", text)


def moved(text, old, new):
    """Return `text` with the links into the repository `old` leading to `new`, both a `Course`."""
    text = re.sub(rf"(?<![\w-]){re.escape(old.repository)}(?![\w-])", new.repository, text)
    return re.sub(
        rf"({re.escape(new.repository)}/(?:blob|tree|raw)/){re.escape(old.branch)}/", rf"\g<1>{new.branch}/", text
    )


def in_setting(text, new):
    """Return the `text` of pyproject.toml with the setting `new`."""
    for name, value in (("repository", new.repository), ("branch", new.branch)):
        text = re.sub(rf'^(\[tool\.course\][^\[]*?^{name} = )"[^"]*"', rf'\g<1>"{value}"', text, flags=re.M)
    return text


def write(root=ROOT, repository=None, branch=None):
    """Write all of it in the checkout `root`, with another repository or branch if they are given; return the changed files.

    Raises `SettingError` before anything is written.
    """
    old = setting(root)
    new = Course(repository or old.repository, branch or old.branch)
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    texts = {path: path.read_text(encoding="utf-8") for path in notebooks}
    written = {path: in_notebook(text, path.name, new) for path, text in texts.items()}
    for path in {path for pattern in PAGES for path in root.glob(pattern) if path.is_file()}:
        texts[path] = path.read_text(encoding="utf-8")
        written[path] = moved(texts[path], old, new)
    readme = root / "README.md"
    written[readme] = in_readme(written[readme], notebooks[0].name, new)
    # Last: where one of the others cannot be written, the next call still knows the old setting.
    project = root / "pyproject.toml"
    texts[project] = project.read_text(encoding="utf-8")
    written[project] = in_setting(texts[project], new)
    changed = [path for path, text in written.items() if text != texts[path]]
    for path in changed:
        files.write_text(path, written[path])
    return changed


def main(arguments=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repository", help="owner/name on GitHub")
    parser.add_argument("--branch", help="a branch or tag")
    options = parser.parse_args(arguments)
    try:
        changed = write(root, options.repository, options.branch)
    except SettingError as error:
        print(f"Nothing was written: {error}.", file=sys.stderr)
        return 2
    for path in changed:
        print(path.relative_to(root))
    course = setting(root)
    print(f"{len(changed)} files changed; the course lives in {course.repository}, {course.branch}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
