"""The network of version 0.1, which the bundled one started from.

It was trained on two CPU cores. So it is small (width 32), and its loss lacks the terms
that need a VGG, which take six times as long as all the rest. It is trained in four
runs, and each starts from the weights of the previous one. PHOTOS is a tar file of
images; for several files, repeat --config.data.path:

    python train.py --config configs/release.py:coarse --config.data.path=PHOTOS
    python train.py --config configs/release.py:fine --config.data.path=PHOTOS
    python train.py --config configs/release.py:longer --config.data.path=PHOTOS
    python train.py --config configs/release.py:ragged --config.data.path=PHOTOS

`coarse` has a large learning rate, and crops of up to the whole image. `fine` has crops
near the photos' own resolution, and both phases of the paper. `longer` has both phases
once more. `ragged` has them too, with holes that are not always smooth.

After these runs, the network has almost stopped learning. A wider network continues
from there. It minimizes the logarithm of the squared error, which is PSNR in other
units:

    python tools/widen.py runs/release-ragged runs/release-widened.safetensors \
        --width=48
    python train.py --config configs/release.py:wide --config.data.path=PHOTOS

So far the wider network is 0.1 dB better and takes twice the time, so it is not in the
package.
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


def get_config(variant: str) -> ConfigDict:
    if variant not in _RUNS:
        raise UserError(f"the variants are {', '.join(_RUNS)}, got {variant!r}")
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
