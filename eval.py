"""Evaluates a trained network by hole bin, on pictures that it has not seen.

    python eval.py --workdir runs/pconv-quickstart

Writes ``evaluation/`` in the workdir: ``results.json`` and ``pictures.png``.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pconv_jax import config, evaluator

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; by default the one that the workdir belongs to."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; by default the newest.")


def main(_):
    """Runs the evaluation and prints its table."""
    try:
        evaluation = evaluator.evaluate_run(
            _WORKDIR.value, config=_CONFIG.value, step=_STEP.value
        )
    except ValueError as error:
        logging.debug("", exc_info=True)  # For --verbosity=1.
        sys.exit(f"eval.py: {error}")
    print(evaluation)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=config.parse_flags)
