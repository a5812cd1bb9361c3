"""Pictures to explore: move a control, and the picture and the text below it follow.

    explorer = widgets.NumberBits(0.1)
    explorer                                # the last line of a cell
    figure = explorer.still()               # the next cell: some of its pictures for those who have no kernel

Everything that takes long is computed when a widget is made; a move only draws.
"""

from .base import Explorer
from .bits import NumberBits
from .calibration import CalibrationSet
from .clipping import ClipRange
from .filters import FilterError
from .predictions import Predictions
from .roofline import Roofline
from .writing import WrittenText

__all__ = [
    "CalibrationSet",
    "ClipRange",
    "Explorer",
    "FilterError",
    "NumberBits",
    "Predictions",
    "Roofline",
    "WrittenText",
]
