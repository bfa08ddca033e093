"""``pconv demo``: repairs images in the browser."""

import argparse
import atexit
import getpass
import os
import shutil
import signal
import tempfile

from pconv_jax import _processes
from pconv_jax._errors import UserError
from pconv_jax.cli._cache import add_cache, use_cache
from pconv_jax.cli._options import Subparsers, add_weights
from pconv_jax.inpaint import guard

_DESCRIPTION = """\
Serves a web page where you open an image, paint over the area to fill, and download the
repaired image. It needs no internet connection, and uses no proxy.
"""

_EXAMPLES = """\
behind a reverse proxy on this machine, at https://example.org/repair:
  pconv demo --root-path /repair --allowed-host example.org
for other machines:
  pconv demo --host 0.0.0.0 --auth NAME
"""


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "demo",
        help="repair images in the browser",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_weights(command)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in, which requires "
        "--auth or --no-auth (default: %(default)s)",
    )
    command.add_argument(
        "--port",
        type=int,
        default=7860,
        help="port to listen on (default: %(default)s)",
    )
    command.add_argument(
        "--root-path",
        metavar="PATH",
        help="path at which a reverse proxy serves the page (default: /)",
    )
    command.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="name by which a reverse proxy on this machine serves the page; may be "
        "given several times (default: none)",
    )
    access = command.add_mutually_exclusive_group()
    access.add_argument(
        "--auth",
        metavar="NAME[:PASSWORD]",
        help="require this name and password; the password is asked for on the "
        "terminal if it is not given",
    )
    access.add_argument(
        "--no-auth", action="store_true", help="let in everyone who can reach the page"
    )
    add_cache(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    auth = _read_auth(arguments)
    _use_temporary_folder()
    from pconv_jax.inpaint.inpainter import Inpainter

    _processes.keep_memory_small()
    use_cache(arguments)
    inpainter = Inpainter.from_pretrained(arguments.weights)
    _forget_proxies()
    # Gradio reads these variables when it is imported.
    from pconv_jax.inpaint import page

    page.launch(
        inpainter,
        host=arguments.host,
        port=arguments.port,
        root_path=arguments.root_path,
        allowed_hosts=arguments.allowed_host,
        auth=auth,
    )


def _check(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.port < 2**16:
        raise UserError(f"--port must be in [1, 65535], got {arguments.port}.")
    path = arguments.root_path
    if path is not None and not path.startswith("/"):
        raise UserError(f"--root-path must begin with /, got {path!r}.")


def _read_auth(arguments: argparse.Namespace) -> tuple[str, str] | None:
    """Get the name and the password, asking for the latter if need be."""
    if arguments.auth is None:
        host = guard.in_url(arguments.host)
        if not arguments.no_auth and not guard.is_loopback(host):
            raise UserError(
                f"--host {arguments.host} lets other machines in: give --auth NAME, "
                "to ask them for a password, or --no-auth."
            )
        return None
    name, given, password = arguments.auth.partition(":")
    if not given:
        try:
            password = getpass.getpass(f"Password for {name}: ")
        except EOFError as error:
            raise UserError(
                "--auth: there is no terminal to ask for the password; give "
                "NAME:PASSWORD."
            ) from error
    if not name or not password:
        raise UserError("--auth: neither the name nor the password may be empty.")
    return name, password


def _forget_proxies() -> None:
    """Let Gradio reach its own page: it would ask a proxy for it, or fail to import."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            os.environ.pop(variable, None)


def _use_temporary_folder() -> None:
    """Let Gradio keep its files in a folder that is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="pconv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder

    def end(number: int, _: object) -> None:
        # An exception would be lost in the callbacks that run during an import.
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)
