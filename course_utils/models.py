"""The course's networks: torchvision's own architectures, with weights trained here or torchvision's official ones, and a
small language model.
"""

import pickle

from . import data, files

NAMES = ("resnet18", "mobilenet_v2")  # of images
LANGUAGE = "char_lm"


def build(name, *, num_classes=10):
    """Return the architecture `name` with random weights, float32, in training mode.

    Those of torchvision take float32 images `(n, 3, height, width)` and return float32 logits `(n, num_classes)`;
    `"char_lm"` is a `char_lm.CharLM`, which has its own classes. Raises `ValueError` for a name the course does not have,
    `RuntimeError` when torchvision does not load.
    """
    _check(name)
    if name == LANGUAGE:
        from . import char_lm

        model = char_lm.CharLM()
        model.architecture = {"name": name}
        return model
    model = getattr(data.require_torchvision().models, name)(num_classes=num_classes)
    model.architecture = {"name": name, "num_classes": num_classes}
    return model


def architecture(model):
    """Return the keyword arguments of `build` that made `model`, which is how saved files name its architecture.

    Raises `ValueError` for a model that did not come from this module.
    """
    try:
        return dict(model.architecture)
    except AttributeError:
        raise ValueError(
            f"this {type(model).__name__} did not come from course_utils.models, so a file cannot name its architecture"
        ) from None


def load(name, *, weights="course"):
    """Return a trained model in evaluation mode, float32.

    name: `"resnet18"` (He et al. 2016), `"mobilenet_v2"` (Sandler et al. 2018) or `"char_lm"` (`char_lm.CharLM`).
    weights: `"course"` reads the checkpoint committed in `data/checkpoints` (10 Fashion-MNIST classes, trained by
    `make train`, or the characters of `text`, by `make train-lm`; stored as FP16); `"imagenet"` asks torchvision for its
    official weights (1,000 classes), from the torch hub cache or the network; None leaves the weights random.

    Raises `ValueError` for an unknown name or weights, `DataFileError` for a missing or altered checkpoint, `RuntimeError`
    when the official weights are neither cached nor reachable, or torchvision does not load.
    """
    if weights == "imagenet":
        return _imagenet(name).eval()
    model = build(name)
    if weights == "course":
        stored = _stored(name)
        try:
            model.load_state_dict(
                {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
            )
        except RuntimeError as error:
            path = checkpoint(name)
            raise files.DataFileError(f"{path} does not hold a {name} ({error}). {files.restore(path)}") from None
    elif weights is not None:
        raise ValueError(f'unknown weights {weights!r}: choose "course", "imagenet" or None')
    return model.eval()


def checkpoint(name):
    """Return the course checkpoint's file name relative to `data/`, the key of its manifest entry."""
    return f"checkpoints/{name}.safetensors"


def _stored(name):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = files.verified(checkpoint(name))
    try:
        return load_file(path)
    except SafetensorError as error:  # whoever wrote it stated its checksum too
        raise files.DataFileError(
            f"{path} is no safetensors file ({error}). {files.restore(checkpoint(name))}"
        ) from None


def _imagenet(name):
    import torch

    _check(name)
    if name == LANGUAGE:
        raise ValueError(f'{name} has no weights for images: choose weights="course" or None')
    official = data.require_torchvision().models.get_model_weights(name).DEFAULT
    try:
        weights = official.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network, or a damaged file
        file_name = official.url.rsplit("/", 1)[-1]
        raise RuntimeError(
            f"torchvision's official weights for {name} could not be loaded ({error}). Without a network, put {file_name} "
            f"(from {official.url}) into {torch.hub.get_dir()}/checkpoints (TORCH_HOME may name another folder) and call again; "
            f'the lessons themselves only need load("{name}").'
        ) from None
    model = build(name, num_classes=len(official.meta["categories"]))
    model.load_state_dict(weights)
    return model


def _check(name):
    known = (*NAMES, LANGUAGE)
    if name not in known:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(known)}")
