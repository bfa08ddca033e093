"""The network that comes with this package: see pconv_jax/weights/README.md.

Trained on two CPU cores, so it is small (width 32), and without the terms of the loss
that need a VGG: they take six times as long as all the rest. It learns in three runs,
each from the weights of the one before. PHOTOS is a comma-separated list of tar files:

    python train.py --config configs/release.py:coarse --config.data.path=PHOTOS
    python train.py --config configs/release.py:fine --config.data.path=PHOTOS
    python train.py --config configs/release.py:longer --config.data.path=PHOTOS

`coarse` has a large learning rate, and crops of up to the whole picture; `fine` has
crops near the photos' own resolution, and both phases of the paper; `longer` has both
once more.
"""

from ml_collections import ConfigDict

from pconv_jax import config as experiment


def get_config(variant: str) -> ConfigDict:
    config = experiment.paper()
    config.image_size = 128
    config.batch_size = 8
    config.model.depth = 7
    config.model.width = 32
    config.data.source = "tar"
    config.data.validation_fraction = 0.02
    config.vgg = "none"
    config.average_decay = 0.999
    config.log_every = 50
    config.validation_examples = 5
    config.checkpoint_every = 500
    config.validate_every = 1_000
    config.picture_every = 1_000
    if variant == "coarse":
        config.data.scale = (0.4, 1.0)
        config.phase1.steps = 6_000
        config.phase1.learning_rate = 1e-3
        config.phase2.steps = 0
    elif variant == "fine":
        config.init_from = "runs/release-coarse"
        config.data.scale = (0.35, 0.7)
        config.phase1.steps = 8_000
        config.phase1.learning_rate = 5e-4
        config.phase2.steps = 4_000
        config.phase2.learning_rate = 2e-4
    elif variant == "longer":
        config.init_from = "runs/release-fine"
        config.data.scale = (0.35, 0.7)
        config.phase1.steps = 9_000
        config.phase1.learning_rate = 7e-4
        config.phase2.steps = 4_000
        config.phase2.learning_rate = 1.5e-4
    else:
        raise ValueError(
            f"the variants are 'coarse', 'fine' and 'longer', got {variant!r}"
        )
    return config
