"""The command ``pconv``: one module for each of its commands."""

import argparse
import sys
from collections.abc import Sequence

from pconv_jax import __version__
from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options, convert, demo, eval, inpaint, masks, train

# Each has `add`, which adds its parser, and sets the function that runs the command.
_COMMANDS = (inpaint, demo, train, eval, convert, masks)


def main(argv: Sequence[str] | None = None, *, program: str = "pconv") -> None:
    """Runs the command.

    Args:
      argv: Arguments. None takes those of the process.
      program: Name of the program in front of an error.
    """
    parser = argparse.ArgumentParser(
        prog="pconv", description="Image inpainting with partial convolutions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        sys.exit(f"{program}: {config_options.explain_unknown(unknown[0])}")
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # Whoever read the output has seen enough.
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted.")
    except (OSError, ValueError, UserError, RunError) as error:
        sys.exit(f"{program}: {error}")
