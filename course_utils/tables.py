"""Small tables that read well as plain text, in a notebook and in a README."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Column titles and rows of text; the first column is left-aligned, the others right-aligned."""

    columns: list[str]
    rows: list[list[str]]

    def __str__(self):
        lines = [self.columns, *self.rows]
        widths = [max(len(str(line[i])) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(
                str(c).ljust(w) if i == 0 else str(c).rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in text)

    __repr__ = __str__

    def markdown(self):
        """Return the table as GitHub-flavoured Markdown."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)

    _repr_markdown_ = markdown


class Shown:
    """For results that print as their `table()`, plain or as Markdown, with a line below it that says how they were taken."""

    def __str__(self):
        return f"{self.table()}\n{self._how()}"

    def __repr__(self):
        return str(self)

    def _repr_markdown_(self):
        return f"{self.table()._repr_markdown_()}\n\n{self._how()}"
