"""The network of version 0.1, from which the bundled one was started.

It was trained on two CPU cores. So it is small (width 32), and its loss lacks the terms
that need a VGG, which would take most of the time. It is trained in four runs, each of
which starts from the weights of the previous one. PHOTOS is a tar file of images; for
several files, repeat --config.data.path:

    python train.py --config configs/release.py:coarse --config.data.path=PHOTOS
    python train.py --config configs/release.py:fine --config.data.path=PHOTOS
    python train.py --config configs/release.py:longer --config.data.path=PHOTOS
    python train.py --config configs/release.py:ragged --config.data.path=PHOTOS

`coarse` has a large learning rate, and crops of up to the whole image. `fine` has crops
near the photos' own resolution, and both phases of the paper. `longer` repeats both
phases. `ragged` repeats them again, with holes that are not always smooth.

A wider network continued from there. It minimizes the logarithm of the squared error,
which is PSNR in other units:

    python tools/widen.py runs/release-ragged runs/release-widened.safetensors \
        --width=48
    python train.py --config configs/release.py:wide --config.data.path=PHOTOS

The bundled network did not use that last run. It was trained on a GPU, from the result
of `ragged` and `tools/widen.py`; see configs/accelerator.py and
pconv_jax/weights/bundled/README.md.
"""

from ml_collections import ConfigDict

from pconv_jax import UserError
from pconv_jax.runs.config import default_config

# For each run: the previous run, the scale of crops, and both phases' steps and
# learning rates.
_RUNS = {
    "coarse": (None, (0.4, 1.0), (6_000, 1e-3), (0, 0.0)),
    "fine": ("coarse", (0.35, 0.7), (8_000, 5e-4), (4_000, 2e-4)),
    "longer": ("fine", (0.35, 0.7), (9_000, 7e-4), (4_000, 1.5e-4)),
    "ragged": ("longer", (0.35, 0.7), (4_000, 5e-4), (3_000, 1.5e-4)),
    "wide": ("widened.safetensors", (0.35, 0.7), (4_000, 5e-4), (2_000, 1.5e-4)),
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in _RUNS:
        raise UserError(
            f"the variants are {', '.join(_RUNS)}, got {variant!r}; name one, as in "
            "release.py:coarse"
        )
    before, scale, first, second = _RUNS[variant]
    config = default_config()
    config.image_size = 128
    config.batch_size = 8
    config.model.depth = 7
    config.model.width = 48 if variant == "wide" else 32
    config.data.source = "tar"
    config.data.validation_fraction = 0.02
    config.data.scale = scale
    config.masks.kind = "ragged" if variant in ("ragged", "wide") else "mixed"
    config.vgg = None
    if variant == "wide":
        config.loss.valid, config.loss.hole, config.loss.log_mse = 0.2, 0.0, 0.12
    config.average_decay = 0.999
    config.init_from = f"runs/release-{before}" if before else None
    config.phase1.steps, config.phase1.learning_rate = first
    config.phase2.steps, config.phase2.learning_rate = second
    config.log_every = 50
    config.validation_examples = 5
    config.checkpoint_every = 500
    config.validate_every = 1_000
    config.picture_every = 1_000
    return config
