"""One HTML page of an evaluation: tables, plots and pictures, all in the one file.

It needs no network and runs no script.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pconv_jax.evaluate.protocol import MASK_CLASSES, bin_name
from pconv_jax.evaluate.results import (
    ALL_METRICS,
    Evaluation,
    Interval,
    format_interval,
)
from pconv_jax.evaluate.store import Record

_LARGEST = 256  # Side of the pictures on the page; larger ones are scaled down.
_PALETTE = (
    "#2a78d6", "#e8623a", "#159a6c", "#d99a00",
    "#c657a0", "#6a51c9", "#5b8c1f", "#8c6d4f",
)  # fmt: skip
_MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
    "M-3.2 -3.2h6.4v6.4h-6.4z",
    "M0 -4.4L4.2 3.2H-4.2z",
    "M0 -4.6L4.6 0L0 4.6L-4.6 0z",
)
_DASHES = ("", "6 3", "2 3")
_WIDTH, _HEIGHT = 440, 270  # Of a plot, in its own units.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 40  # Margins in it.

# A picture of an example: 'best', ...; its record; pictures by column.
Shown = tuple[str, Record, Mapping[str, np.ndarray | None]]


def make_page(
    evaluation: Evaluation,
    *,
    protocol: Mapping[str, Any],
    descriptions: Mapping[str, str],
    timing: Mapping[str, Any],
    shown: Sequence[Shown],
    title: str = "Evaluation of image inpainting",
) -> str:
    """Returns the page.

    Args:
      evaluation: what was found.
      protocol: see `EvalSet.describe`.
      descriptions: of the methods, by name.
      timing: as in ``timing.json``.
      shown: examples to show, those of a hole bin next to each other.
      title: of the page.
    """
    styles = {name: _style(i) for i, name in enumerate(evaluation.methods)}
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='lead'>{html.escape(_lead(protocol))}</p>",
        *(f"<p class='note'>{html.escape(note)}</p>" for note in _notes(evaluation)),
        "<h2>All classes of masks</h2>",
        _overview(evaluation, styles),
        f"<p class='fine'>Means, with 95&nbsp;% intervals below. "
        f"{html.escape(timing['how'])} Devices: {html.escape(timing['devices'])}.</p>",
        "<h2>By hole ratio</h2>",
        _legend(styles),
        "<div class='plots'>",
        *(_plot(evaluation, metric, styles) for metric in evaluation.metrics),
        "</div>",
        "<p class='fine'>Masks with and without holes at the border together; bars are "
        "95&nbsp;% intervals.</p>",
        *_details(evaluation),
        "<h2>Pictures</h2>",
        "<p class='fine'>The best, the median and the worst example of each range of "
        f"hole ratios, by the PSNR of {html.escape((evaluation.methods or [''])[0])}. "
        "Numbers are PSNR in dB and SSIM of the composite shown.</p>",
        *_pictures(evaluation, shown, styles),
        "<h2>What the numbers are</h2>",
        _definitions(evaluation, descriptions),
    ]
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _lead(protocol: Mapping[str, Any]) -> str:
    pictures, size = protocol["pictures"], protocol["pictures"]["image_size"]
    return (
        f"{protocol['examples_per_class']} examples in each of "
        f"{len(protocol['classes'])} classes of masks, of {pictures['count']} "
        f"picture{'s' if pictures['count'] > 1 else ''} at {size} x {size} pixels. "
        "All methods were given the same pictures and masks "
        f"({protocol['masks']['kind']})."
    )


def _notes(evaluation: Evaluation) -> list[str]:
    return [*evaluation.left_out, *evaluation.count_failures()]


def _overview(evaluation: Evaluation, styles: Mapping[str, Mapping[str, str]]) -> str:
    intervals = {m: evaluation.intervals(method=m) for m in evaluation.methods}
    seconds = evaluation.timing()
    head = "".join(f"<th>{_metric_heading(m)}</th>" for m in evaluation.metrics)
    rows = []
    for method in evaluation.methods:
        cells = [f"<th>{_dot(styles[method])}{html.escape(method)}</th>"]
        for metric in evaluation.metrics:
            found = [intervals[m][metric].mean for m in evaluation.methods]
            best = _best(metric, found)
            cells.append(_interval_cell(intervals[method][metric], best))
        time = seconds.get(method, {}).get("median_seconds")
        cells.append(f"<td>{'' if time is None else f'{time:.3g}'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        "<div class='wide'><table class='numbers'><thead><tr><th>method</th>"
        f"{head}<th>seconds<br><small>a picture</small></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _interval_cell(interval: Interval, best: float) -> str:
    if not math.isfinite(interval.mean):
        return "<td>–</td>"
    mean, low, high = (f"{x:.3f}" for x in interval)
    small = f"<br><small>{low} – {high}</small>" if low != "nan" else ""
    mark = " class='best'" if interval.mean == best else ""
    return f"<td{mark}>{mean}{small}</td>"


def _details(evaluation: Evaluation) -> Iterable[str]:
    """Yields a table of each metric, folded."""
    for metric in evaluation.metrics:
        rows = evaluation.by_hole(metric)
        holes = [name for name in rows[0] if name not in ("method", "border")]
        head = "".join(f"<th>{hole}</th>" for hole in holes)
        body = []
        for row in rows:
            others = [r for r in rows if r["border"] == row["border"]]
            cells = [f"<th>{html.escape(row['method'])}</th><td>{row['border']}</td>"]
            for hole in holes:
                value, values = row[hole], [r[hole] for r in others]
                best = _best(metric, [math.nan if v is None else v for v in values])
                mark = " class='best'" if value is not None and value == best else ""
                text = "–" if value is None else f"{value:.3f}"
                cells.append(f"<td{mark}>{text}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>")
        yield (
            f"<details><summary>{_metric_heading(metric)}: numbers</summary>"
            "<div class='wide'><table class='numbers'><thead><tr><th>method</th>"
            f"<th>border</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            "</div></details>"
        )


def _legend(styles: Mapping[str, Mapping[str, str]]) -> str:
    items = (f"<span>{_dot(s)}{html.escape(name)}</span>" for name, s in styles.items())
    return f"<p class='legend'>{''.join(items)}</p>"


def _plot(
    evaluation: Evaluation, metric: str, styles: Mapping[str, Mapping[str, str]]
) -> str:
    """Returns a plot of a metric over the hole bins, a line a method."""
    bins = range(len(MASK_CLASSES) // 2)
    lines = {
        method: [
            evaluation.intervals(method=method, hole_bin=b).get(metric) for b in bins
        ]
        for method in evaluation.methods
    }
    found = [i for line in lines.values() for i in line if i]
    finite = [x for interval in found for x in interval if math.isfinite(x)]
    if not finite:
        return ""
    ticks = _ticks(min(finite), max(finite))
    low, high = min(ticks[0], *finite), max(ticks[-1], *finite)
    step = (_WIDTH - _LEFT - _RIGHT) / len(bins)

    def to_y(value: float) -> float:
        part = (value - low) / ((high - low) or 1)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = to_y(tick)
        parts.append(
            f"<path class='grid' d='M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}'/>"
            f"<text x='{_LEFT - 7}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>"
        )
    for b in bins:
        name = bin_name(b).replace("%-", "–").replace("%", "")
        x = _LEFT + (b + 0.5) * step
        parts.append(
            f"<text x='{x:.1f}' y='{_HEIGHT - 22}' text-anchor='middle'>{name}</text>"
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f"<text x='{middle}' y='{_HEIGHT - 5}' text-anchor='middle'>"
        "hole, % of the picture</text>"
    )
    for number, (method, line) in enumerate(lines.items()):
        shift = (number - (len(lines) - 1) / 2) * min(4, step / 2 / len(lines))
        points = [
            (_LEFT + (b + 0.5) * step + shift, interval)
            for b, interval in enumerate(line)
            if interval and math.isfinite(interval.mean)
        ]
        style = styles[method]
        path = "L".join(f"{x:.1f} {to_y(i.mean):.1f}" for x, i in points)
        bars = "".join(
            f"M{x:.1f} {to_y(i.low):.1f}V{to_y(i.high):.1f}"
            for x, i in points
            if math.isfinite(i.low)
        )
        marks = "".join(
            f"<path d='{style['marker']}' transform='translate({x:.1f} "
            f"{to_y(i.mean):.1f})'><title>{html.escape(method)}: "
            f"{format_interval(i)}</title></path>"
            for x, i in points
        )
        if points:
            parts.append(
                f"<g stroke='{style['color']}' fill='{style['color']}'>"
                f"<path d='{bars}' class='bar'/><path d='M{path}' class='line' "
                f"stroke-dasharray='{style['dash']}'/>{marks}</g>"
            )
    return (
        f"<figure class='plot'><figcaption>{_metric_heading(metric)}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='{html.escape(metric)} over hole ratio'>{''.join(parts)}</svg>"
        "</figure>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Returns three to seven round numbers from about `low` to about `high`."""
    span = (high - low) or abs(high) or 1
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * n for n in (1, 2, 5, 10) if span / (unit * n) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _pictures(
    evaluation: Evaluation,
    shown: Sequence[Shown],
    styles: Mapping[str, Mapping[str, str]],
) -> Iterable[str]:
    scores = {
        (e["method"], e["hole_bin"], e["border"], e["index"]): e
        for e in evaluation.examples
    }
    last = None
    for rank, example, pictures in shown:
        place = example["hole_bin"], example["border"], example["index"]
        if example["hole_bin"] != last:
            last = example["hole_bin"]
            yield f"<h3>Holes of {bin_name(last)} of the picture</h3>"
        figures = []
        for column, picture in pictures.items():
            caption, dot = html.escape(column), ""
            if column in styles:
                dot = _dot(styles[column])
                score = scores.get((column, *place))
                if score:
                    psnr = "∞" if score["psnr"] is None else f"{score['psnr']:.2f}"
                    caption += f"<br><small>{psnr} / {score['ssim']:.3f}</small>"
            image = (
                "<div class='failed'>failed</div>"
                if picture is None
                else f"<img src='{_data_url(picture)}' alt='{html.escape(column)}'>"
            )
            figures.append(
                f"<figure>{image}<figcaption>{dot}{caption}</figcaption></figure>"
            )
        border = "with" if example["border"] else "without"
        yield (
            f"<h4>{rank}<span>example {example['index']}, {border} hole at the border, "
            f"{example['hole_ratio']:.1%} hole</span></h4>"
            f"<div class='wide'><div class='strip' style='--n:{len(figures)}'>"
            f"{''.join(figures)}</div></div>"
        )


def _definitions(evaluation: Evaluation, descriptions: Mapping[str, str]) -> str:
    names = evaluation.metrics
    metrics = ((_metric_heading(m), ALL_METRICS[m].definition) for m in names)
    items = [*metrics, *((html.escape(n), d) for n, d in descriptions.items())]
    return "<dl>{}</dl>".format(
        "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in items)
    )


def _metric_heading(name: str) -> str:
    metric = ALL_METRICS[name]
    unit = f"&nbsp;{metric.unit}" if metric.unit else ""
    arrow = "↑" if metric.better == "higher" else "↓"
    title = f"{metric.better} is better"
    return f"{html.escape(name)}{unit}&nbsp;<span title='{title}'>{arrow}</span>"


def _best(metric: str, values: Sequence[float]) -> float | None:
    """Returns the best of several finite values, None where there is no contest."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return None
    return min(values) if ALL_METRICS[metric].better == "lower" else max(values)


def _style(number: int) -> dict[str, str]:
    turn, color = divmod(number, len(_PALETTE))
    return {
        "color": _PALETTE[color],
        "marker": _MARKERS[number % len(_MARKERS)],
        "dash": _DASHES[turn % len(_DASHES)],
    }


def _dot(style: Mapping[str, str]) -> str:
    return (
        "<svg class='dot' viewBox='-6 -6 12 12' aria-hidden='true'>"
        f"<path d='{style['marker']}' fill='{style['color']}'/></svg>"
    )


def shrink(picture: np.ndarray) -> np.ndarray:
    """Returns a picture, uint8 ``[H, W, 3]``, at no more than 256 pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST))
    return np.asarray(image)


def _data_url(picture: np.ndarray) -> str:
    image = Image.fromarray(shrink(picture))
    file = io.BytesIO()
    # Small ones cost nothing.
    kind = "png" if max(image.size) <= 128 else "jpeg"
    image.save(file, format=kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62676e; --rule: #dfe2e6;
  --paper: #fff; --tint: #f5f6f8; --good: #e3f1e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa1a9;
  --rule: #34383d; --paper: #17191c; --tint: #1f2226; --good: #1f3a2b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans",
  sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 16px; margin: 32px 0 4px; padding-top: 12px;
  border-top: 1px solid var(--rule); }
h4 { font-size: 14px; margin: 14px 0 6px; }
h4 span { color: var(--soft); font-weight: normal; margin-left: 10px; }
small, .fine { color: var(--soft); font-size: 13px; }
.lead { font-size: 16px; max-width: 75ch; margin: 0 0 12px; }
.fine { max-width: 95ch; }
.note { background: var(--tint); border-left: 3px solid #d99a00; margin: 8px 0;
  padding: 8px 12px; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); font-weight: 600; }
td small { font-size: 12px; }
.best { background: var(--good); font-weight: 600; }
.best small { font-weight: normal; }
.dot { width: 13px; height: 13px; margin-right: 6px; vertical-align: -1.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px; }
.plots { display: grid; gap: 20px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
figure { margin: 0; min-width: 0; }
.plot figcaption { font-weight: 600; font-size: 14px; }
.plot svg { width: 100%; height: auto; display: block; }
.plot text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.bar { fill: none; stroke-width: 1.2; opacity: 0.55; }
.plot g path[transform] { stroke: var(--paper); stroke-width: 1; }
details { margin: 6px 0; }
summary { cursor: pointer; color: var(--soft); }
details[open] summary { margin-bottom: 6px; }
.strip { display: grid; gap: 8px; max-width: calc(var(--n) * 264px);
  grid-template-columns: repeat(var(--n), minmax(112px, 1fr)); }
.strip img, .failed { width: 100%; aspect-ratio: 1; display: block; border-radius: 3px;
  background: var(--tint); }
.failed { display: grid; place-items: center; color: var(--soft); }
.strip figcaption { font-size: 13px; line-height: 1.35; padding-top: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 8px 20px; }
dt { font-weight: 600; } dd { margin: 0; max-width: 90ch; overflow-wrap: anywhere; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; gap: 2px; }
  dd { margin-bottom: 10px; } main { padding: 12px 12px 40px; }
  h1 { font-size: 22px; } }
@media print { details { display: none; } }
"""
