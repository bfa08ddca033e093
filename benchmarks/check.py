"""Compares the times of two reports of `benchmarks.run`."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

_Key = tuple[str, str, str]


def find_slower(
    report: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[list[str], int]:
    """List what became slower by more than its spread.

    A variant did if the fast end of its times is above the slow end of the stored ones.
    The ends are those of the quartiles of all calls and of the medians of all turns, so
    that neither a slow call nor a slow turn counts.

    Args:
      report: The new report.
      stored: The report to compare with, of the same machine.

    Returns:
      A line for each variant that is slower, or that cannot be measured any more; and
      the number of variants that were compared.
    """
    new, old = dict(_variants(report)), dict(_variants(stored))
    lines, compared = [], 0
    for key in new.keys() & old.keys():
        if "error" in old[key]:
            continue
        compared += 1
        name = f"{key[0]}: {key[1]}: {key[2]}"
        if "error" in new[key]:
            lines.append(f"{name}: not measured: {new[key]['error']}")
            continue
        (low, _), (_, high) = _ends(new[key]), _ends(old[key])
        if low > high:
            ratio = new[key]["median_s"] / old[key]["median_s"]
            lines.append(
                f"{name}: {ratio:.2f} times as long, {1e3 * new[key]['median_s']:.4g} "
                f"ms instead of {1e3 * old[key]['median_s']:.4g} ms"
            )
    return sorted(lines), compared


def _variants(report: Mapping[str, Any]) -> Iterator[tuple[_Key, Mapping[str, Any]]]:
    for case in report["cases"]:
        for name, result in case.get("results", {}).items():
            yield (case["suite"], case["case"], name), result


def _ends(result: Mapping[str, Any]) -> tuple[float, float]:
    """Return the fast and the slow end of the usual times, in seconds."""
    turns = [statistics.median(turn["wall_s"]) for turn in result["rounds"]]
    times = [*turns, *result["quartiles_s"]]
    return min(times), max(times)
