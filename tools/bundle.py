"""Makes the weights file of a release from what a run wrote.

    python -m tools.bundle RUN/weights.safetensors OUT.safetensors --trusted-depth 4

The parts of a file, ``weights.safetensors.1`` and so on, are joined first. The kernels
are stored in int8. Of absolute paths in the description of the run, only the names of
the files stay.
"""

import argparse
from pathlib import Path
from typing import Any

from pconv_jax._errors import RunError, UserError
from pconv_jax.runs import opening
from pconv_jax.train import export
from pconv_jax.weights.pretrained import from_pretrained, save_pretrained


def bundle(source: Path, out: Path, *, trusted_depth: int | None = None) -> None:
    """Write the weights file of a release.

    Args:
      source: Weights file of a run, whole or in parts.
      out: Path of the file to write.
      trusted_depth: The last encoder stage whose fillings `Inpainter` keeps. None (the
        default) leaves the choice to it.

    Raises:
      UserError: If there is no such file, or if it has no description of a run.
      RunError: If the file cannot be written.
    """
    if not source.exists():
        export.join(source)
    model, variables, info = from_pretrained(source)
    try:
        step, experiment = info["step"], _shorten(info["experiment"])
        description = opening.describe_run(experiment, step) | {"step": step}
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{source} has no description of a run: {error!r}. Give the file that a "
            "run writes as it goes (config.export)."
        ) from error
    if trusted_depth is not None:
        description["trusted_depth"] = trusted_depth
    save_pretrained(out, model, variables, info=description, kernels="int8")


def _shorten(value: Any) -> Any:
    """Replace absolute paths by the names of their files."""
    if isinstance(value, dict):
        return {name: _shorten(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_shorten(item) for item in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def main() -> None:
    """Make the file that the command line describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="weights file of a run")
    parser.add_argument("out", type=Path, help="weights file to write (.safetensors)")
    parser.add_argument(
        "--trusted-depth",
        type=int,
        help="the last encoder stage whose fillings Inpainter keeps (default: not "
        "stored, so that Inpainter chooses)",
    )
    arguments = parser.parse_args()
    try:
        bundle(arguments.source, arguments.out, trusted_depth=arguments.trusted_depth)
    except (UserError, RunError) as error:
        parser.error(str(error))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
