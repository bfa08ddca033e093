"""``pconv demo``: repairs images in the browser."""

import argparse
import atexit
import os
import shutil
import signal
import tempfile

from pconv_jax.cli._options import Subparsers, add_weights


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "demo",
        help="repair images in the browser",
        description=(
            "Serves a web page where you open an image, paint over the area to fill, "
            "and download the repaired image. It needs no connection."
        ),
    )
    add_weights(command)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: "
        "%(default)s)",
    )
    command.add_argument(
        "--port",
        type=int,
        default=7860,
        help="port to listen on (default: %(default)s)",
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    _use_temporary_folder()
    from pconv_jax.inpaint import page  # Reads the folder when it is imported.
    from pconv_jax.inpaint.inpainter import Inpainter

    inpainter = Inpainter.from_pretrained(arguments.weights)
    page.launch(inpainter, host=arguments.host, port=arguments.port)


def _use_temporary_folder() -> None:
    """Let Gradio keep its files in a folder that is deleted when the process ends."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ends like Ctrl-C.
    folder = tempfile.mkdtemp(prefix="pconv-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder
