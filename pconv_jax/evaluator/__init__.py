"""Evaluation by hole bin, on pictures that no network has seen.

The protocol is the paper's (section 4.2), and all methods get the same pairs of
pictures and masks: `protocol` makes them, `methods` has what is compared, `evaluation`
runs it, `results` has the metrics' definitions and makes tables, `report` a page.
"""

from pconv_jax.evaluator.evaluation import (
    DEFAULT_METHODS,
    compare,
    draw_pictures,
    evaluate,
    evaluate_run,
    write_results,
)
from pconv_jax.evaluator.methods import Classical, Method, Network
from pconv_jax.evaluator.protocol import MASK_CLASSES, Protocol, draw_masks
from pconv_jax.evaluator.results import METRICS, Evaluation, Interval

__all__ = [
    "DEFAULT_METHODS",
    "MASK_CLASSES",
    "METRICS",
    "Classical",
    "Evaluation",
    "Interval",
    "Method",
    "Network",
    "Protocol",
    "compare",
    "draw_masks",
    "draw_pictures",
    "evaluate",
    "evaluate_run",
    "write_results",
]
