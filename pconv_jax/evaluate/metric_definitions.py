"""Definitions of the metrics of an evaluation."""

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """Definition of a metric.

    Attributes:
      definition: Words that are exact enough to compute it.
      unit: The unit, or ``''``.
      better: Whether lower or higher values are better.
    """

    definition: str
    unit: str
    better: Literal["lower", "higher"]


_L1 = "mean absolute difference over all pixels and channels, in percent of the range"
_PSNR = (
    "peak signal-to-noise ratio over all pixels and channels, 10 log10(1 / mean "
    "squared error) of values in [0, 1]; null if both images are equal, because it is "
    "infinite then; means leave these out"
)
_SSIM = (
    "structural similarity (Wang et al. 2004): Gaussian windows of 11 x 11 pixels with "
    "sigma 1.5 that lie within the image, K1 = 0.01, K2 = 0.03, biased covariances, "
    "mean over channels; as scikit-image with gaussian_weights=True and "
    "use_sample_covariance=False"
)
_COMP = "of the composite (the truth where valid, the output in the hole)"
_OUT = "of the raw network output, valid pixels included"

METRICS: Mapping[str, Metric] = {
    "l1": Metric(f"{_L1}; {_COMP}", "%", "lower"),
    "l1_hole": Metric(
        "mean absolute difference over the pixels and channels of the hole, in percent "
        "of the range; composite and output are equal there",
        "%",
        "lower",
    ),
    "psnr": Metric(f"{_PSNR}; {_COMP}", "dB", "higher"),
    "ssim": Metric(f"{_SSIM}; {_COMP}", "", "higher"),
    "lpips": Metric(
        "learned perceptual distance (Zhang et al. 2018), version 0.1 with AlexNet; "
        f"{_COMP}",
        "",
        "lower",
    ),
    "vgg_distance": Metric(
        "perceptual distance without learned channel weights: the formula of LPIPS on "
        "pool1, pool2 and pool3 of ImageNet's VGG16, or of the VGG that was given, all "
        "channels weighted equally; "
        f"{_COMP}",
        "",
        "lower",
    ),
    "output_l1": Metric(f"{_L1}; {_OUT}", "%", "lower"),
    "output_psnr": Metric(f"{_PSNR}; {_OUT}", "dB", "higher"),
    "output_ssim": Metric(f"{_SSIM}; {_OUT}", "", "higher"),
}
"""The metrics of single examples, by name."""

SET_METRICS: Mapping[str, Metric] = {
    "fid": Metric(
        "Frechet Inception distance (Heusel et al. 2017) between all composites of a "
        "row and the true images, by the network of pytorch-fid. It depends on the "
        "number of images, and is far too high for fewer than 2048: compare it only "
        "between methods, on the same examples",
        "",
        "lower",
    ),
    "inception_score": Metric(
        "Inception Score (Salimans et al. 2016) of all composites of a row, as one "
        "split. It depends on the number of images",
        "",
        "higher",
    ),
}
"""The metrics of sets of examples, by name. They have no intervals."""

ALL_METRICS: Mapping[str, Metric] = {**METRICS, **SET_METRICS}
