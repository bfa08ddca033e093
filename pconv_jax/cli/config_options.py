"""Settings on the command line: ``--config FILE`` and ``--config.NAME=VALUE``."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from pconv_jax._errors import UserError
from pconv_jax.runs.fields import Field, Paths
from pconv_jax.runs.settings import FIELDS, suggest_field


def add_config_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--config`` and a ``--config.NAME`` for every setting to a command."""
    parser.add_argument(
        "--config",
        metavar="NAME",
        required=required,
        help="a config that comes with the package, such as folder or "
        "pconv:quickstart, or the path of a config file",
    )
    group = parser.add_argument_group(
        "settings", "change a field of the config file (defaults are the paper's)"
    )
    for name, field in FIELDS.items():
        group.add_argument(
            f"--config.{name}",
            dest=f"config.{name}",
            metavar="VALUE",
            action="append",
            help=_help(field),
        )


def read_config(arguments: argparse.Namespace) -> Any:
    """Load the config file of a command line, and change the fields it sets.

    Args:
      arguments: Parsed by a parser with `add_config_options`.

    Returns:
      The config, or None if no file is named.

    Raises:
      UserError: If a value has the wrong type, or fields are set without a file. Also
        as `load_config`.
    """
    changes = {
        name: given
        for name in FIELDS
        if (given := getattr(arguments, f"config.{name}")) is not None
    }
    if arguments.config is None:
        if changes:
            raise UserError(f"--config.{next(iter(changes))} needs --config NAME.")
        return None
    from pconv_jax.runs.config import load_config  # Takes the packages of training.

    config = load_config(arguments.config)
    for name, texts in changes.items():
        try:
            values = [FIELDS[name].parse(text) for text in texts]
        except TypeError as error:
            raise UserError(f"--config.{name} {error}.") from None
        value = values[-1]
        if FIELDS[name].type is Paths and None not in values:
            value = tuple(path for paths in values for path in paths)
        config.update_from_flattened_dict({name: value})
    return config


@contextlib.contextmanager
def importing_training() -> Iterator[None]:
    """Import the modules of training inside, whose packages are an extra.

    Raises:
      UserError: If one of these packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pconv_jax"):
            raise
        raise UserError(
            f"training and evaluation need {error.name}: pip install "
            "'pconv-jax[train]'."
        ) from error


def explain_unknown(argument: str) -> str:
    """Explain that a command does not know an argument."""
    name = argument.partition("=")[0]
    hint = ""
    if name.startswith("--config."):
        hint = suggest_field(name.removeprefix("--config."))
    elif (field := name.removeprefix("--").replace("-", "_")) in FIELDS:
        hint = f" Did you mean '--config.{field}'?"
    elif not name.startswith("-"):
        hint = (
            " An option takes one value: put one with spaces in quotation marks, and "
            "name the folder of several files."
        )
    return f"unknown argument: {argument}.{hint}"


def _help(field: Field) -> str:
    default = "none" if field.default is None else field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    within = f" in {field.within}" if field.within else ""
    text = f"{field.description} {field.type_name}{within}, default {default}"
    return text.replace("%", "%%")
