"""The paper's recipe on CelebA-HQ (Karras et al. 2018), as TFDS's celeb_a_hq/512.

TFDS prepares it from ``data512x512.tar``. Make that file as the TFDS catalog describes,
and put it into ``~/tensorflow_datasets/downloads/manual``:

    pip install tensorflow-cpu importlib-resources
    python -c "import tensorflow_datasets as tfds; tfds.builder('celeb_a_hq/512',
        file_format='array_record').download_and_prepare()"
    python train.py --config configs/celeba_hq.py

The data set has one split of 30,000 faces. This config holds out the last 3,000. The
paper also uses 27,000 and 3,000, but does not say which. It trained for three days on
one V100.
"""

from ml_collections import ConfigDict

from pconv_jax.runs.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "celeb_a_hq/512"
    config.data.train_split = "train[:27000]"
    config.data.validation_split = "train[27000:]"
    config.data.scale = (1.0, 1.0)  # Faces are aligned.
    config.data.workers = 4
    return config
