"""Observers look at batches of activations and choose the range that the integers shall cover (calibration).

    observer = Percentile(99.9)
    for batch in batches:
        observer.observe(batch)
    qparams = observer.qparams(bits=8)

Every observer ends in `affine.qparams_from_range`: they differ in the range alone, and zero always stays exact. `MinMax` and
`MovingAverage` follow the extremes. `Percentile`, `MSE` and `Entropy` cut the range at one magnitude, which clips the few
largest values and gives all the others a finer step. Wu et al. 2020 (arXiv 2004.09602) compare these choices.
"""

import torch

from . import affine


class MinMax:
    """The smallest and the largest value seen so far: nothing is clipped. axis: one range per index of that dimension."""

    def __init__(self, *, axis=None):
        self.axis = axis
        self._low = self._high = None

    @torch.no_grad()
    def observe(self, x):
        """Take in one batch, a float tensor of any shape; return the observer.

        Raises `ValueError` for integers, an empty tensor, NaN or infinite values, an axis that `x` does not have, or another
        number of channels than before. The batch is then not counted.
        """
        low, high = affine.extremes(x, axis=self.axis)
        if self._low is not None:
            if low.shape != self._low.shape:
                raise ValueError(f"axis {self.axis} had {len(self._low)} channels in earlier batches, now {len(low)}")
            low, high = self._merge(low, high)
        self._low, self._high = low, high
        return self

    def qparams(self, *, bits=8, symmetric=False, signed=None):
        """Return the `affine.QParams` of the range chosen for `bits` bits; the arguments are those of `choose_qparams`.

        Raises `RuntimeError` before the first batch and `ValueError` for bits outside 2 to 8.
        """
        if self._low is None:
            raise RuntimeError("there is no range yet: call observe(x) with at least one batch first")
        scheme = {"bits": bits, "symmetric": symmetric, "signed": signed}
        return affine.qparams_from_range(*self._range(scheme), axis=self.axis, **scheme)

    def _merge(self, low, high):
        return torch.minimum(self._low, low), torch.maximum(self._high, high)

    def _range(self, scheme):
        return self._low, self._high


class MovingAverage(MinMax):
    """The exponential moving average of the smallest and the largest value of each batch.

    Jacob et al. 2018 (arXiv 1712.05877, section 3.1) and Krishnamoorthi 2018 (1806.08342): after the first batch,
    low += averaging · (min(x) − low), and high alike. averaging: above 0, at most 1; the share of the newest batch. Other
    shares raise `ValueError`.
    """

    def __init__(self, averaging=0.01, *, axis=None):
        if not 0 < averaging <= 1:
            raise ValueError(f"averaging must be above 0 and at most 1, got {averaging}")
        super().__init__(axis=axis)
        self.averaging = averaging

    def _merge(self, low, high):
        return torch.lerp(self._low, low, self.averaging), torch.lerp(self._high, high, self.averaging)


class _Histogram:
    """How many values fell where: `bins` equal bins over −2^exponent..2^exponent, and exact zeros counted apart.

    The range is the smallest power of two above every value so far. When it doubles, neighbouring bins merge in pairs, so no
    count is lost or moved to a bin it does not belong to: the histogram is the same as if all batches had come at once, in
    any order. Positions are known to one bin: at most max|x| · 4 / bins.
    """

    bins = 8192  # 64 KiB of counts; at least 2048 bins lie between 0 and max|x|

    def __init__(self):
        self.half = self.bins // 2
        self.counts = torch.zeros(self.bins, dtype=torch.int64)
        self.zeros = 0
        self.exponent = -200  # below every float32

    @property
    def width(self):
        """The width of a bin."""
        return 2.0**self.exponent / self.half

    def add(self, x):
        """Count the values of `x`, a float tensor of any shape."""
        # A double divides by a power of two exactly, however small or large it is.
        nonzero = x[x != 0].float().double()
        self.zeros += x.numel() - nonzero.numel()
        if nonzero.numel():
            self._grow(int(torch.frexp(nonzero.abs().max()).exponent))
            index = torch.floor(nonzero / self.width).long() + self.half
            self.counts += torch.bincount(index, minlength=self.bins).cpu()

    def magnitudes(self):
        """Return the counts of |x| without the zeros: float64 `(bins / 2,)`, from 0 upwards."""
        return (self.counts[self.half :] + self.counts[: self.half].flip(0)).double()

    def _grow(self, exponent):
        doublings = min(max(exponent - self.exponent, 0), 32)  # 32 of them empty every bin into the middle two
        index = ((torch.arange(self.bins) - self.half) >> doublings) + self.half
        self.counts = torch.zeros_like(self.counts).index_add(0, index, self.counts)
        self.exponent = max(exponent, self.exponent)


class _Clipping(MinMax):
    """An observer that also keeps the histogram of all values and cuts the range at one magnitude, `_threshold(scheme)`.

    The histogram, and the search on it, are on the CPU; the range ends up where the values are.
    """

    def __init__(self):
        super().__init__()
        self._histogram = _Histogram()

    @torch.no_grad()
    def observe(self, x):
        super().observe(x)
        self._low, self._high, self._device = self._low.cpu(), self._high.cpu(), x.device
        self._histogram.add(x)
        return self

    def _range(self, scheme):
        low, high = self._low, self._high
        if not low == high == 0:
            low, high = self._cut(self._threshold(scheme))
        return low.to(self._device), high.to(self._device)

    def _cut(self, threshold):
        threshold = torch.as_tensor(threshold, dtype=torch.float64)
        # With zero in it, for a cut below a constant 5 would leave nothing.
        return torch.maximum(self._low.clamp(max=0), -threshold), torch.minimum(self._high.clamp(min=0), threshold)

    observe.__doc__ = MinMax.observe.__doc__


class Percentile(_Clipping):
    """The range that `percentile` percent of all values fall into: the others, largest in magnitude, are clipped.

    Wu et al. 2020 (arXiv 2004.09602): a percentile of |x|, so both tails are cut at the same magnitude, and data that are
    never negative lose nothing at 0. The cut is rounded up to the next edge of a histogram bin, at most max|x| / 2048 away.
    percentile: above 50, at most 100 (which is min-max). Others raise `ValueError`.
    """

    def __init__(self, percentile=99.99):
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
        super().__init__()
        self.percentile = percentile

    def _threshold(self, scheme):
        covered = self._histogram.zeros + self._histogram.magnitudes().cumsum(0)
        needed = covered[-1] * (self.percentile / 100) - 1e-6  # 99.9 % of 1000 is a little more than 999 in doubles
        return (torch.searchsorted(covered, needed) + 1) * self._histogram.width


class MSE(_Clipping):
    """The range with the least squared error Σ (x − fake_quantize(x))² at the width asked for.

    Tried are the observed extremes cut at max|x| · 0.97^k, down to a hundredth of max|x|. The error of each comes from the
    histogram: within a bin the values are taken as evenly spread, and the squared error is integrated over it exactly.
    """

    _fractions = 0.97 ** torch.arange(152.0, dtype=torch.float64)

    def _threshold(self, scheme):
        thresholds = torch.maximum(-self._low, self._high) * self._fractions
        return thresholds[self._errors(thresholds, scheme).argmin()]

    def _errors(self, thresholds, scheme):
        """Return the squared error, over all values, of a cut at each of `thresholds`: float64 of the same shape."""
        histogram = self._histogram
        used = histogram.counts.nonzero().squeeze(1)
        edges = (torch.stack([used, used + 1]) - histogram.half) * histogram.width
        edges = edges.clamp(self._low, self._high)  # the outer bins end where the values do
        p = affine.qparams_from_range(*self._cut(thresholds), axis=0, **scheme)
        scale, zero_point = p.scale.double()[:, None, None], p.zero_point[:, None, None]
        u = edges / scale
        nearest = u.round().clamp(p.qmin - zero_point, p.qmax - zero_point)
        off = u - nearest
        # The integral of (u − nearest)² from 0 to u: every full step adds 1/12, beyond the last one it is a cube.
        below, above = (nearest / 12 + off**3 / 3).unbind(1)
        width = (u[:, 1] - u[:, 0]).clamp(min=1e-4)
        mean = torch.where(width > 1e-4, (above - below) / width, off[:, 1] ** 2)
        return (histogram.counts[used] * mean).sum(1) * p.scale.double() ** 2


class Entropy(_Clipping):
    """The range whose quantized distribution tells most about the real one: the least Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017; Wu et al. 2020 (arXiv 2004.09602). For each threshold t on the
    histogram of |x|: P is the histogram up to t, with everything beyond added to its last bin; Q is the histogram up to t
    merged into as many levels as the integers have for |x|, each level then spread evenly over its bins that are not empty.
    The t of the least KL(P‖Q) is taken, as the range −t..t within the observed extremes.

    A ReLU makes a spike of exact zeros, which would make up most of P. TensorRT's calibrator overwrites the first bin with
    the second to remove it; here exact zeros, which cost no error under any range, are left out. At most about 500
    thresholds are tried, where TensorRT tries every bin.
    """

    def _threshold(self, scheme):
        histogram = self._histogram.magnitudes()
        p = affine.qparams_from_range(self._low, self._high, **scheme)
        upper = scheme["symmetric"] or self._high >= -self._low  # the side with the largest magnitude
        levels = 1 + (p.qmax - int(p.zero_point) if upper else int(p.zero_point) - p.qmin)
        ends = histogram.nonzero().squeeze(1) + 1  # a threshold above an empty bin would make KL infinite
        ends = ends[ends >= min(levels, int(ends[-1]))]
        ends = ends.flip(0)[:: -(-len(ends) // 500)]  # from the largest: with equal divergence, clip less
        divergences = torch.stack([self._divergence(histogram, int(end), levels) for end in ends])
        return ends[divergences.argmin()] * self._histogram.width

    @staticmethod
    def _divergence(histogram, end, levels):
        inside = histogram[:end]
        level = torch.arange(end) * levels // end
        filled = inside > 0
        q = torch.bincount(level, inside) / torch.bincount(level, filled.double()).clamp(min=1)
        q = (q[level] / inside.sum())[filled]
        p = inside.clone()
        p[-1] += histogram[end:].sum()
        p = (p / p.sum())[filled]
        return (p * (p / q).log()).sum()
