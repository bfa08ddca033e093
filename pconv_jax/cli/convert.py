"""``pconv convert``: a release file of a run, or of another project's weights."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from flax import traverse_util

from pconv_jax import __version__
from pconv_jax.weights import importers, pretrained
from pconv_jax.weights.pretrained import Pretrained


def add(commands: Any) -> None:
    """Adds the command to those of ``pconv``."""
    command = commands.add_parser(
        "convert",
        help="make a release file of a run, or of another project's weights",
        description=(
            "Makes one .safetensors file, with all that is needed to use a network, of "
            "a run of train.py or of weights of another project. Known are "
            + ", ".join(dict.fromkeys(p.name for p in importers.PROJECTS))
            + "; PyTorch is not needed to read its files."
        ),
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="workdir of a run, or a .pth, .pt, .h5, .npz or .safetensors file",
    )
    command.add_argument(
        "out", metavar="OUT", type=Path, help="the .safetensors file to write"
    )
    command.add_argument(
        "--step", type=int, help="of a run: which checkpoint; by default the newest"
    )
    command.add_argument(
        "--force", action="store_true", help="replace OUT if there is such a file"
    )
    command.add_argument(
        "--half", action="store_true", help="store kernels in float16, half the size"
    )
    command.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    if out.exists() and not arguments.force:
        raise ValueError(f"OUT: there is a file {out} already; --force replaces it.")
    if source.is_dir():
        network = _read_run(source, arguments.step)
    elif arguments.step is not None:
        raise ValueError(f"--step is for runs, and SOURCE is the file {source}.")
    elif pretrained.is_release(source):
        network = pretrained.from_pretrained(source)
    else:
        imported = importers.import_network(source)
        info = {"origin": imported.project, "notes": list(imported.notes)}
        network = Pretrained(imported.model, imported.variables, info)
    model, variables, info = network
    pretrained.save_pretrained(out, model, variables, info=info, half=arguments.half)
    print(_describe(network))
    print(f"Written to {out} ({out.stat().st_size / 1e6:.1f} MB).")


def _read_run(workdir: Path, step: int | None) -> Pretrained:
    from pconv_jax.runs import opening  # It takes long to import.

    trained = opening.load_run(workdir, step=step)
    assert trained.settings
    settings, step = trained.settings.to_dict(), trained.step
    info = {
        "origin": f"pconv_jax {__version__}, step {step}",
        "training_data": settings["data"],
        "experiment": settings,
        "warnings": trained.warnings,
    }
    results = workdir / "evaluation" / "results.json"
    if results.is_file():
        evaluation = json.loads(results.read_text())
        if evaluation["step"] == step:
            info["metrics"] = evaluation["table"]
    return Pretrained(trained.model, dict(trained.variables), info)


def _describe(network: Pretrained) -> str:
    """Returns what a network is, and a table of its parameters."""
    model, variables, info = network
    lines = [f"Recognised: {info.get('origin', 'a release of pconv_jax')}."]
    notes = (*info.get("notes", ()), *info.get("warnings", ()))
    lines += [f"Note: {note}" for note in notes]
    encoder, decoder = model.encoder, model.decoder
    kinds = [*["encoder"] * len(encoder), *["decoder"] * len(decoder)]
    params, total = variables["params"], 0
    lines += ["", f"{'stage':<9}{'':<9}{'kernel':<20}{'slope':<7}{'parameters':>11}"]
    rows = [
        (f"pconv{i}", f"bn{i}", kind, _slope(stage.negative_slope))
        for i, (kind, stage) in enumerate(zip(kinds, (*encoder, *decoder)), 1)
    ]
    if model.sigmoid_head:
        rows.append(("head", None, "sigmoid", ""))
    for conv, norm, kind, slope in rows:
        layers = {name: params[name] for name in (conv, norm) if name in params}
        leaves = traverse_util.flatten_dict(layers).values()
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        kernel = " x ".join(map(str, params[conv]["kernel"].shape))
        lines.append(f"{conv:<9}{kind:<9}{kernel:<20}{slope:<7}{count:>11,}")
        total += count
    lines.append(f"{'total':<45}{total:>11,}")
    return "\n".join(lines)


def _slope(negative_slope: float | None) -> str:
    return "" if negative_slope is None else f"{negative_slope:g}"
