"""What an exercise is made of."""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Case:
    """One input on which an answer is tried; `label` says what is special about it, `args` are handed over as copies."""

    label: str
    args: tuple


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give.

    function: the mistake, written out. A learner's answer that computes the same made the same mistake; `says` then tells
    what it is, and `hint` (one sentence) where to look.
    """

    name: str
    function: Callable
    says: str
    hint: str


@dataclass(frozen=True)
class Exercise:
    """One exercise: a function to write.

    id: what `check` is called with. notebook: "01" to "06". solution: the function; its signature and docstring make the
    stub in the notebook, its source is what `solution(id)` shows, so besides `torch` it imports what it uses in its own
    body. cases: makes the inputs from a `torch.Generator`, the same ones each time; the ordinary ones come first. mistakes:
    the more special first. hints: rising, the last one nearly gives it away. observe: what is compared, called with the
    function and the arguments of a case; by default what the function returns. rtol, atol: for floats. seconds: that all
    cases together may take.
    """

    id: str
    title: str
    notebook: str
    minutes: int
    difficulty: str
    objective: str
    solution: Callable
    cases: Callable[..., Iterator[Case]]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, ...]
    observe: Callable[..., Any] = lambda function, *args: function(*args)
    rtol: float = 1e-5
    atol: float = 1e-6
    seconds: float = 20.0

    def source(self):
        """Return the solution as text."""
        return inspect.getsource(self.solution)

    def stub(self):
        """Return what the notebook holds before anybody has written anything: signature, docstring, `NotImplementedError`."""
        source = self.source()
        function = ast.parse(source).body[0]
        head = source.splitlines()[: function.body[0].end_lineno]
        return "\n".join([*head, "    raise NotImplementedError"])

    def fill(self, cell):
        """Return the source `cell` of a notebook with the function that it defines replaced by the solution.

        Raises `ValueError` when the cell defines no function of that name.
        """
        for node in ast.parse(cell).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.solution.__name__:
                lines = cell.splitlines()
                lines[node.lineno - 1 : node.end_lineno] = self.source().splitlines()
                return "\n".join(lines)
        raise ValueError(f"the cell defines no {self.solution.__name__}(...), which exercise {self.id!r} asks for")
