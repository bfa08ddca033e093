"""What several commands share."""

import argparse
import os
from typing import TypeAlias

# The result of `add_subparsers`. The class is generic only for type checkers.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


# The type of an option that is a path or a name, and stays a string.
expand = os.path.expanduser


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add the option ``--weights``."""
    command.add_argument(
        "--weights",
        metavar="NAME_OR_PATH",
        type=expand,
        help="a .safetensors file that 'pconv convert' wrote; the name of a bundled "
        "file; or a repository on the Hugging Face Hub, user/name (default: photos, "
        "which is bundled)",
    )


def add_force(command: argparse.ArgumentParser) -> None:
    """Add the option ``--force``."""
    command.add_argument("--force", action="store_true", help="replace existing files")
