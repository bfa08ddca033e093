"""Recompute the golden outputs in ``tests/testdata`` with the code of other projects.

    python tools/make_golden.py --projects DIR          # Compares with what is stored.
    python tools/make_golden.py --projects DIR --write  # Replaces it.

It needs PyTorch (2.13 was used), and in DIR clones of four repositories, whose files
are read at the commits below:

    git clone https://github.com/NVIDIA/partialconv
    git clone https://github.com/naoto0804/pytorch-inpainting-with-partial-conv
    git clone https://github.com/open-mmlab/mmagic
    git clone https://github.com/FREVA-CLINT/climatereconstructionAI

Inputs are those in the files. To add a case, add its inputs to the file (for the layer,
also an entry of ``meta``), drawn by ``numpy.random.default_rng``; any outputs will do,
for ``--write`` replaces them. Weights are drawn by ``recipe_weights`` of
``tests/helpers/reference.py``. ``learned_metrics.npz`` has a generator of its own,
``python -m tests.helpers.learned_golden``.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.reference import recipe_weights  # noqa: E402

Arrays = Mapping[str, np.ndarray]

COMMITS = {
    "partialconv": "610d373",
    "pytorch-inpainting-with-partial-conv": "8d64e7e",
    "mmagic": "0a560bb",
    "climatereconstructionAI": "e4454e0",
}
# Largest difference from what is stored, relative to an array's largest value.
TOLERANCE = 1e-6


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--projects", type=Path, required=True, metavar="DIR")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    failed = False
    for name, compute in GENERATORS.items():
        path = ROOT / "tests" / "testdata" / f"{name}.npz"
        stored = dict(np.load(path))
        with torch.set_grad_enabled(name == "nvidia_partialconv"):
            outputs = compute(arguments.projects, stored)
        difference, key = _largest_difference(stored, outputs)
        print(f"{name}: {len(outputs)} arrays differ by up to {difference:.1e} ({key})")
        failed |= not difference <= TOLERANCE  # Or it is not a number.
        if arguments.write:
            changed = {k: a.astype(stored[k].dtype) for k, a in outputs.items()}
            np.savez_compressed(path, **{**stored, **changed})
    if failed and not arguments.write:
        sys.exit("make_golden: stored outputs differ by more than rounding.")


def nvidia_partialconv(projects: Path, stored: Arrays) -> dict[str, np.ndarray]:
    """Apply and differentiate the layers of NVIDIA/partialconv, in float64."""
    folder = _checkout(projects, "partialconv", "models")
    modules = {
        rank: _execute(folder / "models" / f"partialconv{rank}d.py") for rank in (2, 3)
    }
    outputs = {}
    for number, case in enumerate(json.loads(str(stored["meta"]))):
        prefix, rank = f"{number:03d}/", case["nd"]
        x = _tensor(stored[f"{prefix}x"]).requires_grad_()
        kernel = stored[f"{prefix}kernel"]
        layer = getattr(modules[rank], f"PartialConv{rank}d")(
            x.shape[1],
            kernel.shape[-1],
            tuple(case["kernel_size"]),
            stride=tuple(case["strides"]),
            padding=case["padding"],
            dilation=tuple(case["dilation"]),
            groups=case["groups"],
            bias=case["bias"],
            multi_channel=case["multi_channel"],
            return_mask=True,
        ).double()
        layer.weight.data = _kernel(kernel)
        if case["bias"]:
            layer.bias.data = torch.from_numpy(stored[f"{prefix}bias"])
        mask = stored.get(f"{prefix}mask")
        y, new_mask = layer(x, None if mask is None else _tensor(mask))
        y.backward(_tensor(stored[f"{prefix}dy"]))
        outputs[f"{prefix}y"] = _array(y)
        outputs[f"{prefix}new_mask"] = _array(new_mask)
        outputs[f"{prefix}dx"] = _array(x.grad)
        gradient = layer.weight.grad.numpy()
        outputs[f"{prefix}dkernel"] = np.moveaxis(gradient, (0, 1), (-1, -2))
        if case["bias"]:
            outputs[f"{prefix}dbias"] = layer.bias.grad.numpy()
    return outputs


def unets(projects: Path, stored: Arrays) -> dict[str, np.ndarray]:
    """Apply the UNets of naoto0804 and of mmagic, in evaluation mode."""
    # Its loss imports torchvision for a VGG, which the network does not need.
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.ModuleType("torchvision.models")  # type: ignore
    sys.modules.setdefault("torchvision", torchvision)
    project = "pytorch-inpainting-with-partial-conv"
    naoto0804 = _execute(_checkout(projects, project, "net.py") / "net.py").PConvUNet()
    outputs = {}
    for name, network, scaled in (
        ("naoto0804", naoto0804, True),
        ("mmagic", _mmagic_network(projects), False),
    ):
        shapes = json.loads(str(stored[f"{name}/state_dict"]))
        _load(network, shapes, scaled=scaled)
        x, mask = _tensor(stored["x"]), _tensor(stored["mask"]).expand(-1, 3, -1, -1)
        outputs[f"{name}/y"] = _array(network(x * mask, mask)[0])
    return outputs


def _mmagic_network(projects: Path) -> Callable[..., Any]:
    """Join mmagic's encoder and decoder; stand-ins take the place of mmcv, mmengine."""
    layers = {}

    class Registry:
        def register_module(self, **_: Any) -> Callable[[type], type]:
            def register(cls: type) -> type:
                layers[cls.__name__] = cls
                return cls

            return register

    class ConvModule(nn.Module):
        """What mmcv's does: convolution, batch normalization, activation."""

        def __init__(
            self,
            channels: int,
            features: int,
            *,
            conv_cfg: dict[str, Any],
            norm_cfg: dict[str, Any] | None,
            act_cfg: dict[str, Any] | None,
            **options: Any,
        ):
            super().__init__()
            self.order, self.conv_cfg = ("conv", "norm", "act"), conv_cfg
            self.with_explicit_padding = False
            self.with_norm, self.with_activation = bool(norm_cfg), bool(act_cfg)
            self.conv = layers["PartialConv2d"](
                channels,
                features,
                bias=not norm_cfg,
                multi_channel=conv_cfg["multi_channel"],
                **options,
            )
            if norm_cfg:
                self.bn = nn.BatchNorm2d(features)
            if act_cfg:
                slope = act_cfg.get("negative_slope", 0.0)
                self.activate = nn.LeakyReLU(slope)

        @property
        def norm(self) -> nn.Module:
            return self.bn

        def init_weights(self) -> None:
            pass

    stand_ins: dict[str, dict[str, Any]] = {
        "mmcv": {},
        "mmcv.cnn": {"ConvModule": ConvModule},
        "mmengine": {},
        "mmengine.model": {"BaseModule": nn.Module},
        "mmengine.utils": {},
        "mmengine.utils.dl_utils": {},
        "mmengine.utils.dl_utils.parrots_wrapper": {"_BatchNorm": nn.BatchNorm2d},
        "mmagic": {},
        "mmagic.registry": {"MODELS": Registry()},
        "mmagic.models": {},
        "mmagic.models.editors": {},
    }
    folder = _checkout(projects, "mmagic", "mmagic/models/editors/pconv")
    pconv = "mmagic.models.editors.pconv"
    stand_ins[pconv] = {"__path__": [str(folder / pconv.replace(".", "/"))]}
    for name, values in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    for part in ("partial_conv", "mask_conv_module", "pconv_encoder", "pconv_decoder"):
        __import__(f"{pconv}.{part}")

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = layers["PConvEncoder"]()
            self.decoder = layers["PConvDecoder"]()

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.decoder(self.encoder(x, mask))

    return Network()


def crai(projects: Path, stored: Arrays) -> dict[str, np.ndarray]:
    """Apply a network of climatereconstructionAI, 3 levels and one channel."""
    name = "climatereconstructionai"
    folder = _checkout(projects, "climatereconstructionAI", name)
    package = types.ModuleType(name)  # Not its own, which imports what reads data.
    package.__path__ = [str(folder / name)]
    sys.modules[name] = package
    config: Any = types.ModuleType(f"{name}.config")
    config.n_filters, config.n_channel_steps, config.n_recurrent_steps = 3, 1, 1
    config.skip_layers, config.weights = 1, None
    config.global_padding = config.masked_bn = config.attention = False
    config.lstm_steps = config.gru_steps = config.recurrent_steps = 0
    sys.modules[f"{name}.config"] = package.config = config  # type: ignore
    __import__(f"{name}.model.net")
    x, mask = _tensor(stored["x"])[:, None], _tensor(stored["mask"])[:, None]
    network = sys.modules[f"{name}.model.net"].CRAINet(
        img_size=tuple(x.shape[-2:]),
        enc_dec_layers=3,
        pool_layers=0,
        bounds=np.array([[-np.inf, np.inf]]),
    )
    _load(network, json.loads(str(stored["state_dict"])), scaled=True)
    return {"y": _array(network(x * mask, mask)[:, 0])}


def losses(projects: Path, stored: Arrays) -> dict[str, np.ndarray]:
    """Compute the terms of the loss, written from the paper (version 2), in float64."""
    outputs = {}
    for seed in sorted({int(key.partition("/")[0]) for key in stored}):
        output, target, mask = (
            _tensor(stored[f"{seed}/{name}"]) for name in ("output", "target", "mask")
        )
        comp = mask * target + (1 - mask) * output
        maps = [_vgg16_pools(seed, image) for image in (output, comp, target)]
        terms = {
            "valid": _mean(mask * (output - target)),
            "hole": _mean((1 - mask) * (output - target)),
            "total_variation": _total_variation(comp, mask),
            "perceptual": sum(_mean(a - gt) + _mean(b - gt) for a, b, gt in zip(*maps)),
            "style_out": sum(_style(a, gt) for a, _, gt in zip(*maps)),
            "style_comp": sum(_style(b, gt) for _, b, gt in zip(*maps)),
        }
        terms["total"] = (
            terms["valid"]
            + 6 * terms["hole"]
            + 0.05 * terms["perceptual"]
            + 120 * (terms["style_out"] + terms["style_comp"])
            + 0.1 * terms["total_variation"]
        )
        for name, term in terms.items():
            outputs[f"{seed}/loss/{name}"] = term.numpy()
        for level, pool in enumerate(maps[0], 1):
            outputs[f"{seed}/pool{level}_mean"] = pool.mean(dim=(2, 3)).numpy()
    return outputs


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.abs().mean(dim=(1, 2, 3))


def _style(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute one summand of equations 5 and 6."""
    _, channels, height, width = features.shape

    def gram(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,ndhw->ncd", x, x) / (channels * height * width)

    return (gram(features) - gram(target)).abs().sum(dim=(1, 2)) / channels**2


def _total_variation(comp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over neighbors in the hole that is dilated by one pixel."""
    region = F.max_pool2d(1 - mask, 3, stride=1, padding=1)
    down = (comp[:, :, 1:] - comp[:, :, :-1]) * region[:, :, 1:] * region[:, :, :-1]
    right = (comp[..., 1:] - comp[..., :-1]) * region[..., 1:] * region[..., :-1]
    total = down.abs().sum(dim=(1, 2, 3)) + right.abs().sum(dim=(1, 2, 3))
    return total / comp[0].numel()


def _vgg16_pools(seed: int, images: torch.Tensor) -> list[torch.Tensor]:
    """Compute pool1, pool2 and pool3 of a VGG16 with weights of the recipe."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    x, index, pools = ((images + 1) / 2 - mean) / std, 0, []
    for block, convolutions in enumerate((2, 2, 3)):
        for _ in range(convolutions):
            name, features = f"features.{index}", 64 * 2**block
            shape = (features, x.shape[1], 3, 3)
            drawn = recipe_weights(
                seed, [(f"{name}.weight", shape), (f"{name}.bias", (features,))]
            )
            weight, bias = (torch.from_numpy(a).double() for a in drawn.values())
            x, index = F.relu(F.conv2d(x, weight, bias, padding=1)), index + 2
        x, index = F.max_pool2d(x, 2), index + 1
        pools.append(x)
    return pools


def _load(network: Any, shapes: list[Any], *, scaled: bool) -> None:
    """Give a network the weights of the recipe, in float64 and evaluation mode.

    Args:
      network: The network.
      shapes: Names and shapes of its state, as stored.
      scaled: Whether kernels are multiplied by the number of inputs of a window, for
        layers that divide by sum(M) alone.
    """
    state = network.state_dict()
    assert [[k, list(v.shape)] for k, v in state.items()] == shapes, "another network"
    fixed = ("mask_conv.weight", "weight_mask_updater", "num_batches_tracked")
    drawn = [(k, s) for k, s in shapes if not k.endswith(fixed)]
    for name, array in recipe_weights(1, drawn).items():
        if scaled and array.ndim == 4:
            array = array * np.prod(array.shape[1:])
        state[name] = torch.from_numpy(array)
    network.load_state_dict(state)
    network.double().eval()


def _checkout(projects: Path, name: str, path: str) -> Path:
    """Extract files of a repository, at its commit, into a temporary folder."""
    command = ["git", "-C", str(projects / name), "archive", COMMITS[name], path]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return Path(folder)


def _execute(path: Path) -> types.ModuleType:
    module = types.ModuleType(path.stem)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Convert to float64, with channels first."""
    return torch.from_numpy(np.moveaxis(array, -1, 1).astype(np.float64))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def _kernel(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1))))


def _largest_difference(stored: Arrays, computed: Arrays) -> tuple[float, str]:
    """Find the array that differs most, or whose difference is not a number."""
    differences = {key: _difference(stored[key], computed[key]) for key in computed}
    key = max(differences, key=lambda k: (np.isnan(differences[k]), differences[k]))
    return differences[key], key


def _difference(stored: np.ndarray, computed: np.ndarray) -> float:
    assert stored.shape == computed.shape, (stored.shape, computed.shape)
    return float(np.abs(stored - computed).max() / max(np.abs(stored).max(), 1e-30))


GENERATORS = {
    "nvidia_partialconv": nvidia_partialconv,
    "unets": unets,
    "losses": losses,
    "crai/golden": crai,
}

if __name__ == "__main__":
    main()
