"""From records of examples to means, intervals, tables and files."""

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pconv_jax.evaluate.protocol import MASK_CLASSES, bin_name
from pconv_jax.evaluate.store import Record, key_of
from pconv_jax.runs.output import format_table

_RESAMPLES = 1000
_DECIMALS = 6  # Of numbers that are written.


class Metric(NamedTuple):
    """What a number is.

    Attributes:
      definition: in words, exact enough to compute it.
      unit: '' if it has none.
      better: 'lower' or 'higher'.
    """

    definition: str
    unit: str
    better: str


_L1 = "mean absolute difference over all pixels and channels, in percent of the range"
_PSNR = (
    "peak signal-to-noise ratio over all pixels and channels, 10 log10(1 / mean "
    "squared error) of values in [0, 1]; null where pictures are equal, which is "
    "infinite and left out of means"
)
_SSIM = (
    "structural similarity (Wang et al. 2004): Gaussian windows of 11 x 11 pixels with "
    "sigma 1.5 that lie within the picture, K1 = 0.01, K2 = 0.03, biased covariances, "
    "mean over channels; scikit-image's with gaussian_weights=True and "
    "use_sample_covariance=False"
)
_COMP = "of the composite (the truth where valid, the output in the hole)"
_OUT = "of the network's output itself, valid pixels included"

METRICS: Mapping[str, Metric] = {
    "l1": Metric(f"{_L1}; {_COMP}", "%", "lower"),
    "l1_hole": Metric(
        "mean absolute difference over the pixels of the hole and channels, in percent "
        "of the range; composite and output do not differ there",
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
        "perceptual distance without learned weights: LPIPS's formula of pool1, pool2 "
        "and pool3 of the VGG that the evaluation was given, all channels alike; "
        f"{_COMP}",
        "",
        "lower",
    ),
    "output_l1": Metric(f"{_L1}; {_OUT}", "%", "lower"),
    "output_psnr": Metric(f"{_PSNR}; {_OUT}", "dB", "higher"),
    "output_ssim": Metric(f"{_SSIM}; {_OUT}", "", "higher"),
}
"""All metrics of single examples, by name."""

SET_METRICS: Mapping[str, Metric] = {
    "fid": Metric(
        "Frechet Inception distance (Heusel et al. 2017) between all composites of a "
        "row and the true pictures, by pytorch-fid's network. It depends on how many "
        "there are, and of fewer than 2048 lies far above that of many: to be compared "
        "within a row alone",
        "",
        "lower",
    ),
    "inception_score": Metric(
        "Inception Score (Salimans et al. 2016) of all composites of a row, as one "
        "split. It depends on how many there are",
        "",
        "higher",
    ),
}
"""All metrics of sets of examples, by name. They have no intervals."""

ALL_METRICS: Mapping[str, Metric] = METRICS | SET_METRICS

INTERVALS = (
    f"95 % percentile bootstrap, {_RESAMPLES} resamples of pictures: all examples of a "
    "picture are drawn together"
)
"""How intervals are made."""


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
      examples: one record an example and method: ``method``, ``hole_bin``, ``border``,
        ``index``, ``picture`` (its number), ``hole_ratio`` and `METRICS`, those of the
        raw output for networks alone.
      failures: the same where a method failed, with ``error`` instead of metrics.
      seconds: of each method, the wall time of every picture.
      left_out: what could not be evaluated, a sentence each.
      sets: `SET_METRICS`, if there are any, by method, hole bin and border; these two
        are None for all of them.
      seed: of the resampling for intervals.
    """

    examples: list[Record]
    failures: list[Record] = dataclasses.field(default_factory=list)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    sets: dict[tuple[str, int | None, bool | None], dict[str, float]] = (
        dataclasses.field(default_factory=dict)
    )

    @property
    def methods(self) -> list[str]:
        """The methods' names, in their order."""
        both = [*self.examples, *self.failures]
        found = dict.fromkeys(record["method"] for record in both)
        return [name for name in self.seconds if name in found] or list(found)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that there are."""
        found = {name for e in self.examples for name in e}
        found |= {name for scores in self.sets.values() for name in scores}
        return [name for name in ALL_METRICS if name in found]

    def select(self, **where: Any) -> list[Record]:
        """Returns examples, e.g. ``select(method='telea', hole_bin=3)``."""
        return [e for e in self.examples if where.items() <= e.items()]

    def mean(self, **where: Any) -> dict[str, float]:
        """Returns mean metrics, e.g. ``mean(hole_bin=3, border=True)``; or of all.

        The PSNR of a perfect composite is infinite, and is left out of its mean. A mean
        of nothing is NaN.
        """
        return {name: i.mean for name, i in self.intervals(**where).items()}

    def intervals(self, **where: Any) -> dict[str, Interval]:
        """Returns mean metrics with 95 % intervals, see `INTERVALS`."""
        chosen = self.select(**where)
        intervals = {m: self._interval(*_values(chosen, m)) for m in self.metrics}
        if set(where) <= {"method", "hole_bin", "border"} and self.sets:
            method = where.get("method", self.methods[0])
            scores = self.sets.get((method, where.get("hole_bin"), where.get("border")))
            for name, score in (scores or {}).items():
                intervals[name] = Interval(score, math.nan, math.nan)
        return intervals

    def differences(
        self, method: str, reference: str, **where: Any
    ) -> dict[str, Interval]:
        """Returns metrics of a method less those of another, with 95 % intervals.

        Differences are taken example by example, of those that both have.
        """
        theirs = {key_of(e): e for e in self.select(method=reference, **where)}
        pairs = [
            (e, theirs[key_of(e)])
            for e in self.select(method=method, **where)
            if key_of(e) in theirs
        ]
        result = {}
        for name in self.metrics:
            both = [
                (a[name] - b[name], a["picture"])
                for a, b in pairs
                if a.get(name) is not None and b.get(name) is not None
            ]
            values, pictures = np.array(both).reshape(-1, 2).T
            result[name] = self._interval(values, pictures)
        return result

    def table(self) -> list[dict[str, Any]]:
        """Returns a row for each class of masks, and one for all, of each method."""
        rows = []
        for method in self.methods:
            first = {"method": method} if len(self.methods) > 1 else {}
            for hole_bin, border in MASK_CLASSES:
                where = {"method": method, "hole_bin": hole_bin, "border": border}
                if self.select(**where):
                    hole = bin_name(hole_bin)
                    row = {"hole": hole, "border": "yes" if border else "no"}
                    rows.append(first | row | self.mean(**where))
            rows.append(first | {"hole": "all", "border": ""})
            rows[-1] |= self.mean(method=method)
        return [{_heading(n): _finite(cell) for n, cell in row.items()} for row in rows]

    def summary(self) -> list[dict[str, Any]]:
        """Returns means with intervals of all methods, JSON-able.

        A row for each method, hole bin and kind of border, and for all of them. With
        several methods also the paired differences from the first one.
        """
        rows = []
        for method in self.methods:
            for place, where in groups():
                where = {"method": method} | where
                failed = [f for f in self.failures if where.items() <= f.items()]
                chosen = self.select(**where)
                if not chosen and not failed:
                    continue
                row = {"method": method} | place
                row |= {"examples": len(chosen), "failed": len(failed)}
                row |= _rounded(self.intervals(**where))
                if method != self.methods[0]:
                    del where["method"]
                    differences = self.differences(method, self.methods[0], **where)
                    row["difference"] = _rounded(differences)
                rows.append(row)
        return rows

    def timing(self) -> dict[str, dict[str, float]]:
        """Returns the seconds a picture of each method: median, mean and how many."""
        return {
            name: {
                "median_seconds": float(np.median(values)),
                "mean_seconds": float(np.mean(values)),
                "pictures": len(values),
            }
            for name, values in self.seconds.items()
            if values
        }

    def csv(self) -> str:
        """Returns a table of all examples and failures, as comma-separated values."""
        columns = ["method", "hole_bin", "border", "index", "picture", "hole_ratio"]
        columns += [*self.metrics, "error"]
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.examples, *self.failures])
        return file.getvalue()

    def __str__(self) -> str:
        """Returns the tables as text."""
        return self.format()

    def format(self, *, markdown: bool = False) -> str:
        """Returns the tables as text, or as Markdown."""
        if len(self.methods) == 1 and not markdown:
            parts = [format_table(self.table(), decimals=3)]
        else:
            raw = [m for m in self.metrics if m.startswith("output_")]
            comp = [m for m in self.metrics if m not in raw]
            parts = [format_table(self.overview(comp), markdown=markdown)]
            if raw:
                table = format_table(self.overview(raw), markdown=markdown)
                parts.append(f"Of networks' raw output:\n\n{table}")
            for name in comp:
                metric = ALL_METRICS[name]
                title = f"{_heading(name)} ({metric.better} is better)"
                title = f"## {title}\n" if markdown else title
                table = format_table(self.by_hole(name), decimals=3, markdown=markdown)
                parts.append(f"{title}\n{table}")
        notes = [*self.left_out, *self.count_failures()]
        if notes:
            bullet = "* " if markdown else ""
            parts.append("\n".join(f"{bullet}{note}" for note in notes))
        return "\n\n".join(parts)

    def overview(self, metrics: Sequence[str]) -> list[dict[str, Any]]:
        """Returns a row for each method that has them: means over all, as text."""
        timing, rows = self.timing(), []
        for method in self.methods:
            row, intervals = {"method": method}, self.intervals(method=method)
            if all(math.isnan(intervals[name].mean) for name in metrics):
                continue
            for name in metrics:
                row[_heading(name)] = format_interval(intervals[name])
            if method in timing:
                row["s/picture"] = f"{timing[method]['median_seconds']:.3g}"
            if self.failures:
                row["failed"] = sum(f["method"] == method for f in self.failures)
            rows.append(row)
        return rows

    def by_hole(self, metric: str) -> list[dict[str, Any]]:
        """Returns a metric's means: rows of method and border, columns of hole bins."""
        rows = []
        for border in (False, True):
            for method in self.methods:
                row = {"method": method, "border": "yes" if border else "no"}
                for hole_bin in range(len(MASK_CLASSES) // 2):
                    where = {"method": method, "hole_bin": hole_bin, "border": border}
                    mean = self.mean(**where).get(metric, math.nan)
                    row[bin_name(hole_bin)] = _finite(mean)
                rows.append(row)
        return rows

    def count_failures(self) -> list[str]:
        """Returns a sentence for each method that failed, and why it did."""
        notes = []
        for method in self.methods:
            errors = [f["error"] for f in self.failures if f["method"] == method]
            if errors:
                count = len(errors) + len(self.select(method=method))
                reasons = "; ".join(dict.fromkeys(errors))
                reasons = reasons if len(reasons) < 300 else reasons[:300] + "..."
                notes.append(
                    f"{method} failed on {len(errors)} of {count} examples, which its "
                    f"means leave out: {reasons}"
                )
        return notes

    def _interval(self, values: np.ndarray, pictures: np.ndarray) -> Interval:
        if not len(values):
            return Interval(math.nan, math.nan, math.nan)
        numbers, place = np.unique(pictures, return_inverse=True)
        sums = np.bincount(place, values)
        counts = np.bincount(place)
        drawn = _resamples(len(numbers), self.seed)
        means = (drawn @ sums) / (drawn @ counts)
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(_mean(values), float(low), float(high))


def format_interval(interval: Interval, *, decimals: int = 3) -> str:
    """Returns e.g. '24.310 [23.902, 24.711]'."""
    if not math.isfinite(interval.mean):
        return ""
    mean, low, high = (f"{x:.{decimals}f}" for x in interval)
    return f"{mean} [{low}, {high}]" if math.isfinite(interval.low) else mean


@functools.lru_cache(maxsize=32)
def _resamples(pictures: int, seed: int) -> np.ndarray:
    """How often each picture is drawn in each resample, ``[R, P]``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(pictures, np.full(pictures, 1 / pictures), _RESAMPLES)


def groups() -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yields names and conditions of the groups of examples that are summed up."""
    holes = [*range(len(MASK_CLASSES) // 2), None]
    for border in (False, True, None):
        for hole_bin in holes:
            place = {
                "hole": "all" if hole_bin is None else bin_name(hole_bin),
                "border": {False: "no", True: "yes", None: "both"}[border],
            }
            where = {"hole_bin": hole_bin, "border": border}
            yield place, {k: v for k, v in where.items() if v is not None}


def _values(examples: Sequence[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a metric's values, and the pictures that they are of."""
    having = [e for e in examples if e.get(metric) is not None]
    values = np.array([e[metric] for e in having], np.float64)
    finite = np.isfinite(values)
    pictures = np.array([e["picture"] for e in having])
    return values[finite], pictures[finite]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _finite(cell: Any) -> Any:
    """Returns None, which JSON knows, for NaN, which it does not."""
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _rounded(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        name: {k: _finite(round(x, _DECIMALS)) for k, x in interval._asdict().items()}
        if math.isfinite(interval.mean)
        else None
        for name, interval in intervals.items()
    }


def _heading(name: str) -> str:
    unit = ALL_METRICS[name].unit if name in ALL_METRICS else ""
    return f"{name} {unit}" if unit else name
