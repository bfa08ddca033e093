"""``pconv convert``: makes a weights file of a run, or of another project's weights."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pconv_jax._errors import UserError
from pconv_jax._files import as_path, check_free
from pconv_jax.cli import config_options
from pconv_jax.cli._options import Subparsers, add_force
from pconv_jax.weights.project_names import PROJECT_NAMES

if TYPE_CHECKING:
    from pconv_jax.weights.pretrained import Pretrained


def add(commands: Subparsers) -> None:
    """Add the command to those of ``pconv``."""
    command = commands.add_parser(
        "convert",
        help="make a weights file from a run or from another project's weights",
        description=(
            "Makes one .safetensors file with a network and its weights, from a "
            "training run or from the weights of another project: "
            f"{', '.join(PROJECT_NAMES)}. PyTorch is not needed to read its files."
        ),
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        type=as_path,
        help="workdir of a run, or a .pth, .pt, .h5, .npz or .safetensors file",
    )
    command.add_argument(
        "out", metavar="OUT", type=as_path, help="the .safetensors file to write"
    )
    command.add_argument(
        "--step", type=int, help="step of the checkpoint of a run (default: the newest)"
    )
    add_force(command)
    command.add_argument(
        "--kernels",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="type in which kernels are stored: float16 halves the file, and int8 "
        "halves it once more (default: %(default)s)",
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    check_free(out, force=arguments.force)
    if out.suffix != ".safetensors":
        raise UserError(f"OUT must be a .safetensors file, got {out}.")
    if not os.path.exists(source):
        raise UserError(f"SOURCE: there is no file or folder {source}.")
    if arguments.step is not None and not source.is_dir():
        raise UserError(f"--step requires a run, but SOURCE is the file {source}.")

    from pconv_jax.weights import pretrained

    network = _read_source(source, arguments.step)
    model, variables, info = network
    pretrained.save_pretrained(
        out, model, variables, info=info, kernels=arguments.kernels
    )
    print(_describe(network))
    print(f"Written to {out} ({out.stat().st_size / 1e6:.1f} MB).")


def _read_source(source: Path, step: int | None) -> "Pretrained":
    from pconv_jax.weights import importers, pretrained

    if source.is_dir():
        return _read_run(source, step)
    if pretrained.is_weights_file(source):
        return pretrained.from_pretrained(source)
    imported = importers.import_network(source)
    info = {"origin": imported.project, "notes": list(imported.notes)}
    return pretrained.Pretrained(imported.model, imported.variables, info)


def _read_run(workdir: Path, step: int | None) -> "Pretrained":
    with config_options.importing_training():
        from pconv_jax.runs import opening
    from pconv_jax.weights.pretrained import Pretrained

    trained = opening.load_run(workdir, step=step)
    assert trained.settings  # All runs have them.
    info = opening.describe_run(trained.settings.to_dict(), trained.step)
    info |= {"warnings": trained.warnings}
    info |= _read_metrics(workdir / "evaluation" / "results.json", trained.step)
    return Pretrained(trained.model, dict(trained.variables), info)


def _read_metrics(path: Path, step: int | None) -> dict[str, Any]:
    """Read the metrics of an evaluation, if there is one of this step."""
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"SOURCE: {path} cannot be read: {error!r}.") from error
    if not isinstance(results, dict) or not {"step", "table"} <= results.keys():
        raise UserError(f"SOURCE: {path} is damaged: it has no step, or no table.")
    return {"metrics": results["table"]} if results["step"] == step else {}


def _describe(network: "Pretrained") -> str:
    """Format the origin of a network, and a table of its parameters."""
    model, variables, info = network
    lines = [f"Recognized: {info.get('origin', 'a weights file of pconv_jax')}."]
    notes = (*info.get("notes", ()), *info.get("warnings", ()))
    lines += [f"Note: {note}" for note in notes]
    encoder, decoder = model.encoder, model.decoder
    kinds = [*["encoder"] * len(encoder), *["decoder"] * len(decoder)]
    params, total = variables["params"], 0
    lines += ["", f"{'stage':<9}{'':<9}{'kernel':<20}{'slope':<7}{'parameters':>11}"]
    rows: list[tuple[str, str | None, str, str]] = [
        (f"pconv{i}", f"bn{i}", kind, _slope(stage.negative_slope))
        for i, (kind, stage) in enumerate(zip(kinds, (*encoder, *decoder)), 1)
    ]
    if model.sigmoid_head:
        rows.append(("head", None, "sigmoid", ""))
    for conv, norm, kind, slope in rows:
        modules = [params[name] for name in (conv, norm) if name in params]
        count = sum(math.prod(a.shape) for module in modules for a in module.values())
        kernel = " x ".join(map(str, params[conv]["kernel"].shape))
        lines.append(f"{conv:<9}{kind:<9}{kernel:<20}{slope:<7}{count:>11,}")
        total += count
    lines.append(f"{'total':<45}{total:>11,}")
    return "\n".join(lines)


def _slope(negative_slope: float | None) -> str:
    return "" if negative_slope is None else f"{negative_slope:g}"
