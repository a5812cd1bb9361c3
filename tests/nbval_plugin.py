"""A plugin of pytest for nbval: of a cell with the tag `numbers-vary` everything is compared but the numbers.

Timings, trainings and what hangs on the processor print other numbers each time. Which rows a table has, what its columns are
called and whether a claim holds stay the same, and a cell that nbval passes over altogether could lose them unseen.

The last notebook comes first: the longest ones are at the end of the course, and where two are compared side by side none of
them should be left over alone.
"""

import re

from nbval.plugin import IPyNbCell

TAG = "numbers-vary"
# Not those that are part of a name: FP32, layer1.0.conv1, W4A8.
NUMBER = re.compile(r"(?<![\w.])[-−+]?(\d+(,\d{3})*(\.\d+)?(e[-+]?\d+)?|nan|inf)(?![\w])")
NOT_HERE = re.compile(r"(?m)^– not on this machine:")  # a claim that need not hold anywhere (`ledger.claim`)
_sanitize = IPyNbCell.sanitize


def without_numbers(text):
    """Return `text` with every number as #, and with the blanks that tables fill their columns with as one."""
    return re.sub(r" {2,}|(?m:^ +)", " ", NUMBER.sub("#", NOT_HERE.sub("✔", text)))


def sanitize(self, text):
    text = _sanitize(self, text)
    vary = isinstance(text, str) and TAG in self.cell.metadata.get("tags", ())
    return without_numbers(text) if vary else text


IPyNbCell.sanitize = sanitize


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path, reverse=True)  # stable: the cells of a notebook stay in order
