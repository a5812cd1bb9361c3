"""What the course adds to Sphinx: links to the glossary, docstrings as they are written, maths without a script."""

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.transforms.post_transforms import SphinxPostTransform

from course_utils.tools import badges, site

GLOSSARY = "docs/glossary"
# No link within these: a heading, another link, code, what a cell printed.
CLOSED = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.table)


class GlossaryLinks(SphinxPostTransform):
    """On the page of a lesson, the first mention of each term of the glossary leads there."""

    default_priority = 900

    def run(self, **kwargs):
        docname = self.env.current_document.docname
        if not docname.startswith("notebooks/"):
            return
        to_glossary = self.app.builder.get_relative_uri(docname, GLOSSARY)
        left = dict(terms(self.env))
        for text in list(self.document.findall(nodes.Text)):
            if left and _open(text):
                text.parent.replace(text, list(_linked(str(text), left, to_glossary)))


def terms(env):
    """Return the glossary's terms as a dict of lower-case term → anchor; all names of one entry lead to its first."""
    entries = env.get_doctree(GLOSSARY).findall(nodes.definition_list_item)
    groups = [list(entry.findall(nodes.term)) for entry in entries]
    return {term.astext().lower(): group[0]["ids"][0] for group in groups for term in group}


def pattern(names):
    """Return a regular expression for `names` in a sentence: any case, plural or not, with hyphens or spaces; longest first."""
    words = sorted(names, key=len, reverse=True)
    either = "|".join(re.escape(word).replace(r"\ ", "[ -]").replace(r"\-", "[ -]") for word in words)
    return re.compile(rf"(?<![\w-])({either})s?(?![\w-])", re.I)


def _open(text):
    node = text.parent
    while node is not None:
        if isinstance(node, CLOSED) or "cell_output" in node.get("classes", ()):
            return False
        node = node.parent
    return True


def _linked(text, left, to_glossary):
    while left and (found := pattern(left).search(text)):
        anchor = left[_name(found[1], left)]
        for name in [name for name, other in left.items() if other == anchor]:
            del left[name]
        yield nodes.Text(text[: found.start()])
        yield nodes.reference("", found[0], internal=True, refuri=f"{to_glossary}#{anchor}", classes=["term"])
        text = text[found.end() :]
    yield nodes.Text(text)


def _name(found, names):
    return next(name for name in names if name.replace("-", " ") == found.lower().replace("-", " "))


def docstring(app, what, name, obj, options, lines):
    """Turn the course's docstrings, in which `x` is code and an indented block a program, into reStructuredText."""
    blocks = re.split(r"\n\n+", "\n".join(lines).strip("\n"))
    blocks = [f".. code-block:: python\n\n{block}" if block.startswith("    ") else prose(block) for block in blocks]
    lines[:] = [*"\n\n".join(blocks).splitlines(), ""]


def prose(text):
    """Return `text` with its code marked as reStructuredText has it, and without other marks."""
    return re.sub(r"`([^`]+)`|([*|_\\])", lambda m: f"\\ ``{m[1]}``\\ " if m[1] else f"\\{m[2]}", text)


def file_of_the_repository(app, env, node, contnode):
    """A link in a page to a file of the repository that is no page leads to the repository."""
    if node.get("reftype") != "myst":
        return None
    target = (Path(env.doc2path(node["refdoc"])).parent / node["reftarget"]).resolve()
    path = target.relative_to(env.srcdir)
    if not (site.ROOT / path).exists():
        return None
    course = badges.setting()
    return nodes.reference("", "", contnode, refuri=f"{course.address}/blob/{course.branch}/{path.as_posix()}")


def write_mathml(translator, node):
    """Write a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(convert(node.astext(), display="block" if block else "inline"))
    raise nodes.SkipNode


def setup(app):
    app.add_post_transform(GlossaryLinks)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("missing-reference", file_of_the_repository)
    app.add_html_math_renderer("mathml", inline_renderers=(write_mathml, None), block_renderers=(write_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
