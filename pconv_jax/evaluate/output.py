"""The files of an evaluation: JSON, Markdown, CSV, HTML and PNG."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pconv_jax import __version__, _files
from pconv_jax.evaluate import report, results
from pconv_jax.evaluate.eval_set import EvalSet
from pconv_jax.evaluate.examples import choose_examples, fill_examples, lay_out
from pconv_jax.evaluate.methods import Method
from pconv_jax.evaluate.metric_definitions import ALL_METRICS
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.runs import parallel
from pconv_jax.runs.pictures import write_png

_TIMING = (
    "Wall time from images to images in host memory. Networks: without compilation, "
    "one image at a time on each device; the time of a few images divided by their "
    "number. repair and sharp: without compilation, one image at a time. Baselines: "
    "one image at a time, on one CPU core."
)


def write_results(
    directory: Path,
    evaluation: Evaluation,
    eval_set: EvalSet,
    methods: Sequence[Method],
    *,
    about: Mapping[str, Any],
) -> None:
    """Write the results of an evaluation.

    See `runner.evaluate_run` for the files.

    Args:
      directory: Output directory.
      evaluation: The results.
      eval_set: The evaluated pairs of images and masks.
      methods: The evaluated methods.
      about: Extra fields for ``results.json``.

    Raises:
      RunError: If a file cannot be written.
    """
    timing = _describe_timing(evaluation)
    _files.write_json(
        directory / "results.json",
        _describe_results(evaluation, eval_set, methods, about),
    )
    _files.write_json(directory / "timing.json", timing)
    _files.write_bytes(directory / "examples.csv", evaluation.csv().encode())
    markdown = evaluation.format(markdown=True) + "\n"
    _files.write_bytes(directory / "results.md", markdown.encode())
    chosen = choose_examples(evaluation)
    records = [example.record for example in chosen]
    images = fill_examples(methods, eval_set, records, failures=evaluation.failures)
    page = report.make_page(
        evaluation,
        eval_set=eval_set.describe(),
        descriptions={method.name: method.description for method in methods},
        timing=timing,
        shown=list(zip(chosen, images)),
    )
    _files.write_bytes(directory / "report.html", page.encode())
    for rank, name in {"median": "pictures.png", "worst": "worst.png"}.items():
        rows = [columns for e, columns in zip(chosen, images) if e.rank == rank]
        if rows:
            write_png(directory / name, lay_out(rows))


def _describe_results(
    evaluation: Evaluation,
    eval_set: EvalSet,
    methods: Sequence[Method],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "pconv_jax": __version__,
        **about,
        "protocol": eval_set.describe(),
        "methods": {method.name: method.description for method in methods},
        "metrics": {m: ALL_METRICS[m]._asdict() for m in evaluation.metrics},
        "intervals": results.INTERVALS,
        "left_out": evaluation.left_out,
        "table": evaluation.table(),
        "summary": evaluation.summary(),
        "examples": evaluation.examples,
        "failures": evaluation.failures,
    }


def _describe_timing(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "methods": evaluation.timing(),
        "how": _TIMING,
        "devices": f"{parallel.device_count()} x {jax.devices()[0].device_kind}",
        "host": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
