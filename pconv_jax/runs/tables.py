"""Tables as plain text and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def format_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    decimals: int = 4,
    markdown: bool = False,
) -> str:
    """Format rows as an aligned table, numbers to the right and words to the left.

    Args:
      rows: Cells by column, whose order is that of their first appearance. A missing
        cell or None stays empty.
      decimals: Decimals of a float.
      markdown: Whether to format a Markdown table instead of plain text.

    Returns:
      Lines, without a newline at the end.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return f"{value:.{decimals}f}"
        return "" if value is None else str(value)

    formatted = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        texts = [name, *map(cell, values)]
        width = max(3, *map(len, texts))
        numeric = all(isinstance(v, int | float | np.number | None) for v in values)
        align = str.rjust if numeric else str.ljust
        texts = [align(text, width) for text in texts]
        if markdown:
            rule = "-" * (width - 1) + ":" if numeric else "-" * width
        else:
            rule = "-" * width
        formatted.append([texts[0], rule, *texts[1:]])
    lines = zip(*formatted, strict=True)
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)
