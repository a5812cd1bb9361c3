"""The real integer kernels behind one small interface.

Each engine family lives in one file of this folder and can be removed by deleting it; an engine that is absent or broken
here is a sentence in `engines()`, never a crash at import. A quantized model is an ordinary callable, images → logits.
"""

import importlib
import json
from dataclasses import dataclass

from .. import cpu, files

FORMAT = "squeeze-int8-1"
FAMILIES = {"torch_ao": ("onednn", "x86", "fbgemm", "qnnpack")}
PREPARED = "qat, not converted"
OBSERVERS = ("minmax", "histogram")


@dataclass(frozen=True)
class Engine:
    """One way to run integers: `runs` tells whether it does here, `why` the reason or what to do about it."""

    name: str
    runs: bool
    why: str


def engines():
    """Return a list of `Engine`: what runs on this machine and why the rest does not."""
    return [engine for family in FAMILIES for engine in _family_engines(family)]


def default_engine():
    """Return the name of the best engine here: `"onednn"` where the CPU has VNNI, else `"x86"`, else `"qnnpack"`.

    Without VNNI oneDNN's 8-bit products can saturate 16-bit sums, while `"x86"` leaves one bit of headroom.
    Raises `RuntimeError` when no engine runs on this machine.
    """
    running = [engine.name for engine in engines() if engine.runs]
    preferred = ("onednn", "x86", "fbgemm", "qnnpack") if cpu.has_vnni() else ("x86", "fbgemm", "qnnpack", "onednn")
    for name in preferred:
        if name in running:
            return name
    raise RuntimeError("no integer engine runs on this machine: " + "; ".join(f"{e.name}: {e.why}" for e in engines()))


def quantize_dynamic(model):
    """Return a copy of `model` whose linear layers hold INT8 weights and quantize their inputs on the fly.

    Convolutions are left as they are: torch has no dynamic kernel for them.
    """
    return _load_family("torch_ao").quantize_dynamic(model)


def quantize_static(model, calibration, *, engine=None, per_channel=True, observer="minmax"):
    """Return an INT8 copy of `model`: folded, calibrated and converted to real integer kernels.

    model: float32 module in evaluation mode that torch.fx can trace. calibration: iterable of image tensors, or of
    `(images, labels)` as `data.batches` yields them; labels are not used. engine: a name from `engines()`, by default the
    best one here. per_channel: one weight scale per output channel instead of one per tensor. observer: how activation
    ranges are chosen, `"minmax"` or `"histogram"` (the range of least squared error).

    Raises `ValueError` for an unknown engine or observer, or an empty calibration set; `RuntimeError` when the engine does
    not run here.
    """
    recipe = _recipe("static", engine, per_channel, observer)
    return _family(recipe["engine"]).quantize_static(model, _images(calibration), recipe)


def prepare_qat(model, *, engine=None, per_channel=True):
    """Return a copy of `model` in training mode with fake-quantizers and observers in it, ready for a training loop.

    Batch norms are fused into the convolutions in their trainable form, so they go on learning. Turn it into integers with
    `convert_qat`. Arguments and errors as in `quantize_static`.
    """
    recipe = _recipe(PREPARED, engine, per_channel, "minmax")
    return _family(recipe["engine"]).prepare_qat(model, recipe)


def convert_qat(model):
    """Return the INT8 model of one trained after `prepare_qat`; the trained one is left as it is.

    Raises `ValueError` for a model that `prepare_qat` did not make.
    """
    recipe = recipe_of(model)
    if recipe["kind"] != PREPARED:
        raise ValueError(f"expected a model from prepare_qat, got one whose kind is {recipe['kind']!r}")
    return _family(recipe["engine"]).convert_qat(model, recipe | {"kind": "qat"})


def integers(model, images):
    """Return the 8-bit integers that every step of a quantized model computes on `images`: a dict of name → tensor.

    The names are those of `integer.IntegerModel(model).steps`, so that a learner can compare layer by layer.
    Raises `ValueError` for a model that `quantize_static` or `convert_qat` did not make.
    """
    recipe = recipe_of(model)
    if recipe["kind"] not in ("static", "qat"):
        raise ValueError(
            f"only statically quantized models compute in integers throughout, this one is {recipe['kind']!r}"
        )
    return _family(recipe["engine"]).integers(model, images, recipe["engine"])


def recipe_of(model):
    """Return how a quantized model was made, as a dict: kind, engine, per_channel, observer, architecture."""
    try:
        return model.meta["course_recipe"]
    except (AttributeError, KeyError):
        raise ValueError(
            f"this {type(model).__name__} was not made by quantize_dynamic, quantize_static or prepare_qat"
        ) from None


def save(model, path):
    """Write a quantized model to `path` and return the bytes written.

    The file is safetensors: INT8 weights, float32 scales, and in its metadata how the model was made. No code is stored and
    none is run on loading. Raises `ValueError` for a model that this package did not quantize.
    """
    from safetensors.torch import save_file

    recipe = recipe_of(model)
    if recipe["kind"] == PREPARED:
        raise ValueError("this model still trains in float: turn it into integers with convert_qat before saving")
    tensors, rest = _family(recipe["engine"]).flatten(model.state_dict())
    # One key, because safetensors keeps several in no particular order, and the same model should be the same bytes.
    metadata = {"course": json.dumps({"format": FORMAT, "recipe": recipe, "rest": rest})}
    with files.replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        return partial.stat().st_size


def load(path, *, model=None):
    """Return the quantized model stored by `save`, ready to call, with outputs identical to the saved one's.

    model: the float32 module it was made from (any weights), needed only for architectures that `course_utils.models` does
    not know. Raises `FileNotFoundError`, `ValueError` for a file of another kind or a model that does not fit,
    `RuntimeError` when its engine does not run here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("course", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): save the model again") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by backends.save (format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    recipe = metadata["recipe"]
    if model is None:
        if recipe["architecture"] is None:
            raise ValueError(
                f"{path} holds a model that course_utils.models does not know: pass the float module as model="
            )
        from .. import models

        model = models.build(**recipe["architecture"])
    return _family(recipe["engine"]).rebuild(model, recipe, tensors, metadata["rest"])


def _recipe(kind, engine, per_channel, observer):
    if observer not in OBSERVERS:
        raise ValueError(f"unknown observer {observer!r}: choose one of {', '.join(OBSERVERS)}")
    return {"kind": kind, "engine": engine or default_engine(), "per_channel": bool(per_channel), "observer": observer}


def _images(calibration):
    for batch in calibration:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _family(engine):
    """Return the module that runs `engine`, or say why it cannot."""
    family = next((name for name, engine_names in FAMILIES.items() if engine in engine_names), None)
    if family is None:
        known = ", ".join(name for names in FAMILIES.values() for name in names)
        raise ValueError(f"unknown engine {engine!r}: choose one of {known}")
    found = next(e for e in _family_engines(family) if e.name == engine)
    if not found.runs:
        running = ", ".join(e.name for e in engines() if e.runs) or "none"
        raise RuntimeError(f"engine {engine!r} does not run here: {found.why}. Engines that do: {running}")
    return _load_family(family)


def _load_family(family):
    try:
        return importlib.import_module(f".{family}", __name__)
    except ImportError as error:
        raise RuntimeError(f"the {family} engines are not available with this installation ({error})") from None


def _family_engines(family):
    try:
        return _load_family(family).engines()
    except RuntimeError as error:
        return [Engine(name, False, str(error)) for name in FAMILIES[family]]
