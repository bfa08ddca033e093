"""The paper's recipe on a folder of pictures, with its subfolders.

    python train.py --config configs/folder.py --config.data.path=/path/to/photos

A twentieth of them is held out for validation, unless there is another folder for that
(--config.data.validation_path). Crops are of 256 x 256 and the network has 7 levels,
which suits pictures of ordinary size; for 512 x 512 as in the paper, set
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
