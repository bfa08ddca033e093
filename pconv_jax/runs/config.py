"""Config files: Python files that define an experiment; see ``configs/``.

A config file defines ``get_config()``, which starts from `default_config`, changes some
fields and returns the config.
"""

import importlib.util
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from pconv_jax import _files
from pconv_jax._errors import UserError
from pconv_jax.runs.fields import Field, Paths, nest
from pconv_jax.runs.settings import FIELDS, Settings

_PACKAGE = pathlib.Path(__file__).parents[1]
# In an installed wheel, and in a checkout.
_BUNDLED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def default_config() -> ConfigDict:
    """Make a config with the paper's value of every field, locked."""
    return ConfigDict(nest({n: _config_value(f) for n, f in FIELDS.items()})).lock()


def read_settings(config: ConfigDict | Mapping[str, Any] | Settings) -> Settings:
    """Read and check the settings of a config; settings are returned as they are.

    Raises:
      UserError: As `Settings.from_dict`.
    """
    if isinstance(config, Settings):
        return config
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    return Settings.from_dict(values)


def load_config(name: str) -> ConfigDict:
    """Run a config file.

    Args:
      name: Path of the file, or the name of one that comes with this package, such as
        ``pconv`` or ``configs/pconv.py``. After a colon comes an argument of its
        ``get_config``: ``configs/pconv.py:quickstart``.

    Raises:
      UserError: If there is no such file, it has no ``get_config``, or that refuses the
        argument or returns no config.
    """
    place, _, argument = name.partition(":")
    path = _find_config(_files.as_path(place))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config must be a .py file, got {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {path} defines no get_config().")
    arguments = [argument] if argument else []
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        takes = "takes no argument" if argument else "needs an argument"
        raise UserError(f"--config: get_config() of {path} {takes}.") from error
    config = module.get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: get_config() of {path} must return a ConfigDict, got "
            f"{type(config).__name__}."
        )
    return config


def default_workdir(name: str) -> str:
    """Return the directory of a run, such as ``runs/pconv-quickstart``."""
    place, _, argument = name.partition(":")
    stem = pathlib.Path(place).stem
    return f"runs/{stem}-{argument}" if argument else f"runs/{stem}"


def _config_value(field: Field) -> Any:
    if not field.optional:
        return field.default
    # Only a reference may become None. Paths may be one text or several.
    kind = object if field.type is Paths else str
    return FieldReference(field.default, field_type=kind)


def _find_config(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if path.parent.name in ("", "configs") and len(path.parts) <= 2:
        for folder in _BUNDLED:
            bundled = folder / f"{path.stem}.py"
            if bundled.is_file():
                return bundled
    names = sorted({file.stem for folder in _BUNDLED for file in folder.glob("*.py")})
    raise UserError(
        f"--config: there is no file {path}, nor a config of that name in the package "
        f"({', '.join(names)})."
    )
