"""The paper's recipe on scikit-image's photos.

Liu et al. 2018, section 4.1: 512 x 512, batches of 6, Adam with a learning rate of
2e-4, then 5e-5 with the encoder's batch normalization frozen, and all six terms of the
loss.

    python train.py --config configs/pconv.py

runs anywhere. It needs no download: if there is no trained VGG, it warns and uses
random features. The paper's results need the paper's data: see places2.py, imagenet.py
and celeba_hq.py. For your own images, see folder.py.

    python train.py --config configs/pconv.py:quickstart

runs the same code with a small network on small crops. It takes under 5 minutes on two
CPU cores. docs/train.md shows its results.
"""

from ml_collections import ConfigDict

from pconv_jax import UserError
from pconv_jax.runs.config import default_config


def get_config(variant: str = "paper") -> ConfigDict:
    config = default_config()
    config.vgg = "auto"
    if variant == "quickstart":
        config.image_size = 64
        config.batch_size = 8
        config.model.depth = 4
        config.model.width = 32
        config.data.scale = (0.2, 1.0)
        # With the paper's weights, the style terms would dominate the loss of such
        # small crops, and would take longer than this run to decrease.
        config.loss.style_out = 5.0
        config.loss.style_comp = 5.0
        config.phase1.steps = 200
        config.phase1.learning_rate = 2e-3
        config.phase2.steps = 50
        config.phase2.learning_rate = 5e-4
        config.log_every = 10
        config.picture_every = 50
        config.validate_every = 10
        config.validation_examples = 4
        config.checkpoint_every = 50
        config.evaluation_examples = 24
    elif variant != "paper":
        raise UserError(f"the variants are 'paper' and 'quickstart', got {variant!r}")
    return config
