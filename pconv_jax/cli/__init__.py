"""The command ``pconv``: one module for each of its commands."""

import argparse
import sys
from collections.abc import Sequence

from pconv_jax import __version__
from pconv_jax.cli import convert, demo, inpaint, masks

# Each has `add`, which adds its parser, and sets the function that runs the command.
_COMMANDS = (inpaint, demo, convert, masks)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
      argv: arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="pconv", description="Image inpainting with partial convolutions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit("pconv: interrupted.")
    except (OSError, ValueError) as error:
        sys.exit(f"pconv: {error}")
