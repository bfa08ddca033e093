"""The cases of each suite, as plain data.

A case is a task, and its variants are ways to do it. They are measured in turns. A
variant has everything that `benchmarks.worker` needs: the framework, the name of the
program, and its settings. The first variant is the reference of the others.

FLOPs are nominal: two for each multiplication in the convolutions of the paper's
network. A program that needs fewer, such as the low-resolution decoder, shows a higher
rate. A program that computes more, such as convolutions of masks, shows a lower rate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Variant = dict[str, Any]

_DTYPES = ("float32", "bfloat16")
TORCH_MODES = ("eager", "channels-last", "compile", "autocast", "compile-autocast")


class Case(NamedTuple):
    """A task to measure.

    Attributes:
      suite: One of `SUITES`, or 'machine'.
      name: Name of the case, unique within the suite.
      variants: The variants by name.
      items: Number and kind of items that a call processes, such as ``(8, 'images')``.
      flops: Nominal FLOPs of a call; None if they are meaningless.
      large: Whether the variants do not fit into memory together. Each turn then has
        its own process.
    """

    suite: str
    name: str
    variants: dict[str, Variant]
    items: tuple[int, str] = (1, "calls")
    flops: float | None = None
    large: bool = False


def matmul(*, platform: str, torch: bool, smoke: bool) -> list[Case]:
    """Make the cases that measure the machine's rate of matrix products."""
    n = 64 if smoke else 2048 if platform == "cpu" else 8192
    cases = []
    for dtype in _DTYPES:
        settings = {"program": "matmul", "n": n, "dtype": dtype}
        variants = {f"jax {dtype}": {"framework": "jax", **settings}}
        if torch:
            variants[f"torch {dtype}"] = {"framework": "torch", **settings}
        name = f"matrix product {n} x {n}, {dtype}"
        cases.append(Case("machine", name, variants, flops=2 * n**3))
    return cases


def make(suite: str, *, platform: str, torch: bool, smoke: bool) -> list[Case]:
    """Make the cases of a suite.

    Args:
      suite: One of `SUITES`.
      platform: Platform of JAX: 'cpu', 'gpu' or 'tpu'. On CPUs, single layers and
        forms of the decoder are measured in float32 only.
      torch: Whether to compare with PyTorch.
      smoke: Whether to use tiny sizes, to test that everything works.
    """
    cases = _SUITES[suite](platform, smoke)
    if torch:
        return cases
    return [c._replace(variants=_of_jax(c.variants)) for c in cases]


def unet_flops(size: int, *, depth: int = 8, width: int = 64) -> int:
    """Count the FLOPs of the network's convolutions, for one square image."""
    return sum(
        2 * kernel**2 * inputs * features * side**2
        for inputs, features, kernel, side in stages(size, depth=depth, width=width)
    )


def stages(size: int, *, depth: int = 8, width: int = 64) -> list[tuple[int, ...]]:
    """List (input channels, features, kernel size, output side) of all stages."""
    features = [3, *(width * 2 ** min(level, 3) for level in range(depth))]
    kernels = [7, 5, 5] + [3] * depth
    encoder = [
        (features[i], features[i + 1], kernels[i], size >> (i + 1))
        for i in range(depth)
    ]
    decoder = [
        (features[i + 1] + features[i], features[i], 3, size >> i)
        for i in reversed(range(depth))
    ]
    return encoder + decoder


def vgg_flops(size: int) -> int:
    """Count the FLOPs of VGG16's convolutions up to pool3, for one square image."""
    channels = ((3, 64), (64, 64)), ((64, 128), (128, 128))
    channels += (((128, 256), (256, 256), (256, 256)),)
    return sum(
        2 * 9 * a * b * (size >> block) ** 2
        for block, convs in enumerate(channels)
        for a, b in convs
    )


def train_flops(size: int, *, depth: int, width: int = 64) -> int:
    """Count the FLOPs of a training step, for one square image.

    The network's convolutions run forward, and backward with respect to their inputs
    and kernels. Those of VGG16 run forward for three images, and backward with respect
    to the inputs of two.
    """
    return 3 * unet_flops(size, depth=depth, width=width) + 5 * vgg_flops(size)


def _layer(platform: str, smoke: bool) -> list[Case]:
    shapes = [(64, 128, 64), (64, 128, 256), (256, 256, 64), (256, 256, 128)]
    cases = []
    for inputs, features, size in [(4, 8, 16)] if smoke else shapes:
        for dtype in _dtypes(platform):
            for backward in (True,) if smoke else (False, True):
                settings = {
                    "program": "layer",
                    "size": size,
                    "batch": 1 if platform == "cpu" else 8,
                    "channels": inputs,
                    "features": features,
                    "backward": backward,
                    "dtype": dtype,
                }
                kinds = {
                    "nn.Conv": ("jax", "standard"),
                    "PartialConv": ("jax", "partial"),
                    "dense mask": ("jax", "dense"),
                    "torch Conv2d": ("torch", "standard"),
                    "torch dense mask": ("torch", "dense"),
                }
                variants = {
                    name: {"framework": framework, "conv": conv, **settings}
                    for name, (framework, conv) in kinds.items()
                }
                passes = "forward and backward" if backward else "forward"
                batch = settings["batch"]
                flops = 2 * 9 * inputs * features * size**2 * batch
                cases.append(
                    Case(
                        "layer",
                        f"3x3, {inputs} -> {features}, {size} x {size}, batch {batch}, "
                        f"{dtype}, {passes}",
                        variants,
                        items=(batch, "images"),
                        flops=flops * (3 if backward else 1),
                    )
                )
    return cases


def _inference(platform: str, smoke: bool) -> list[Case]:
    if smoke:
        return [_unet_case(platform, 16, 1, depth=2, width=4)]
    sizes = (256, 512, 1024)
    cases = [_unet_case(platform, size, batch) for batch in (1, 8) for size in sizes]
    return [case for case in cases if not case.large]


def _unet_case(
    platform: str, size: int, batch: int, suite: str = "inference", **network: int
) -> Case:
    settings = {"program": "inference", "size": size, "batch": batch, **network}
    modes = (*TORCH_MODES, "onnxruntime")
    return Case(
        suite,
        f"UNet {size} x {size}, batch {batch}",
        _jax_and_torch(settings, modes),
        items=(batch, "images"),
        flops=batch * unet_flops(size, **network),
        large=platform == "cpu" and size**2 * batch > 2**21,
    )


def _train(platform: str, smoke: bool) -> list[Case]:
    if smoke:
        return [_train_case(platform, 16, 2, depth=2, width=4)]
    # Sizes that fit small machines, and the paper's sizes.
    settings = ((256, 2, 7), (512, 6, 8))
    cases = [_train_case(platform, n, batch, depth=d) for n, batch, d in settings]
    return [case for case in cases if not case.large]


def _train_case(
    platform: str,
    size: int,
    batch: int,
    suite: str = "train",
    *,
    depth: int,
    width: int = 64,
) -> Case:
    network = {"depth": depth, "width": width}
    fields = {"program": "train", "size": size, "batch": batch, **network}
    return Case(
        suite,
        f"training step, {size} x {size}, batch {batch}, depth {depth}",
        _jax_and_torch(fields, TORCH_MODES),
        items=(batch, "images"),
        flops=batch * train_flops(size, **network),
        large=platform == "cpu" and size**2 * batch > 2**20,
    )


def _large(platform: str, smoke: bool) -> list[Case]:
    """Make the cases of `inference` and `train` that take a CPU many minutes."""
    if smoke:
        return [_train_case(platform, 16, 2, "large", depth=2, width=4)]
    return [
        _unet_case(platform, 1024, 8, "large"),
        _train_case(platform, 512, 6, "large", depth=8),
    ]


def _data(platform: str, smoke: bool) -> list[Case]:
    cases = []
    count = 8 if smoke else 320
    for size in (16,) if smoke else (256, 512):
        fields = {"framework": "jax", "size": size, "batch": 8, "count": count}
        threads = {"threads": {"program": "data", "workers": 0, **fields}}
        workers = {"2 workers": {"program": "data", "workers": 2, **fields}}
        cases += [
            Case(
                "data",
                f"random crops of JPEGs to {size} x {size}",
                threads if smoke else threads | workers,
                items=(count, "images"),
            ),
            Case(
                "data",
                f"masks drawn on the device, {size} x {size}, batch 8",
                {"jax": {"program": "masks", **fields}},
                items=(8, "masks"),
            ),
        ]
    return cases


def _growth(platform: str, smoke: bool) -> list[Case]:
    """Make the cases that `inference` lacks to show how the time grows."""
    network = {"depth": 2, "width": 4} if smoke else {}
    size = 16 if smoke else 512
    settings = {"framework": "jax", "program": "inference", "size": size, "batch": 1}
    ratios = (0.1, 0.9) if smoke else (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
    holes = Case(
        "growth",
        f"hole ratio, UNet {size} x {size}, batch 1",
        {f"{r:.0%}": {**settings, **network, "hole_ratio": r} for r in ratios},
        items=(1, "images"),
        flops=unet_flops(size, **network),
    )
    if smoke:
        return [holes]
    others = ((768, 1), (256, 2), (256, 4))
    return [holes] + [_unet_case(platform, *other, "growth") for other in others]


def _profile(platform: str, smoke: bool) -> list[Case]:
    """Make the cases of the parts of inference and of a training step."""
    network = {"depth": 2, "width": 4} if smoke else {"depth": 8, "width": 64}
    size = 16 if smoke else 512
    settings = {"framework": "jax", "size": size, "batch": 1, **network}
    variants = {"whole network": {"program": "inference", **settings}}
    for i in range(2 * network["depth"]):
        variants[f"pconv{i + 1}"] = {"program": "stage", "stage": i, **settings}
    inference = Case("profile", f"inference, {size} x {size}, batch 1", variants)

    size, network = (16, network) if smoke else (256, {"depth": 7, "width": 64})
    settings = {"framework": "jax", "size": size, "batch": 2, **network}
    variants = {"whole step": {"program": "train", **settings}}
    for part in (
        "network forward",
        "network forward and backward",
        "VGG16 forward, 3 images",
        "loss forward and backward",
        "loss without VGG16",
        "optimizer",
    ):
        variants[part] = {"program": "part", "part": part, **settings}
    train = Case("profile", f"training step, {size} x {size}, batch 2", variants)
    return [inference, train]


def _decoder(platform: str, smoke: bool) -> list[Case]:
    """Make the cases of the forms of the convolution of upsampled features."""
    network = {"depth": 2, "width": 4} if smoke else {"depth": 7, "width": 64}
    dtype = _dtypes(platform)[-1]
    part = {"program": "part", "part": "network forward and backward"}
    programs = {
        "inference": ({"program": "inference"}, 512, 1 if platform == "cpu" else 8),
        "forward and backward": (part, 256, 2 if platform == "cpu" else 32),
    }
    cases = []
    for title, (program, size, batch) in programs.items():
        size = 16 if smoke else size
        settings = {"size": size, "batch": batch, "dtype": dtype, **network}
        variants = {
            f"jax {form}": {"framework": "jax", **program, **settings, "decoder": form}
            for form in ("repeated", "taps")
        }
        name = f"{title}, {size} x {size}, batch {batch}, {dtype}"
        flops = batch * unet_flops(size, **network)
        flops *= 3 if program is part else 1
        items = (batch, "images")
        cases.append(Case("decoder", name, variants, items=items, flops=flops))
    return cases


def _start(platform: str, smoke: bool) -> list[Case]:
    """Make the cases of what people wait for when they start a command."""
    fields = {"framework": "jax", "program": "start"}
    codes = {
        "import jax": "import jax",
        "import pconv_jax": "import pconv_jax",
        "import Inpainter": "from pconv_jax import Inpainter",
        "pconv --help": "from pconv_jax import cli; cli.main(['--help'])",
    }
    variants = {name: {"code": code, **fields} for name, code in codes.items()}
    cases = [Case("start", "imports", variants, items=(1, "starts"))]
    for size in () if smoke else (256, 512):
        repair = {"framework": "jax", "program": "repair", "size": size}
        variants = {
            "next": {"first": False, "sharp": True, **repair},
            "next, --no-sharp": {"first": False, "sharp": False, **repair},
            "first": {"first": True, "sharp": True, **repair},
        }
        name = f"pconv inpaint, {size} x {size}"
        cases.append(Case("start", name, variants, items=(1, "images")))
    return cases


def _jax_and_torch(
    settings: Mapping[str, Any], modes: Sequence[str]
) -> dict[str, Variant]:
    variants = {}
    for dtype in _DTYPES:
        variants[f"jax {dtype}"] = {"framework": "jax", "dtype": dtype, **settings}
    for mode in modes:
        dtype = "bfloat16" if "autocast" in mode else "float32"
        fields = {"framework": "torch", "mode": mode, "dtype": dtype}
        variants[f"torch {mode}"] = {**fields, **settings}
    return variants


def _of_jax(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    return {n: v for n, v in variants.items() if v["framework"] == "jax"}


def _dtypes(platform: str) -> tuple[str, ...]:
    return ("float32",) if platform == "cpu" else _DTYPES


_SUITES: Mapping[str, Callable[[str, bool], list[Case]]] = {
    "layer": _layer,
    "inference": _inference,
    "train": _train,
    "large": _large,
    "data": _data,
    "growth": _growth,
    "profile": _profile,
    "decoder": _decoder,
    "start": _start,
}

SUITES = tuple(_SUITES)
