"""The paper's recipe on a folder of images and its subfolders.

    python train.py --config configs/folder.py --config.data.path=/path/to/photos

A twentieth of the images is held out for validation, unless
--config.data.validation_path names another folder. Crops are 256 x 256 and the network
has 7 stages, which suits images of common sizes. For 512 x 512 as in the paper, set
--config.image_size=512 --config.model.depth=8.
"""

from ml_collections import ConfigDict

from pconv_jax.runs.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = 256
    config.model.depth = 7
    config.data.source = "folder"
    return config
