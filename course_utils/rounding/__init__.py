"""Repairs for few bits that need no training of the network and no labels: equalize, round better, correct the bias.

    equalized = cross_layer_equalization(model)
    quantized, report = adaround(equalized, policy, calibration)      # or gptq, or awq
    quantized = bias_correction(equalized, quantized, calibration)

All but equalization go through the network once, with all calibration inputs together, and change each layer when they
arrive there: what comes in has then gone through the earlier layers as they are quantized and repaired already (`walk`).
Memory is the price: 256 images of 64 × 64 pixels take 100 MB in the widest layer of MobileNetV2. A layer that is called more
than once is an error, and a matrix that a layer shares with an embedding (tied weights) is changed in the layer alone.
"""

from .adaround import Rounding, adaround, random_rounding
from .awq import Scaling, awq
from .bias import bias_correction
from .equalization import CappedReLU, cross_layer_equalization
from .gptq import Compensation, gptq

__all__ = [
    "CappedReLU",
    "Compensation",
    "Rounding",
    "Scaling",
    "adaround",
    "awq",
    "bias_correction",
    "cross_layer_equalization",
    "gptq",
    "random_rounding",
]
