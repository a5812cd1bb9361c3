"""The real integer kernels, and the float ones to compare them with, behind one small interface.

Each engine family lives in one file of this folder and can be removed by deleting it; an engine that is absent or broken
here is a sentence in `engines()`, never a crash at import. A quantized model is an ordinary callable, images → logits.
"""

import importlib
import json
import math
import re
import warnings
from dataclasses import dataclass

from .. import cpu, files

FORMAT = "squeeze-int8-2"
# File of this folder → the engines it holds.
FAMILIES = {
    "torch_ao": ("onednn", "x86", "fbgemm", "qnnpack"),
    "pt2e": ("pt2e", "pt2e-inductor"),
    "eager": ("torch",),
    "inductor": ("inductor",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt",),
}
# Engine → the precisions that `deploy` has on it: "int8" for networks that are quantized already, the rest for float ones.
PRECISIONS = {
    "torch": ("fp32", "bf16", "fp16"),
    "inductor": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "executorch": ("fp32",),
    "tensorrt": ("fp32", "int8"),
}
FLOAT_ONLY = ("torch", "inductor")
INSTALL = "pip install 'squeeze-and-speed-up[{}]', or make setup ENGINES=1 for all of them"
REMEDIES = {
    "pt2e": "it needs torchao in a version made for this torch (make setup ENGINES=1)",
    **{name: INSTALL.format(name) for name in ("onnxruntime", "openvino", "executorch")},
    "tensorrt": "not run here; on a machine with an NVIDIA GPU: pip install 'squeeze-and-speed-up[tensorrt]'",
}
PREPARED = "qat, not converted"
DEPLOYED = "deployed"
# Operation of a family → what to say where it is missing.
CANNOT = {
    "quantize_static": "engine {engine} runs float networks only: use deploy, or quantize for another engine",
    "prepare_qat": "engine {engine} does not train: train with course_utils.qat, convert, and deploy that on it",
    "steps": "engine {engine} is a runtime of its own that does not show its integers: quantize with one of torch's",
    "flatten": "engine {engine} has no file of its own: save the float network, and deploy it again",
}
OBSERVERS = ("minmax", "histogram")
LARGEST_IMAGE = 2**24  # numbers in one, some 2,300 pixels on a side: some engines try what a file asks for
# Of weights, by `reduce_range`: two products of 63 and an unsigned byte, 2 · 255 · 63 = 32,130, fit into 16 bits.
WEIGHT_RANGES = {False: (-128, 127), True: (-63, 63)}
# What a layer does besides its weights: two networks with the same weights may differ in these.
GEOMETRY = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode", "count_include_pad"),
    *("output_size", "start_dim", "end_dim", "negative_slope", "min_val", "max_val"),
)


@dataclass(frozen=True)
class Engine:
    """One way to run integers: `runs` tells whether it does here, `why` the reason or what to do about it."""

    name: str
    runs: bool
    why: str


def engines(*families):
    """Return a list of `Engine`: what runs on this machine and why the rest does not.

    families: only those of `FAMILIES`, all of them by default. The answer comes from loading each family, so the first call
    takes seconds, and some 300 MB, where torchao or ExecuTorch is installed; a package that is missing costs nothing.
    Engines `"torch"` and `"inductor"` run float networks only (`deploy`), all others INT8.
    """
    return [engine for family in families or FAMILIES for engine in _family_engines(family)]


def default_engine():
    """Return the name of the best engine here: `"onednn"` where the CPU has VNNI, else `"x86"`, else `"qnnpack"`.

    All of them are part of torch, so a lesson needs no other package; their results differ in single roundings, as long as
    `reduce_range` is left to `needs_headroom`. With VNNI, `"onednn"` is exact on all 8 bits; without it `"x86"` is as good
    with 7 of the weights. `"pt2e"` is never chosen by itself: it needs torchao, and takes seconds to make a model.
    Raises `RuntimeError` when no engine runs on this machine.
    """
    preferred = ("onednn", "x86", "fbgemm", "qnnpack") if cpu.has_vnni() else ("x86", "fbgemm", "qnnpack", "onednn")
    found = {engine.name: engine for engine in _family_engines("torch_ao")}
    for name in preferred:
        if name in found and found[name].runs:
            return name
    reasons = "; ".join(f"{e.name}: {e.why}" for e in engines() if e.name not in FLOAT_ONLY)
    raise RuntimeError(f"no integer engine runs on this machine by default: {reasons}")


def needs_headroom(engine):
    """Return whether 8-bit sums of `engine` may overflow 16 bits on this machine: what `reduce_range=None` stands for.

    The instruction vpmaddubsw of x86 adds two products of an unsigned and a signed byte into 16 bits, saturated. Where VNNI is
    absent, oneDNN (`"onednn"`, `"pt2e"`, `"pt2e-inductor"`) uses it, and so do ONNX Runtime (its page "Quantize ONNX models":
    unsigned activations with signed weights) and OpenVINO, which builds on oneDNN (NNCF's option `overflow_fix`). fbgemm's
    depthwise kernels use it on *every* x86 processor, for pairs of neighbouring taps, and `"x86"` hands fbgemm each convolution
    of more than 100 groups. `"qnnpack"` and `"executorch"` (XNNPACK, whose kernels widen bytes to 16 bits before they multiply)
    never do, nor does a GPU.
    """
    if engine in ("x86", "fbgemm"):
        return True
    without_vnni = engine in ("onednn", "pt2e", "pt2e-inductor", "onnxruntime", "openvino")
    return without_vnni and cpu.is_x86() and not cpu.has_vnni()


def may_overflow(model):
    """Return whether 8-bit sums of `model`, quantized here or loaded, may overflow 16 bits on this machine.

    Those of a network with all 8 bits of its weights may, where its engine `needs_headroom`: it comes from a processor with
    VNNI, or was quantized with `reduce_range=False`.
    """
    recipe = recipe_of(model)
    return recipe.get("reduce_range") is False and needs_headroom(recipe["engine"])


def quantize_dynamic(model):
    """Return a copy of `model` whose linear layers hold INT8 weights and quantize their inputs on the fly.

    Convolutions are left as they are, as by torch.ao.quantization.quantize_dynamic.
    """
    converted, recipe = _load_family("torch_ao").quantize_dynamic(model)
    return _tag(converted, recipe | {"architecture": getattr(model, "architecture", None)}, _layers(model))


def quantize_static(model, calibration, *, engine=None, per_channel=True, observer="minmax", reduce_range=None):
    """Return an INT8 copy of `model`: folded, calibrated and converted to real integer kernels.

    model: float32 module in evaluation mode that torch.fx (for torch's first four engines) or torch.export (for all others)
    can trace. calibration: iterable of image tensors, or of `(images, labels)` as `data.batches` yields them; labels are not
    used. engine: a name from `engines()`, by default the best one here. per_channel: one weight scale per output channel
    instead of one per tensor. observer: how activation ranges are chosen, `"minmax"` or `"histogram"` (the range of least
    squared error). reduce_range: give weights 7 bits (-63..63) and leave the eighth as headroom, so that two products fit into
    16 bits; None decides by `needs_headroom`. False where that says True costs accuracy in some kernels: a lesson, not a
    setting. (torch's observers have an option of that name that takes the bit from the activations, which costs more.) What
    else is an engine's own, its file says.

    Raises `ValueError` for an unknown engine or observer, one that the engine does not have, or an empty calibration set;
    `RuntimeError` when the engine does not run here.
    """
    recipe = _recipe("static", engine, per_channel, observer, reduce_range)
    family = _able(_family(recipe["engine"]), "quantize_static", recipe["engine"])
    converted = family.quantize_static(model, _images(calibration), recipe)
    return _tag(converted, recipe | {"architecture": getattr(model, "architecture", None)}, _layers(model))


def quantize_weight_only(model, *, bits=4, group_size=128, layers=None):
    """Return a copy of `model` whose linear layers keep weights of 4 or 8 bits in memory and compute with them.

    What is read from memory is a quarter or less, inputs and products stay BF16 or float32: for networks of which a few rows
    are asked at a time, such as language models. Weights that are 4-bit integers in groups already stay those. layers: bits
    of single layers by name, None for one that stays as it is. See `weight_only`. Raises `ValueError` for other bits, a name
    that no linear layer has, and a group size that the kernel does not have.
    """
    return _load_family("weight_only").quantize_weight_only(model, bits=bits, group_size=group_size, layers=layers)


def linear_ways(*, group_size=128):
    """Return name → `(bits per weight, make)`: every way here to multiply by the weights of one linear layer.

    make: called with weights float32 `(out, in)`, returns a callable, float32 `(rows, in)` → float32 `(rows, out)`.
    """
    return _load_family("weight_only").ways(group_size)


def prepare_qat(model, *, engine=None, per_channel=True, reduce_range=None, image_shape=(3, 64, 64)):
    """Return a copy of `model` in training mode with fake-quantizers and observers in it, ready for a training loop.

    Batch norms are fused into the convolutions in their trainable form, so they go on learning. Turn it into integers with
    `convert_qat`. image_shape: of one image; engine `"pt2e"` takes no other. The rest is as in `quantize_static`.
    Raises `ValueError` for an engine that cannot train: what `course_utils.qat` trains can be `deploy`ed on those.
    """
    recipe = _recipe(PREPARED, engine, per_channel, "minmax", reduce_range)
    family = _able(_family(recipe["engine"]), "prepare_qat", recipe["engine"])
    prepared = family.prepare_qat(model, recipe, image_shape)
    return _tag(prepared, recipe | {"architecture": getattr(model, "architecture", None)}, _layers(model))


def convert_qat(model):
    """Return the INT8 model of one trained after `prepare_qat`; the trained one is left as it is.

    Raises `ValueError` for a model that `prepare_qat` did not make.
    """
    recipe = recipe_of(model)
    if recipe["kind"] != PREPARED:
        raise ValueError(f"expected a model from prepare_qat, got one whose kind is {recipe['kind']!r}")
    recipe = recipe | {"kind": "qat"}
    return _tag(_family(recipe["engine"]).convert_qat(model, recipe), recipe, model.meta["course_layers"])


def deploy(model, *, engine, precision="fp32", image_shape=(3, 64, 64)):
    """Return `model` on another engine: callable, float32 images `(n, *image_shape)` → float32 logits, any n.

    engine and precision: a pair of `PRECISIONS`. With `"fp32"`, `"bf16"` and `"fp16"`, model is a float32 module in evaluation
    mode, which is left as it is: what quantized models of the same engine have to be compared with. With `"int8"` it is a
    network of `simulate.quantize` or `qat.convert` with 8 bits for activations and at most 8 for weights, whose very integers
    the engine gets (`export_onnx`): where `needs_headroom` says so, give weights 7. image_shape: of one image; most engines
    take no other afterwards.

    In all of them batch norms are folded (`weights.fold_batch_norm`, or by the engine itself), memory is laid out as the
    engine likes it best, and gradients are off. `"torch"` is eager torch; `"inductor"` is torch.compile with frozen weights,
    which needs a C++ compiler and takes up to a minute to compile.

    Raises `ValueError` for an unknown engine, a precision it does not have, or a network that does not fit the precision;
    `RuntimeError` when the engine does not run here.
    """
    if engine not in PRECISIONS:
        raise ValueError(f"unknown engine {engine!r}: deploy has {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[engine]:
        possible = "; ".join(f"{name}: {', '.join(precisions)}" for name, precisions in PRECISIONS.items())
        raise ValueError(f"engine {engine!r} has no precision {precision!r} here. There are {possible}")
    _check_not_made(model)
    simulated = _is_simulated(model)
    if simulated and precision != "int8":
        raise ValueError(f"this network rounds to few bits already: deploy it with precision='int8', not {precision!r}")
    if precision == "int8" and not simulated:
        raise ValueError(
            f"precision 'int8' is for networks of simulate.quantize or qat.convert; from a float one engine {engine!r} makes "
            "integers by itself: quantize_static(model, calibration, engine=...)"
        )
    image_shape = tuple(image_shape)
    recipe = {"kind": DEPLOYED, "engine": engine, "precision": precision}
    deployed = _family(engine).deploy(model, precision, image_shape)
    return _tag(deployed, recipe | {"architecture": getattr(model, "architecture", None)}, _layers(model))


def export_onnx(model, path, *, image_shape=(3, 64, 64), opset=18):
    """Write `model` to `path` as ONNX, for any number of images of `image_shape`, and return the bytes written.

    model: a float32 module, or a network of `simulate.quantize` or `qat.convert`, whose roundings become explicit
    QuantizeLinear/DequantizeLinear pairs: the file that ONNX Runtime, OpenVINO and TensorRT read (see `export.to_onnx`).
    Raises `ValueError` for a network that ONNX has no integers for, `RuntimeError` without the packages onnx and onnxscript.
    """
    _check_not_made(model)
    from . import export

    content = export.to_onnx(model, tuple(image_shape), opset=opset)
    with files.replacing(path) as partial:
        return partial.write_bytes(content)


def integers(model, images):
    """Return the 8-bit integers that every step of a quantized model computes on `images`: a dict of name → tensor.

    The names are those of `integer.IntegerModel(model).steps`, so that a learner can compare layer by layer.
    Raises `ValueError` for a model that `quantize_static` or `convert_qat` did not make, one of engine `"pt2e"`, which
    keeps some sums unrounded, or one of an engine outside torch, which does not show its integers.
    """
    recipe = _static_recipe(model)
    _integer_steps(model)
    return _family(recipe["engine"]).integers(model, images, recipe["engine"])


def reference(model):
    """Return a quantized model in float arithmetic, a `FloatModel`: callable, images → logits, without any kernel.

    It has the same weights (dequantized) and rounds activations to the same values, so whatever a kernel does differently by
    more than a rounding is the kernel's doing, not quantization's. Serves all engines of torch.
    Raises `ValueError` for a model that `quantize_static` or `convert_qat` did not make, with an operation that
    `integer.Step` cannot describe, or of an engine outside torch.
    """
    from .float_model import FloatModel

    return FloatModel(_steps(model))


def recipe_of(model):
    """Return how a model was made: a dict of kind, engine, per_channel, observer, reduce_range, architecture.

    Of a deployed one: kind, engine, precision, architecture.
    """
    try:
        return model.meta["course_recipe"]
    except (AttributeError, KeyError):
        raise ValueError(
            f"this {type(model).__name__} was not made by quantize_dynamic, quantize_static, prepare_qat or deploy"
        ) from None


def save(model, path):
    """Write a quantized or deployed model to `path` and return the bytes written.

    The file is safetensors: INT8 weights, float32 scales, and in its metadata how the model was made, with a checksum of all
    of it. Engines outside torch have files of their own (ONNX, OpenVINO IR, .pte), of which it holds the bytes. No code is
    stored and none is run on loading. Raises `ValueError` for a model that this package did not make, and one deployed on
    torch itself, which has no other file than the weights.
    """
    recipe = recipe_of(model)
    if recipe["kind"] == PREPARED:
        raise ValueError("this model still trains in float: turn it into integers with convert_qat before saving")
    tensors, rest = _able(_family(recipe["engine"]), "flatten", recipe["engine"]).flatten(model)
    facts = {"format": FORMAT, "recipe": recipe, "layers": model.meta["course_layers"], "rest": rest}
    _check_facts(path, facts)
    return files.save_tensors(path, tensors, facts)


def load(path, *, model=None):
    """Return the model stored by `save`, ready to call, with outputs identical to the saved one's on the same processor.

    model: the float32 module it was made from (any weights), needed only for architectures that `course_utils.models` does
    not know, and not at all for engines outside torch, whose files hold the whole network.

    Warns when its sums `may_overflow` on this processor, which costs accuracy.

    Raises `FileNotFoundError`, `ValueError` for a file of another kind or version, one with a changed byte, or a model that
    does not fit, `RuntimeError` when its engine does not run here. What the file says about sizes is held against what it
    holds before memory is taken for them.
    """
    facts, tensors = _read(path)
    recipe = facts["recipe"]
    try:
        family = _family(recipe["engine"])
        if getattr(family, "SELF_CONTAINED", False):
            model = None
        else:
            model = _build(recipe, tensors) if model is None else model
            _check_layers(model, facts["layers"])
        loaded = _tag(_rebuild(family, model, facts, tensors), recipe, facts["layers"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if may_overflow(loaded):
        warnings.warn(
            f"{path}: its weights use all 8 bits, and sums of engine {recipe['engine']!r} may overflow on this processor, which "
            "costs accuracy: quantize again here, or with reduce_range=True, which is right everywhere",
            stacklevel=2,
        )
    return loaded


def _build(recipe, tensors):
    """Return the float network that a recipe names, if it is not larger than its stored tensors."""
    from .. import int4, models

    architecture = recipe.get("architecture")
    if architecture is None:
        raise ValueError("course_utils.models does not know this network: pass the float module as model=")
    try:
        skeleton = int4.skeleton(models.build, **architecture)
        size = sum(parameter.numel() for parameter in skeleton.parameters())
    except Exception as error:  # whatever a damaged architecture leads to
        raise ValueError(f"there is no network {architecture} ({type(error).__name__}: {error})") from error
    # A folded batch norm leaves fewer numbers, scales and zero points are more: never by so much.
    if size > 2 * sum(tensor.numel() for tensor in tensors.values()):
        raise ValueError(f"{architecture} has {size:,} parameters, more than are stored")
    return models.build(**architecture)


def _rebuild(family, model, facts, tensors):
    try:
        return family.rebuild(model, facts["recipe"], tensors, facts["rest"])
    except ValueError:
        raise
    except Exception as error:  # engines raise their own types
        raise ValueError(f"the model cannot be made again ({type(error).__name__}: {error}): save it again") from error


def _read(path):
    """Return what `save` wrote to `path`: its facts and its tensors, checked against the checksum."""
    facts, tensors = files.load_tensors(path, remedy="save the model again")
    _check_format(path, facts.get("format"))
    files.check_tensors(path, facts, tensors, remedy="save the model again")
    _check_facts(path, facts)
    return facts, tensors


def _check_facts(path, facts):
    """Raise `ValueError` unless the facts of a file are of the types, and its images of a size, that loading counts on."""
    recipe, layers, rest = (facts.get(key) for key in ("recipe", "layers", "rest"))
    if not all(isinstance(part, dict) for part in (recipe, layers, rest)) or not {"kind", "engine"} <= recipe.keys():
        raise ValueError(f"{path} does not say how its model was made: save the model again")
    if not all(isinstance(layer, dict) for layer in layers.values()):
        raise ValueError(f"{path} does not say what the layers of its model do: save the model again")
    sides = rest.get("image_shape", [1])
    whole = isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides)
    if not whole or math.prod(sides) > LARGEST_IMAGE:
        raise ValueError(
            f"{path} is for images of shape {sides}: positive whole numbers were expected, {LARGEST_IMAGE:,} numbers at most"
        )


def _check_format(path, found):
    kind, _, version = FORMAT.rpartition("-")
    other = re.fullmatch(rf"{kind}-(\d{{1,9}})", str(found))
    if other and found != FORMAT:
        newer = int(other[1]) > int(version)
        if newer:
            remedy = "update the course (git pull, then make setup)"
        else:
            remedy = "quantize the model again and save it, or run the notebook that made the file again"
        raise ValueError(
            f"{path} was written by {'a newer' if newer else 'an older'} version of the course (format {found!r}, this one "
            f"reads {FORMAT!r}): {remedy}"
        )
    if found != FORMAT:
        raise ValueError(f"{path} was not written by backends.save (format {found!r}, expected {FORMAT!r})")


def _layers(model):
    """Return what the layers of a float module do besides their weights, JSON-ready: name → class and geometry."""
    found = {}
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            values = {key: getattr(module, key) for key in GEOMETRY if hasattr(module, key)}
            found[name] = {"class": type(module).__name__} | values
    return json.loads(json.dumps(found, default=str))


def _check_layers(model, stored):
    kind, found = type(model).__name__, _layers(model)
    if found.keys() != stored.keys():
        strange = ", ".join(sorted(found.keys() ^ stored.keys())[:3])
        raise ValueError(f"the stored weights do not fit this {kind}; they differ in {strange}, ...")
    for name, layer in stored.items():
        for key in sorted(layer.keys() | found[name].keys()):
            here, there = found[name].get(key), layer.get(key)
            if here != there:
                raise ValueError(
                    f"the stored weights do not fit this {kind}: {name} has {key} {here}, and had {there} when they were "
                    "saved. Pass the architecture that was quantized"
                )


def _tag(model, recipe, layers):
    """Return `model` with the facts about it that lessons ask for and `save` stores."""
    if not hasattr(model, "meta"):
        model.meta = {}
    model.meta |= {"course_recipe": recipe, "course_layers": layers}
    if recipe["kind"] in ("static", "qat"):
        model.meta["course_steps"] = _integer_steps
    return model


def _static_recipe(model):
    recipe = recipe_of(model)
    if recipe["kind"] not in ("static", "qat"):
        raise ValueError(
            f"only statically quantized models compute in integers throughout, this one is {recipe['kind']!r}"
        )
    return recipe


def _integer_steps(model):
    """Return the steps of a model for `integer.IntegerModel`, which rounds after each."""
    engine, steps = recipe_of(model)["engine"], _steps(model)
    unrounded = next((step.name for step in steps[:-1] if step.output is None), None)
    if unrounded is not None:
        raise ValueError(
            f"engine {engine!r} goes on with unrounded sums after {unrounded}, which has no integer counterpart in "
            "course_utils.integer: backends.reference(model) runs it, or quantize with another engine"
        )
    return steps


def _steps(model):
    engine = _static_recipe(model)["engine"]
    return _able(_family(engine), "steps", engine).steps(model)


def _able(family, operation, engine):
    """Return `family`, or say why it has no such operation and what has."""
    if not hasattr(family, operation):
        raise ValueError(CANNOT[operation].format(engine=repr(engine)))
    return family


def _check_not_made(model):
    made = getattr(model, "meta", {}).get("course_recipe")
    if made is not None:
        raise ValueError(
            f"this model was made for engine {made['engine']!r} and stays there: pass the float network, or one of "
            "simulate.quantize or qat.convert"
        )


def _is_simulated(model):
    """Return whether a network is one of `simulate.quantize` or `qat.convert`: it rounds weights or inputs of layers."""
    return any(
        hasattr(m, "weight_qparams") or hasattr(m, "input_quantizer") for m in getattr(model, "modules", tuple)()
    )


def _recipe(kind, engine, per_channel, observer, reduce_range):
    if observer not in OBSERVERS:
        raise ValueError(f"unknown observer {observer!r}: choose one of {', '.join(OBSERVERS)}")
    engine = engine or default_engine()
    return {
        "kind": kind,
        "engine": engine,
        "per_channel": bool(per_channel),
        "observer": observer,
        "reduce_range": needs_headroom(engine) if reduce_range is None else bool(reduce_range),
    }


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
        # Those of torch alone: to ask the others takes seconds.
        running = ", ".join(e.name for e in _family_engines("torch_ao") if e.runs) or "none"
        raise RuntimeError(
            f"engine {engine!r} does not run here: {found.why}. Engines of torch that do: {running}; "
            "backends.engines() knows of all"
        )
    return _load_family(family)


def _load_family(family):
    try:
        return importlib.import_module(f".{family}", __name__)
    except Exception as error:  # broken binaries raise anything from ImportError to RuntimeError
        raise RuntimeError(_unavailable(family, error)) from None


def _family_engines(family):
    try:
        return importlib.import_module(f".{family}", __name__).engines()
    except Exception as error:  # as above, and asking a broken package for its version does too
        return [Engine(name, False, _unavailable(family, error)) for name in FAMILIES[family]]


def _unavailable(family, error):
    first_line = str(error).partition("\n")[0]
    remedy = f": {REMEDIES[family]}" if family in REMEDIES else ""
    return (
        f"the {family} engines are not available with this installation ({type(error).__name__}: {first_line}){remedy}"
    )
