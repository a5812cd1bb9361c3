"""The bits of a number you type."""

import ipywidgets

from .. import formats, plots
from .base import Explorer, paragraph, table

FORMATS = (
    *(formats.FP32, formats.BF16, formats.FP16, formats.FP8_E5M2, formats.FP8_E4M3, formats.FP4_E2M1),
    *(formats.INT8, formats.INT4),
)


class NumberBits(Explorer):
    """A number in the float and integer formats of the course: its bits, the value they stand for, and the error.

    number: what stands in the field at first, a number or its text. Raises `ValueError` where it is none; of what is typed
    later the widget says so in a sentence, and keeps its picture.
    """

    size = (6.4, 2.5)
    columns = 1  # a row is 32 bits wide

    def __init__(self, number=0.15625):
        field = ipywidgets.Text(str(number), continuous_update=False)
        _number(field.value)
        super().__init__({"number": field}, [{"number": text} for text in ("0.15625", "0.1", "-70000")])

    def update(self):
        try:
            super().update()
        except ValueError as error:
            self.text.value = paragraph(str(error))

    def build(self, figure):
        axis = figure.add_axes([0.13, 0, 0.86, 0.88])
        plots.number_bits([(form.name, "0" * form.bits, form.fields.exponent) for form in FORMATS], axis=axis)
        axis.set_xlim(-0.2, 39)  # room for the values
        cells, digits = list(axis.patches), [text for text in axis.texts if text.get_text() == "0"]
        values = []
        for y, form in enumerate(reversed(FORMATS)):
            ends = {form.fields.sign, form.fields.sign + form.fields.exponent}
            axis.vlines([end - 0.03 for end in ends], y + 0.05, y + 0.95, color="black", lw=1.2)
            values.append(axis.text(form.bits + 0.4, y + 0.5, "", va="center"))

        def show(number):
            x = _number(number)
            held = {form: float(form.round(x)) for form in FORMATS}
            bits = "".join("".join(form.bits_of(x)) for form in reversed(FORMATS))
            for bit, cell, digit in zip(bits, cells, digits, strict=True):
                cell.set_alpha(plots.BIT_ALPHA[bit])
                digit.set_text(bit)
            for text, value in zip(values, reversed(held.values()), strict=True):
                text.set_text(f"= {value:.7g}")
            axis.set_title(f"{x:.9g}: sign (red) | exponent (green) | mantissa or integer (blue)")

            rows = []
            for form, value in held.items():
                error = 0.0 if value == x else abs(value - x)
                errors = ["exact", ""] if error == 0 else [f"{error:.3g}", f"{error / abs(x):.2%}"]
                rows.append([form.name, *(part or "–" for part in form.bits_of(x)), f"{value:.7g}", *errors])
            exact = [form.name for form, value in held.items() if value == x]
            return paragraph(f"{x:.9g} is exact in {', '.join(exact) or 'none of these formats'}.") + table(
                ["format", "sign", "exponent", "mantissa", "value", "error", "relative error"], rows
            )

        return show


def _number(text):
    """Return the float that `text` stands for; raise `ValueError` with a sentence for a learner where it is none."""
    try:
        x = float(text)
    except ValueError:
        raise ValueError(f"“{text[:40]}” is not a number: type one such as 0.1, -3 or 6e-5, and press Enter.") from None
    if x != x:
        raise ValueError("NaN says “not a number”, and integers have no code for it: type a number, and press Enter.")
    return x
