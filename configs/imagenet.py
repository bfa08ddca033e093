"""The paper's recipe on ImageNet (Russakovsky et al. 2015), as TFDS's imagenet2012.

TFDS prepares it from the two original archives. Download them manually into
``~/tensorflow_datasets/downloads/manual``:

    pip install tensorflow-cpu importlib-resources
    python -c "import tensorflow_datasets as tfds; tfds.builder('imagenet2012',
        file_format='array_record').download_and_prepare()"
    python train.py --config configs/imagenet.py

The paper trained for ten days on one V100.
"""

from ml_collections import ConfigDict

from pconv_jax.runs.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.source = "tfds"
    config.data.name = "imagenet2012"
    config.data.scale = (0.7, 1.0)
    config.data.workers = 8
    return config
