"""Trains an inpainting network: the same as the command ``pconv train``.

python train.py --config configs/pconv.py:quickstart
python train.py --help
"""

import sys

from pconv_jax import cli

if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]], program="train.py")
