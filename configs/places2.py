"""The paper's recipe on Places2 (Zhou et al. 2017), as TFDS's places365_small.

Its 1.8 million images have 256 x 256 pixels, so crops have that size and the network
has 7 stages; the paper uses 512 x 512. Download and prepare the data once, with
TensorFlow (29 GiB, according to the TFDS catalog):

    pip install tensorflow-cpu importlib-resources
    python -c "import tensorflow_datasets as tfds; tfds.builder('places365_small',
        file_format='array_record').download_and_prepare()"
    python train.py --config configs/places2.py
"""

from ml_collections import ConfigDict

from pconv_jax.runs.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = 256
    config.model.depth = 7
    config.data.source = "tfds"
    config.data.name = "places365_small"
    config.data.scale = (1.0, 1.0)  # The images are small already.
    config.data.workers = 4
    return config
