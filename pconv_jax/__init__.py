"""Image inpainting with partial convolutions in JAX and Flax."""

import importlib
from typing import Any

__version__ = "0.1.0"

# What takes long to import is not, until it is used.
_LAZY = {"Inpainter": "pconv_jax.inpaint.inpainter"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
