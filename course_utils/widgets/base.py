"""What the widgets share: controls, a picture that follows them, and a text that says the same in words and numbers."""

import html
import io

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 120  # of the live picture
COLOURS = 128  # so many make a picture three times smaller, and every notebook keeps one of each widget
STYLE = {  # dark on white whatever the theme or the notebook's own style: a picture brings its background along
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "black",
    "axes.labelcolor": "black",
    "text.color": "black",
    "xtick.color": "black",
    "ytick.color": "black",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titley": 1.02,  # to find the place by itself takes matplotlib as long as to draw the axes
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Explorer:
    """Controls with a picture below them: the last line of a cell shows it, live where a kernel runs.

    `controls` (dict of name → ipywidgets control) change `image` (PNG) and `text` (HTML: the same in words and numbers);
    `widget` is the box with all of them. Where nothing can be moved, on a web page or on paper, there is the still version, so
    the next cell is `figure = explorer.still()`.

    A subclass has the `size` of its picture in inches and the `columns` of its still version, and says what to draw in `build`.
    controls: the values of all of them are what `build` calls a choice. frames: the choices of the still version, dicts.
    """

    size = (5.2, 3.2)
    columns = 2

    def __init__(self, controls, frames):
        self.controls, self.frames = controls, frames
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.style.description_width = "initial"
        width = ipywidgets.Layout(width=f"{self.size[0] * DPI:.0f}px", max_width="100%")
        # Not an Output area: with those a notebook that is executed without a browser hangs now and then.
        self.image = ipywidgets.Image(layout=width)
        self.text = ipywidgets.HTML(layout=width)
        row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.widget = ipywidgets.VBox([row, self.image, self.text])
        with matplotlib.rc_context(STYLE):
            # Not one of pyplot's, which a notebook would show by itself. A layout engine would take longer than the drawing.
            self._figure = Figure(figsize=self.size, dpi=DPI, layout="none")
            FigureCanvasAgg(self._figure)
            self._show = self.build(self._figure)
        self.update()
        for control in controls.values():
            control.observe(self.moved, names="value")

    def build(self, figure):
        """Draw what stays as it is into an empty figure, with axes in fixed places, and return a function that shows a choice.

        It gets the value of each control by name, changes the drawing, and returns the text.
        """
        raise NotImplementedError

    def choice(self):
        """Return the value of each control, a dict."""
        return {name: control.value for name, control in self.controls.items()}

    def moved(self, change):
        """Follow a control that was moved."""
        self.update()

    def update(self):
        """Show what the controls say."""
        with matplotlib.rc_context(STYLE):
            text = self._show(**self.choice())
            self._figure.canvas.draw()
        pixels = PIL.Image.fromarray(np.asarray(self._figure.canvas.buffer_rgba())).convert("RGB")
        png = io.BytesIO()
        pixels.quantize(COLOURS, PIL.Image.Quantize.FASTOCTREE).save(png, "png")
        self.image.value, self.text.value = png.getvalue(), text

    def still(self, *choices):
        """Return a matplotlib figure with one picture for each of `choices`, dicts of control → value; by default `frames`.

        What a choice leaves out is as the controls say. Raises `ValueError` for a control that there is not.
        """
        choices = choices or self.frames
        if unknown := {name for choice in choices for name in choice} - set(self.controls):
            raise ValueError(f"no control is called {', '.join(unknown)}; there are: {', '.join(self.controls)}")
        rows, (width, height) = -(-len(choices) // self.columns), self.size
        with matplotlib.rc_context(STYLE):
            figure = plt.figure(figsize=(self.columns * width, rows * height), layout="none")
            places = figure.subfigures(rows, self.columns, squeeze=False, wspace=0, hspace=0).flat
            for place, choice in zip(places, choices, strict=False):
                self.build(place)(**self.choice() | choice)
        return figure

    def _repr_mimebundle_(self, **options):
        # Not the box's own bundle: its plain text would be a beginning of the picture's bytes, and in ipywidgets 7, which Colab
        # has, it has none.
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        plain = f"{type(self).__name__}: live in a notebook that runs; its still version follows."
        return {"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}


def paragraph(text):
    """Return `text` as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def table(columns, rows):
    """Return an HTML table of text; the first column is left-aligned, the others right-aligned."""
    lines = [("th", columns), *(("td", row) for row in rows)]
    body = "".join(
        "<tr>"
        + "".join(
            f'<{tag} style="padding: 0 0.5em; text-align: {"right" if i else "left"}">{html.escape(str(cell))}</{tag}>'
            for i, cell in enumerate(cells)
        )
        + "</tr>"
        for tag, cells in lines
    )
    return f"<table>{body}</table>"
