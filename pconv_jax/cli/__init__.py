"""The command ``pconv``: one module for each of its commands.

A command's module declares its arguments in `add`. It imports what it needs to run only
when it runs, so that ``--help`` and ``--version`` are fast.
"""

import argparse
import io
import re
import sys
from collections.abc import Sequence

from pconv_jax import __version__
from pconv_jax._errors import RunError, UserError
from pconv_jax.cli import config_options, convert, demo, eval, inpaint, masks, train

# Each has a function `add`, which adds its parser, and sets `run` as its default.
_COMMANDS = (inpaint, demo, train, eval, convert, masks)


def main(argv: Sequence[str] | None = None, *, program: str = "pconv") -> None:
    """Run the command.

    User errors and run errors become one sentence. All other exceptions are bugs, and
    keep their traceback.

    Args:
      argv: Arguments. By default those of the process.
      program: Name of the program in front of an error. The default is pconv.
    """
    parser = argparse.ArgumentParser(
        prog="pconv", description="Image inpainting with partial convolutions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    # Names of files may have bytes that are not text, or that a terminal cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        sys.exit(2)
    arguments, unknown = parser.parse_known_args(_spell_with_dashes(argv))
    if unknown:
        sys.exit(f"{program}: {config_options.explain_unknown(unknown[0])}")
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # The reader of the output, such as `head`, has ended.
        sys.stderr.close()
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted.")
    except (RunError, UserError) as error:
        sys.exit(f"{program}: {error}")


def _spell_with_dashes(argv: Sequence[str]) -> list[str]:
    """Write the names of options with dashes where they have underscores.

    Names of settings, after ``--config.``, keep their underscores. Arguments after
    ``--``, which ends the options, stay as they are.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    options = [re.sub(r"^--\w+", _with_dashes, argument) for argument in argv[:end]]
    return [*options, *argv[end:]]


def _with_dashes(name: re.Match[str]) -> str:
    return name[0].replace("_", "-")
