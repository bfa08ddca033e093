"""Evaluates networks and baselines by hole bin: the same as the command ``pconv eval``.

python eval.py --workdir runs/pconv-quickstart
python eval.py --help
"""

import sys

from pconv_jax import cli

if __name__ == "__main__":
    cli.main(["eval", *sys.argv[1:]], program="eval.py")
