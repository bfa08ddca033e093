"""Image inpainting with partial convolutions in JAX and Flax.

Every public name can be reached from here, e.g. ``pconv_jax.PartialConv``, and so can
the modules, e.g. ``pconv_jax.masks``. Each is imported when it is first used, so
``import pconv_jax`` is fast. The layers for Flax's NNX are in ``pconv_jax.nnx``.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0.dev0"

if TYPE_CHECKING:
    from pconv_jax import nnx as nnx
    from pconv_jax._errors import RunError as RunError
    from pconv_jax._errors import UserError as UserError
    from pconv_jax.data.base import ImageSource as ImageSource
    from pconv_jax.data.decode import UnreadableImageError as UnreadableImageError
    from pconv_jax.data.mask_folder import MaskFolder as MaskFolder
    from pconv_jax.data.pipeline import eval_batches as eval_batches
    from pconv_jax.data.pipeline import train_batches as train_batches
    from pconv_jax.data.sources import FolderSource as FolderSource
    from pconv_jax.data.sources import TarSource as TarSource
    from pconv_jax.data.sources import open_source as open_source
    from pconv_jax.evaluate.comparison import compare as compare
    from pconv_jax.evaluate.eval_set import EvalSet as EvalSet
    from pconv_jax.evaluate.runner import evaluate_run as evaluate_run
    from pconv_jax.inpaint.inpainter import Inpainter as Inpainter
    from pconv_jax.layers import PartialConv as PartialConv
    from pconv_jax.layers import PartialConvTranspose as PartialConvTranspose
    from pconv_jax.layers import PartialPadConv as PartialPadConv
    from pconv_jax.losses import PAPER_WEIGHTS as PAPER_WEIGHTS
    from pconv_jax.losses import LossWeights as LossWeights
    from pconv_jax.losses import inpainting_loss as inpainting_loss
    from pconv_jax.masks import HOLE_BINS as HOLE_BINS
    from pconv_jax.masks import hole_bin as hole_bin
    from pconv_jax.masks import hole_ratio as hole_ratio
    from pconv_jax.masks import near_border as near_border
    from pconv_jax.masks import random_mask as random_mask
    from pconv_jax.masks import touches_border as touches_border
    from pconv_jax.ops import Upsampled as Upsampled
    from pconv_jax.ops import composite as composite
    from pconv_jax.ops import mask_coverage as mask_coverage
    from pconv_jax.ops import partial_conv as partial_conv
    from pconv_jax.ops import partial_conv_transpose as partial_conv_transpose
    from pconv_jax.ops import update_mask as update_mask
    from pconv_jax.ops import upsample as upsample
    from pconv_jax.train.loop import train_and_evaluate as train_and_evaluate
    from pconv_jax.train.step import TrainState as TrainState
    from pconv_jax.train.step import create_state as create_state
    from pconv_jax.train.step import train_step as train_step
    from pconv_jax.unet import Normalization as Normalization
    from pconv_jax.unet import PConvUNet as PConvUNet
    from pconv_jax.unet import Stage as Stage
    from pconv_jax.unet import fill_depth as fill_depth
    from pconv_jax.unet import paper_stages as paper_stages
    from pconv_jax.vgg import VGG16Features as VGG16Features
    from pconv_jax.vgg import VGG19Features as VGG19Features
    from pconv_jax.vgg import vgg16_features as vgg16_features
    from pconv_jax.vgg import vgg19_features as vgg19_features
    from pconv_jax.weights.importers import import_layers as import_layers
    from pconv_jax.weights.importers import import_network as import_network
    from pconv_jax.weights.pretrained import Pretrained as Pretrained
    from pconv_jax.weights.pretrained import from_pretrained as from_pretrained
    from pconv_jax.weights.pretrained import save_pretrained as save_pretrained
    from pconv_jax.weights.vgg import load_vgg_params as load_vgg_params

# The module of each public name. For type checkers, the imports above say the same.
_MODULES = {
    "RunError": "_errors",
    "UserError": "_errors",
    "Upsampled": "ops",
    "composite": "ops",
    "mask_coverage": "ops",
    "partial_conv": "ops",
    "partial_conv_transpose": "ops",
    "update_mask": "ops",
    "upsample": "ops",
    "PartialConv": "layers",
    "PartialConvTranspose": "layers",
    "PartialPadConv": "layers",
    "Normalization": "unet",
    "PConvUNet": "unet",
    "Stage": "unet",
    "fill_depth": "unet",
    "paper_stages": "unet",
    "VGG16Features": "vgg",
    "VGG19Features": "vgg",
    "vgg16_features": "vgg",
    "vgg19_features": "vgg",
    "LossWeights": "losses",
    "PAPER_WEIGHTS": "losses",
    "inpainting_loss": "losses",
    "HOLE_BINS": "masks",
    "hole_bin": "masks",
    "hole_ratio": "masks",
    "near_border": "masks",
    "random_mask": "masks",
    "touches_border": "masks",
    "ImageSource": "data.base",
    "UnreadableImageError": "data.decode",
    "MaskFolder": "data.mask_folder",
    "eval_batches": "data.pipeline",
    "train_batches": "data.pipeline",
    "FolderSource": "data.sources",
    "TarSource": "data.sources",
    "open_source": "data.sources",
    "import_layers": "weights.importers",
    "import_network": "weights.importers",
    "Pretrained": "weights.pretrained",
    "from_pretrained": "weights.pretrained",
    "save_pretrained": "weights.pretrained",
    "load_vgg_params": "weights.vgg",
    "Inpainter": "inpaint.inpainter",
    "EvalSet": "evaluate.eval_set",
    "compare": "evaluate.comparison",
    "evaluate_run": "evaluate.runner",
    "TrainState": "train.step",
    "create_state": "train.step",
    "train_step": "train.step",
    "train_and_evaluate": "train.loop",
}

_SUBMODULES = (
    *("data", "evaluate", "inpaint", "layers", "losses", "masks", "metrics", "nnx"),
    *("ops", "runs", "train", "unet", "vgg", "weights"),
)

# What ``from pconv_jax import *`` imports: no modules, whose names may be those of
# others, such as Flax's nnx, and nothing that needs more than the base installation.
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    *(n for n, m in _MODULES.items() if not m.startswith(("evaluate.", "train."))),
]


def __getattr__(name: str) -> Any:
    module = name if name in _SUBMODULES else _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}: pip install 'pconv-jax[train]'.",
            name=error.name,
        ) from error
    if name in _MODULES:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_SUBMODULES})
