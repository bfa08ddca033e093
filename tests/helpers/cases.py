"""Cases of parametrized tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, every: int) -> list[Any]:
    """Mark all cases but each so many-th as slow.

    For numbers that do not depend on the Python: all cases run on one, and some on the
    others. A tuple is a case of several arguments.
    """
    return [
        case
        if index % every == 0
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow
        )
        for index, case in enumerate(cases)
    ]
