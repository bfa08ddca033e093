"""What guards the page: which requests it answers, and what is left of uploads.

Starlette is imported where it is used, since the command also asks which hosts are this
machine, whether the packages of the page are installed or not.
"""

import ipaddress
import urllib.parse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_REFUSAL = """\
This page answers only to localhost, and to no other site. Use --host to open it, or
--allowed-host for the name that a proxy gives it.
"""


class RemoveAbortedUploads:
    """Remove what is left of uploads that were broken off.

    Gradio writes an upload to a temporary file in its folder, and moves it to a folder
    of its own when it is complete.

    Args:
      app: The application.
      folder: Gradio's folder of uploads.
    """

    def __init__(self, app: "ASGIApp", *, folder: Path):
        self._app = app
        self._folder = folder
        self._running = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass a request on; where no upload is running, remove what is left."""
        if not scope.get("path", "").endswith("/upload"):
            await self._app(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                for path in self._folder.glob("tmp*"):
                    if path.is_file():
                        path.unlink(missing_ok=True)


def refuse_other_sites(
    app: "ASGIApp", *, allowed: Collection[str] = frozenset()
) -> "ASGIApp":
    """Wrap an application to refuse requests of other sites' pages.

    Such pages may use a host name of their own that leads to this machine (DNS
    rebinding), or post to this machine's address.

    Args:
      app: The application.
      allowed: Names, besides those of this machine, that the page may have. By default
        none.
    """
    names = frozenset(map(_name_of, allowed))

    async def guarded(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan" or _is_from_this_site(scope, names):
            await app(scope, receive, send)
        else:
            from starlette.responses import PlainTextResponse

            refusal = PlainTextResponse(_REFUSAL, status_code=403)
            await refusal(scope, receive, send)

    return guarded


def _is_from_this_site(scope: "Scope", allowed: Collection[str]) -> bool:
    from starlette.datastructures import Headers

    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_loopback(host) and _name_of(host) not in allowed:
        return False
    if origin is None or scope.get("method") == "GET":
        return True
    site = origin.partition("://")[2]
    return site == host or _name_of(site) in allowed


def _name_of(host: str) -> str:
    """Get the name of a host, without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine."""
    name = _name_of(host)
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def in_url(host: str) -> str:
    """Write an address as it is in a URL: that of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
