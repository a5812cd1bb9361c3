"""Wrong answers to the exercises of a notebook."""

WRONG = {}
ELSE = {}
