"""Evaluates a trained network by hole bin, beside what one would use without it.

    python eval.py --workdir runs/pconv-quickstart
    python eval.py --weights places.safetensors --images photos/ --masks nvidia/test/
    python eval.py --workdir runs/a --methods=network,b=runs/b,telea,patchmatch

All methods get the same pictures and masks. Written are report.html, a page to look at;
results.json, results.md, examples.csv; timing.json; pictures.png, worst.png: into
evaluation/ in the workdir, or --out. Started again, it goes on where it stopped.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pconv_jax.evaluate import runner
from pconv_jax.evaluate.baselines import classical
from pconv_jax.runs import settings

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment that says on what to evaluate; by default its own."
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")

_WEIGHTS = flags.DEFINE_string("weights", None, "A release file instead.")

_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.")

_METHODS = flags.DEFINE_list(
    "methods",
    list(runner.DEFAULT_METHODS),
    f"What to compare: 'network'; {', '.join(classical.METHODS)}; NAME=PATH for other "
    "networks, by their workdir or release; 'all' for all but these.",
)

_EXAMPLES = flags.DEFINE_integer("examples", None, "How many of each class of masks.")

_IMAGES = flags.DEFINE_string("images", None, "Folder or tar file of other pictures.")

_MASKS = flags.DEFINE_string("masks", None, "Folder of mask pictures.")

_HOLE = flags.DEFINE_enum(
    "hole", "white", ["white", "black"], "Colour of holes in --masks."
)

_SIZE = flags.DEFINE_integer("image_size", None, "Side of the pictures, in pixels.")

_SEED = flags.DEFINE_integer("seed", 0, "Of the masks and of the intervals.")

_BUDGET = flags.DEFINE_float(
    "time_budget", 60.0, "Seconds that a method other than a network has for a picture."
)

_LEARNED = flags.DEFINE_bool(
    "learned", True, "LPIPS, FID and Inception Score, if their weights can be had."
)

_VGG = flags.DEFINE_string(
    "vgg", None, "Weights of a VGG, for a perceptual distance that needs nothing else."
)

_OUT = flags.DEFINE_string("out", None, "Directory to write to.")


def main(_):
    """Runs the evaluation and prints its tables."""
    try:
        evaluation = runner.evaluate_run(
            _WORKDIR.value,
            weights=_WEIGHTS.value,
            config=_CONFIG.value,
            step=_STEP.value,
            methods=_METHODS.value,
            examples=_EXAMPLES.value,
            images=_IMAGES.value,
            mask_folder=_MASKS.value,
            hole=_HOLE.value,
            image_size=_SIZE.value,
            seed=_SEED.value,
            time_budget=_BUDGET.value,
            learned=_LEARNED.value,
            vgg=_VGG.value,
            out=_OUT.value,
        )
    except (OSError, ValueError) as error:
        logging.debug("", exc_info=True)  # For --verbosity=1.
        sys.exit(f"eval.py: {error}")
    print(evaluation)


if __name__ == "__main__":
    app.run(main, flags_parser=settings.parse_flags)
