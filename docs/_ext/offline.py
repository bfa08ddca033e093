"""Fails the build if a page loads anything from the network."""

import pathlib
import re

from sphinx.application import Sphinx
from sphinx.util import logging

_LOADED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"'](?:https?:)?//[^\"']*"
    r"|<link\b[^>]*\brel=[\"'](?:stylesheet|preconnect)[\"'][^>]*href=[\"']https?://[^\"']*"
)


def _check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    for page in sorted(pathlib.Path(app.outdir).rglob("*.html")):
        for match in _LOADED.finditer(page.read_text()):
            logging.getLogger(__name__).warning(
                "%s loads from the network: %s", page.name, match[0]
            )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True}
