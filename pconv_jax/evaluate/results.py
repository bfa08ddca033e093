"""Results of an evaluation: means, intervals and tables."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pconv_jax._errors import UserError
from pconv_jax.evaluate.bootstrap import Interval, cluster_bootstrap
from pconv_jax.evaluate.eval_set import BIN_CLASSES, BINS, SHAPES
from pconv_jax.evaluate.metric_definitions import ALL_METRICS
from pconv_jax.evaluate.store import Record, key_of
from pconv_jax.runs.tables import format_table

_RESAMPLES = 1000
_DECIMALS = 6  # Of the numbers in results.json.

SHAPE_TITLES = {
    "thin": "Thin holes: scratches, text and dots",
    "wide": "Wide holes: one square, disc, corner or stripe",
}
"""Titles of the tables of `SHAPES`."""

INTERVALS = (
    f"95 % percentile bootstrap, {_RESAMPLES} resamples of images: all examples of an "
    "image are drawn together"
)
"""How the intervals are computed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation.

    Attributes:
      examples: One record for each example and method: ``method``, ``hole`` and
        ``border`` (see `MaskClass`), ``index``, ``picture`` (the image's index),
        ``hole_ratio`` and `METRICS`. Only networks have the metrics of the raw output.
      failures: Records of failed examples, with ``error`` instead of metrics.
      seconds: Wall time of every image, by method.
      left_out: Sentences about everything that could not be evaluated.
      seed: Seed of the resampling for intervals.
      sets: `SET_METRICS`, by method, hole and border; None stands for all hole bins or
        for both kinds of border. Empty if there are none.
    """

    examples: list[Record]
    failures: list[Record] = dataclasses.field(default_factory=list)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    left_out: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0
    sets: dict[tuple[str, str | None, bool | None], dict[str, float]] = (
        dataclasses.field(default_factory=dict)
    )

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the comparison."""
        both = [*self.examples, *self.failures]
        found = dict.fromkeys(record["method"] for record in both)
        return [name for name in self.seconds if name in found] or list(found)

    @property
    def metrics(self) -> list[str]:
        """Names of the computed metrics."""
        found = {name for e in self.examples for name in e}
        found |= {name for scores in self.sets.values() for name in scores}
        return [name for name in ALL_METRICS if name in found]

    @property
    def shapes(self) -> list[str]:
        """Which of `SHAPES` were evaluated."""
        found = {record["hole"] for record in [*self.examples, *self.failures]}
        return [shape for shape in SHAPES if shape in found]

    def select(self, **where: Any) -> list[Record]:
        """Select examples, e.g. ``select(method='telea', hole='10%-20%')``.

        Args:
          **where: Fields of the examples. Without ``hole``, those of all hole bins are
            selected, as in the paper; thin and wide holes are not.
        """
        return _select(self.examples, where)

    def mean(self, **where: Any) -> dict[str, float]:
        """Compute mean metrics, e.g. ``mean(hole='10%-20%', border=True)``.

        The PSNR of a perfect composite is infinite, so the mean leaves it out. The mean
        of no value is NaN.

        Args:
          **where: Fields of the examples, as for `select`. The default is the first
            method in all hole bins.

        Raises:
          UserError: If examples have no such field, or there is no such method.
        """
        return {name: i.mean for name, i in self.intervals(**where).items()}

    def intervals(self, **where: Any) -> dict[str, Interval]:
        """Compute mean metrics with 95 % intervals; see `INTERVALS`.

        Args:
          **where: Fields of the examples, as for `mean`.

        Raises:
          UserError: As `mean`.
        """
        self._check_fields(where)
        if self.methods:
            where = {"method": self.methods[0], **where}
        chosen = self.select(**where)
        intervals = {m: self._interval(*_values(chosen, m)) for m in self.metrics}
        if set(where) <= {"method", "hole", "border"} and self.sets:
            key = where["method"], where.get("hole"), where.get("border")
            scores = self.sets.get(key)
            for name, score in (scores or {}).items():
                intervals[name] = Interval(score, math.nan, math.nan)
        return intervals

    def _check_fields(self, where: Mapping[str, Any]) -> None:
        known = {name for record in self.examples for name in record}
        if known and (unknown := where.keys() - known):
            raise UserError(
                f"examples have no {sorted(unknown)[0]}; they have "
                f"{', '.join(sorted(known))}."
            )
        method = where.get("method")
        if method is not None and method not in self.methods:
            raise UserError(
                f"method must be one of {', '.join(self.methods)}, got {method!r}."
            )

    def differences(
        self, method: str, reference: str, **where: Any
    ) -> dict[str, Interval]:
        """Compute metrics of a method minus those of another, with 95 % intervals.

        The differences are paired: they are taken example by example, where both
        methods have a value.

        Args:
          method: Name of the method.
          reference: Name of the method that is subtracted.
          **where: Fields of the examples, as for `select`. All hole bins by default.
        """
        others = {key_of(e): e for e in self.select(method=reference, **where)}
        pairs = [
            (e, others[key_of(e)])
            for e in self.select(method=method, **where)
            if key_of(e) in others
        ]
        result = {}
        for name in self.metrics:
            both = [
                (a[name] - b[name], a["picture"])
                for a, b in pairs
                if a.get(name) is not None and b.get(name) is not None
            ]
            values, images = np.array(both).reshape(-1, 2).T
            result[name] = self._interval(values, images)
        return result

    def table(self) -> list[dict[str, Any]]:
        """Tabulate means: for each method, a row per hole bin and border.

        A row for all of them follows, and one each for thin and wide holes.
        """
        rows = []
        for method in self.methods:
            first = {"method": method} if len(self.methods) > 1 else {}
            for hole, border in BIN_CLASSES:
                where = {"method": method, "hole": hole, "border": border}
                if self.select(**where):
                    row = {"hole": hole, "border": "yes" if border else "no"}
                    rows.append(first | row | self.mean(**where))
            rows.append(first | {"hole": "all", "border": ""})
            rows[-1] |= self.mean(method=method)
            for shape in self.shapes:
                rows.append(first | {"hole": shape, "border": ""})
                rows[-1] |= self.mean(method=method, hole=shape)
        return [{heading(n): _finite(cell) for n, cell in row.items()} for row in rows]

    def summary(self) -> list[dict[str, Any]]:
        """Summarize means with intervals of all methods, as JSON-able rows.

        There is a row for each method, hole bin and kind of border, for all of them,
        and for thin and wide holes. If there are several methods, the rows of the
        others also have the paired differences from the first one.
        """
        rows = []
        for method in self.methods:
            for place, where in groups():
                where = {"method": method} | where
                failed = _select(self.failures, where)
                chosen = self.select(**where)
                if not chosen and not failed:
                    continue
                row: dict[str, Any] = {"method": method} | place
                row |= {"examples": len(chosen), "failed": len(failed)}
                row |= _rounded(self.intervals(**where))
                if method != self.methods[0]:
                    del where["method"]
                    differences = self.differences(method, self.methods[0], **where)
                    row["difference"] = _rounded(differences)
                rows.append(row)
        return rows

    def timing(self) -> dict[str, dict[str, float]]:
        """Summarize the seconds per image of each method: median, mean and count."""
        return {
            name: {
                "median_seconds": float(np.median(values)),
                "mean_seconds": float(np.mean(values)),
                "examples": len(values),
            }
            for name, values in self.seconds.items()
            if values
        }

    def csv(self) -> str:
        """Format all examples and failures as comma-separated values."""
        columns = ["method", "hole", "border", "index", "picture", "hole_ratio"]
        columns += [*self.metrics, "error"]
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self.examples, *self.failures])
        return file.getvalue()

    def __str__(self) -> str:
        return self.format()

    def format(self, *, markdown: bool = False) -> str:
        """Format the tables as plain text (the default) or as Markdown."""
        if len(self.methods) == 1 and not markdown:
            parts = [format_table(self.table(), decimals=3)]
        else:
            comp = [m for m in self.metrics if not m.startswith("output_")]
            parts = self._format_bins(comp, markdown) if self.select() else []
            for shape in self.shapes:
                table = format_table(self.overview(comp, hole=shape), markdown=markdown)
                parts.append(_section(SHAPE_TITLES[shape], table, markdown))
        notes = [*self.left_out, *self.failure_notes()]
        if notes:
            bullet = "* " if markdown else ""
            parts.append("\n".join(f"{bullet}{note}" for note in notes))
        return "\n\n".join(parts)

    def overview(self, metrics: Sequence[str], **where: Any) -> list[dict[str, Any]]:
        """Tabulate means of examples as text, with a row for each method.

        Args:
          metrics: Names of the metrics. Methods that have none of them get no row.
          **where: Fields of the examples, as for `select`. All hole bins by default.
        """
        timing, rows = self.timing(), []
        for method in self.methods:
            intervals = self.intervals(method=method, **where)
            if all(math.isnan(intervals[name].mean) for name in metrics):
                continue
            row: dict[str, Any] = {"method": method}
            for name in metrics:
                row[heading(name)] = format_interval(intervals[name])
            if method in timing and not where:
                row["s/image"] = f"{timing[method]['median_seconds']:.3g}"
            if self.failures:
                failed = _select(self.failures, {"method": method} | where)
                row["failed"] = len(failed)
            rows.append(row)
        return rows

    def by_hole(self, metric: str) -> list[dict[str, Any]]:
        """Tabulate means of a metric: a row per method and border, a column per bin."""
        rows = []
        for border in (False, True):
            for method in self.methods:
                row: dict[str, Any] = {"method": method}
                row["border"] = "yes" if border else "no"
                for hole in BINS:
                    mean = self.mean(method=method, hole=hole, border=border)
                    row[hole] = _finite(mean.get(metric, math.nan))
                rows.append(row)
        return rows

    def failure_notes(self) -> list[str]:
        """Write a sentence about each method that failed, with its reasons."""
        notes = []
        for method in self.methods:
            errors = [f["error"] for f in self.failures if f["method"] == method]
            if errors:
                count = len(errors) + sum(e["method"] == method for e in self.examples)
                reasons = "; ".join(dict.fromkeys(errors))
                reasons = reasons if len(reasons) < 300 else reasons[:300] + "..."
                notes.append(
                    f"{method} failed on {len(errors)} of {count} examples, which its "
                    f"means leave out: {reasons}"
                )
        return notes

    def _format_bins(self, metrics: Sequence[str], markdown: bool) -> list[str]:
        """Format the tables of the hole bins."""
        parts = [format_table(self.overview(metrics), markdown=markdown)]
        raw = [m for m in self.metrics if m not in metrics]
        if raw:
            table = format_table(self.overview(raw), markdown=markdown)
            parts.append(f"Raw output of the networks:\n\n{table}")
        for name in metrics:
            title = f"{heading(name)} ({ALL_METRICS[name].better} is better)"
            table = format_table(self.by_hole(name), decimals=3, markdown=markdown)
            parts.append(_section(title, table, markdown))
        return parts

    def _interval(self, values: np.ndarray, images: np.ndarray) -> Interval:
        return cluster_bootstrap(values, images, seed=self.seed, resamples=_RESAMPLES)


def format_interval(interval: Interval) -> str:
    """Format an interval, e.g. as ``'24.310 [23.902, 24.711]'``; NaN as ``''``."""
    if not math.isfinite(interval.mean):
        return ""
    mean, low, high = (f"{x:.3f}" for x in interval)
    return f"{mean} [{low}, {high}]" if math.isfinite(interval.low) else mean


def groups() -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Iterate over the groups of examples that `Evaluation.summary` has rows for.

    Yields:
      The group's names for people, and its fields for `Evaluation.select`.
    """
    for border in (False, True, None):
        for hole in (*BINS, None):
            place = {
                "hole": hole or "all",
                "border": {False: "no", True: "yes", None: "both"}[border],
            }
            where = {"hole": hole, "border": border}
            yield place, {k: v for k, v in where.items() if v is not None}
    for shape in SHAPES:
        yield {"hole": shape, "border": "both"}, {"hole": shape}


def heading(name: str) -> str:
    """Format the heading of a column: a metric's name and unit, or just the name."""
    unit = ALL_METRICS[name].unit if name in ALL_METRICS else ""
    return f"{name} {unit}" if unit else name


def _select(records: Sequence[Record], where: Mapping[str, Any]) -> list[Record]:
    """Select records by fields; without ``hole``, those of the hole bins."""
    holes = (where["hole"],) if "hole" in where else BINS
    return [r for r in records if r["hole"] in holes and where.items() <= r.items()]


def _section(title: str, table: str, markdown: bool) -> str:
    return f"## {title}\n\n{table}" if markdown else f"{title}\n{table}"


def _values(examples: Sequence[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Collect the finite values of a metric, and the image of each."""
    having = [e for e in examples if e.get(metric) is not None]
    values = np.array([e[metric] for e in having], np.float64)
    finite = np.isfinite(values)
    images = np.array([e["picture"] for e in having])
    return values[finite], images[finite]


def _finite(cell: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _rounded(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {
        name: {k: _finite(round(x, _DECIMALS)) for k, x in interval._asdict().items()}
        if math.isfinite(interval.mean)
        else None
        for name, interval in intervals.items()
    }
