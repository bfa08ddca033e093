"""``pconv demo``: a page in the browser that repairs pictures."""

import argparse
import atexit
import os
import shutil
import signal
import tempfile
from typing import Any

from pconv_jax.cli import inpaint
from pconv_jax.inpaint.inpainter import Inpainter


def add(commands: Any) -> None:
    """Adds the command to those of ``pconv``."""
    command = commands.add_parser(
        "demo",
        help="repair pictures in the browser",
        description=(
            "Serves a page on which to open a picture, paint over what is to be filled "
            "and download the repaired one. It works without a network."
        ),
    )
    inpaint.add_network(command)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets others in (default: %(default)s)",
    )
    command.add_argument(
        "--port", type=int, default=7860, help="to listen on (default: %(default)s)"
    )
    command.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    _use_temporary_folder()
    try:
        from pconv_jax.inpaint import page  # Gradio takes long to import.
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the page takes {error.name}: pip install 'pconv-jax[demo]'."
        ) from error
    inpainter = Inpainter.from_pretrained(arguments.network)
    page.launch(inpainter, host=arguments.host, port=arguments.port)


def _use_temporary_folder() -> None:
    """Has Gradio keep its files where none outlives the process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # It ends as by Ctrl-C.
    folder = tempfile.mkdtemp(prefix="pconv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder  # It is read when Gradio is imported.
