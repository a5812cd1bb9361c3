"""Take out of an executed notebook what differs from run to run, so that a second run gives the very same bytes."""

import nbformat

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
RUN_METADATA = ("papermill", "execution", "ExecuteTime")
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def clean(notebook):
    """Return `notebook` (nbformat 4) without time stamps, random ids and traces of the machine; changes it in place.

    Sources, outputs and cell ids stay; execution counts become 1..n, the kernel plain `python3`, widget ids 1..m.
    """
    for name in RUN_METADATA:
        notebook.metadata.pop(name, None)
    notebook.metadata["kernelspec"] = nbformat.from_dict(KERNELSPEC)
    notebook.metadata.get("language_info", {}).pop("version", None)  # else every Python patch release is a diff
    count = 0
    for cell in notebook.cells:
        for name in RUN_METADATA:
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill gives every cell a list of tags
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            cell.execution_count = count
            cell.outputs = _merge_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    return _rename_widgets(notebook)


def to_text(notebook):
    """Return the text of the `.ipynb` file, as JupyterLab would write it."""
    return nbformat.writes(notebook) + "\n"


def _merge_streams(outputs):
    # How often a kernel flushes, and which of stdout and stderr comes first, is chance: neighbours become one of each.
    merged = []
    neighbours = {}
    for output in outputs:
        if output.output_type != "stream":
            merged += _in_order(neighbours)
            neighbours = {}
            merged.append(output)
        elif output.name in neighbours:
            neighbours[output.name].text += output.text
        else:
            neighbours[output.name] = output
    return merged + _in_order(neighbours)


def _in_order(streams):
    return [streams[name] for name in ("stdout", "stderr") if name in streams]


def _rename_widgets(notebook):
    models = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    if not models:
        notebook.metadata.pop("widgets", None)
        return notebook
    text = nbformat.writes(notebook)
    for number, model in enumerate(models, start=1):
        text = text.replace(model, f"{number:032x}")
    return nbformat.reads(text, as_version=4)
