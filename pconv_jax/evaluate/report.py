"""The HTML report of an evaluation: tables, plots and images in one file.

The page works offline and runs no script. ``report.html.jinja`` is its template.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from pconv_jax.evaluate import plots
from pconv_jax.evaluate.bootstrap import Interval
from pconv_jax.evaluate.eval_set import BINS
from pconv_jax.evaluate.examples import ChosenExample, Columns, shrink
from pconv_jax.evaluate.metric_definitions import ALL_METRICS
from pconv_jax.evaluate.plots import LineStyle
from pconv_jax.evaluate.results import SHAPE_TITLES, Evaluation
from pconv_jax.evaluate.store import Key, Record, key_of

_TEMPLATE = "report.html.jinja"
_LARGEST_PNG = 128  # Pixels; larger images are JPEGs, because their PNGs are too big.

Shown = tuple[ChosenExample, Columns]
"""An example with its images."""


def make_page(
    evaluation: Evaluation,
    *,
    eval_set: Mapping[str, Any],
    descriptions: Mapping[str, str],
    timing: Mapping[str, Any],
    shown: Sequence[Shown],
) -> str:
    """Make the HTML page.

    Args:
      evaluation: The results.
      eval_set: `EvalSet.describe`.
      descriptions: A sentence about each method, by name.
      timing: The content of ``timing.json``.
      shown: Examples to show, sorted by hole.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    styles = {name: plots.line_style(i) for i, name in enumerate(evaluation.methods)}
    return environment.get_template(_TEMPLATE).render(
        lead=_lead(eval_set),
        notes=[*evaluation.left_out, *evaluation.failure_notes()],
        metrics=[{"name": m, **ALL_METRICS[m]._asdict()} for m in evaluation.metrics],
        colors={name: style.color for name, style in styles.items()},
        keys={name: _svg_url(plots.draw_key(style)) for name, style in styles.items()},
        overviews=_overviews(evaluation),
        timing=timing,
        plots={m: _plot(evaluation, m, styles) for m in evaluation.metrics},
        holes=BINS,
        tables={m: list(_table(evaluation, m)) for m in evaluation.metrics},
        reference=(evaluation.methods or [""])[0],
        example_holes=_example_holes(evaluation, shown),
        descriptions=descriptions,
    )


def _lead(eval_set: Mapping[str, Any]) -> str:
    images = eval_set["pictures"]
    count, size = images["count"], images["image_size"]
    return (
        f"{eval_set['examples_per_class']} examples in each of "
        f"{len(eval_set['classes'])} classes of masks, from {count} "
        f"image{'s' if count > 1 else ''} at {size} × {size} pixels. All methods fill "
        f"the same images with the same masks ({eval_set['masks']['kind']})."
    )


def _overviews(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Make the tables of all hole bins, of thin and of wide holes, by title."""
    tables = {"All hole ratios": list(_overview(evaluation))}
    for shape in evaluation.shapes:
        tables[SHAPE_TITLES[shape]] = list(_overview(evaluation, hole=shape))
    return tables


def _overview(evaluation: Evaluation, **where: Any) -> Iterator[dict[str, Any]]:
    """Make a row of cells for each method: means with intervals, and the time."""
    intervals = {m: evaluation.intervals(method=m, **where) for m in evaluation.methods}
    best = {
        metric: _best(metric, (row[metric].mean for row in intervals.values()))
        for metric in evaluation.metrics
    }
    seconds = evaluation.timing()
    for method, row in intervals.items():
        time = seconds.get(method, {}).get("median_seconds")
        yield {
            "method": method,
            "cells": [_interval_cell(row[m], best[m]) for m in evaluation.metrics],
            "seconds": "" if time is None else f"{time:.3g}",
        }


def _table(evaluation: Evaluation, metric: str) -> Iterator[dict[str, Any]]:
    """Make a row of cells for each method and border: means by hole bin."""
    rows = evaluation.by_hole(metric)
    for row in rows:
        rivals = [r for r in rows if r["border"] == row["border"]]
        cells = [
            _cell(row[hole], _best(metric, (r[hole] for r in rivals))) for hole in BINS
        ]
        yield {"method": row["method"], "border": row["border"], "cells": cells}


def _plot(
    evaluation: Evaluation, metric: str, styles: Mapping[str, LineStyle]
) -> str | None:
    """Plot a metric over the holes; return the image's URL, None if it is empty."""
    holes = [*BINS, *evaluation.shapes]
    lines = {
        method: [evaluation.intervals(method=method, hole=h).get(metric) for h in holes]
        for method in evaluation.methods
    }
    svg = plots.plot_intervals(
        lines,
        styles,
        ticks=[hole.replace("%-", "–").rstrip("%") for hole in holes],
        joined=len(BINS),
        xlabel="hole, % of the image",
    )
    return None if svg is None else _svg_url(svg)


def _example_holes(
    evaluation: Evaluation, shown: Sequence[Shown]
) -> dict[str, list[dict[str, Any]]]:
    """Describe the shown examples, by the title of their hole."""
    scores = {(e["method"], key_of(e)): e for e in evaluation.examples}
    holes: dict[str, list[dict[str, Any]]] = {}
    for (rank, record), columns in shown:
        key = key_of(record)
        entry = {
            "rank": rank,
            "number": record["index"],
            "border": {
                True: "with hole at the border",
                False: "without hole at the border",
                None: "",
            }[record["border"]],
            "hole": f"{record['hole_ratio']:.1%}",
            "figures": [
                {
                    "caption": caption,
                    "url": None if image is None else _image_url(image),
                    "score": _score(scores, caption, key),
                }
                for caption, image in columns.items()
            ],
        }
        hole = record["hole"]
        title = SHAPE_TITLES.get(hole, f"Holes of {hole} of the image")
        holes.setdefault(title, []).append(entry)
    return holes


def _score(
    scores: Mapping[tuple[str, Key], Record], method: str, key: Key
) -> str | None:
    """Format PSNR and SSIM of a method's example; None for other columns."""
    record = scores.get((method, key))
    if record is None:
        return None
    psnr = "∞" if record["psnr"] is None else f"{record['psnr']:.2f}"
    return f"{psnr} / {record['ssim']:.3f}"


def _interval_cell(interval: Interval, best: float | None) -> dict[str, Any]:
    cell = _cell(interval.mean, best)
    if math.isfinite(interval.low):
        cell["interval"] = f"{interval.low:.3f} – {interval.high:.3f}"
    return cell


def _cell(value: float | None, best: float | None) -> dict[str, Any]:
    if value is None or not math.isfinite(value):
        return {"text": "–", "is_best": False, "interval": None}
    return {"text": f"{value:.3f}", "is_best": value == best, "interval": None}


def _best(metric: str, values: Iterable[float | None]) -> float | None:
    """Find the best of several values; None if fewer than two are finite."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return None
    return min(finite) if ALL_METRICS[metric].better == "lower" else max(finite)


def _image_url(image: np.ndarray) -> str:
    shrunk = Image.fromarray(shrink(image))
    file = io.BytesIO()
    kind = "png" if max(shrunk.size) <= _LARGEST_PNG else "jpeg"
    shrunk.save(file, format=kind, quality=90)
    return _data_url(f"image/{kind}", file.getvalue())


def _svg_url(svg: bytes) -> str:
    return _data_url("image/svg+xml", svg)


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
