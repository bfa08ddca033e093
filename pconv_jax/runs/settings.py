"""Every field of an experiment, with the paper's values.

An experiment file (configs/) starts from `default_config` and changes what it has to.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from pconv_jax import masks
from pconv_jax.unet import suggest_sizes

# Fields that may differ from what a run was started with when it goes on: they do not
# change what is computed, but for where it ends.
RESUMABLE = (
    "checkpoint_every",
    "data.workers",
    "evaluation_examples",
    "keep_checkpoints",
    "log_every",
    "phase2.steps",
    "picture_every",
    "validate_every",
)


def default_config() -> ConfigDict:
    """Returns the paper's recipe (Liu et al. 2018, sections 3 and 4), locked."""
    config = ConfigDict()
    config.seed = 0
    config.image_size = 512
    config.batch_size = 6  # Of all devices together.
    # Parts that a device's share is computed in, to save memory; batch normalization
    # then sees a part at a time.
    config.accumulate = 1

    config.model = ConfigDict()
    config.model.depth = 8  # Encoder stages; image_size is a multiple of 2**depth.
    config.model.width = 64  # Features of the first stage.
    config.model.conv = "partial"  # Or 'standard', what the paper compares with.
    config.model.normalization = "none"  # Of images, inside; or 'imagenet'.
    # Of convolutions, VGG's too; or 'bfloat16'. What JAX takes for float32 on NVIDIA's
    # GPUs, TF32, is set by JAX_DEFAULT_MATMUL_PRECISION.
    config.model.dtype = "float32"

    config.data = ConfigDict()
    config.data.source = "bundled"  # Or 'folder', 'tar', 'tfds'.
    config.data.path = ""  # Of the folder or the tar file(s, comma-separated).
    config.data.validation_path = ""  # Without one, a part of path is held out.
    config.data.validation_fraction = 0.05  # That part.
    config.data.name = ""  # Of the TFDS data set.
    config.data.data_dir = ""  # Of TFDS; '' is its default.
    config.data.feature = ""  # Which one is the picture, if there are several.
    config.data.train_split = "train"
    config.data.validation_split = "validation"
    config.data.workers = 0  # Processes that read pictures; 0 reads in threads.
    # Side of the random square crops, in parts of the picture's shorter side.
    config.data.scale = (0.5, 1.0)

    config.masks = ConfigDict()
    config.masks.folder = ""  # Of mask pictures; without one, masks are drawn.
    config.masks.hole = "white"  # The colour of holes in them: 'white' or 'black'.
    config.masks.kind = "mixed"  # What is drawn: see masks.random_mask.
    config.masks.hole_ratio = (0.01, 0.6)
    config.masks.border = "any"  # May holes touch the border? 'any', 'always', 'never'.

    config.loss = ConfigDict()  # Weights of the terms, equation 7.
    config.loss.valid = 1.0
    config.loss.hole = 6.0
    config.loss.perceptual = 0.05
    config.loss.style_out = 120.0
    config.loss.style_comp = 120.0
    config.loss.total_variation = 0.1
    config.loss.log_mse = 0.0  # Not the paper's: see losses.log_mse.
    # Of the perceptual and style terms: 'imagenet', a file, 'auto' (random weights and
    # a warning if there are none to be had), or 'none' to leave these terms out.
    config.vgg = "imagenet"

    # Of a moving average of the weights, which is then what is evaluated and released;
    # 0 for none, as in the paper.
    config.average_decay = 0.0
    # The paper trains until nothing improves, for ten days; open-mmlab's mmagic, which
    # reports results like the paper's, has these numbers of steps.
    config.phase1 = ConfigDict()
    config.phase1.steps = 800_000
    config.phase1.learning_rate = 2e-4
    config.phase2 = ConfigDict()  # With the encoder's batch normalization frozen.
    config.phase2.steps = 500_000
    config.phase2.learning_rate = 5e-5
    # Weights to start from: the newest of a run, by its workdir; or a release file, see
    # pconv_jax.weights.pretrained, of the same network.
    config.init_from = ""

    config.log_every = 100
    config.picture_every = 5_000
    config.validate_every = 10_000
    config.validation_examples = 20  # Of each hole bin, with and without border.
    config.checkpoint_every = 2_000
    config.keep_checkpoints = 3  # The newest ones; the best one is kept besides.
    config.evaluation_examples = 100  # The same for eval.py.
    return config.lock()


def check(config: Mapping[str, Any]) -> None:
    """Checks the fields of an experiment.

    Raises:
      ValueError: naming every field that is unknown, missing or of the wrong type, or
        the first whose value makes no sense.
    """
    known, given = flatten(default_config()), flatten(config)
    problems = [f"{name} is unknown" for name in given if name not in known]
    problems += [f"{name} is missing" for name in known if name not in given]
    for name in known.keys() & given.keys():
        if not _same_type(known[name], given[name]):
            expected = type(known[name]).__name__
            problems.append(f"{name} must be of type {expected}, got {given[name]!r}")
    if problems:
        raise ValueError("config: " + "; ".join(sorted(problems)) + ".")
    positive = [n for n in known if n.endswith(("_every", "_size", "_examples"))]
    positive += ["accumulate", "keep_checkpoints", "model.depth", "model.width"]
    for name in positive:
        if given[name] < 1:
            raise ValueError(f"config: {name} must be positive, got {given[name]}.")
    for name in ("phase1.steps", "phase2.steps"):
        if given[name] < 0:
            raise ValueError(f"config: {name} must not be negative, got {given[name]}.")
    if not 0 <= given["average_decay"] < 1:
        raise ValueError(
            f"config: average_decay must be in [0, 1), got {given['average_decay']}."
        )
    if not 0 <= given["seed"] < 2**32:
        raise ValueError(f"config: seed must be in [0, 2**32), got {given['seed']}.")
    for name in ("data.scale", "masks.hole_ratio"):
        if not _is_range(given[name]):
            raise ValueError(
                f"config: {name} must be two numbers, 0 <= low <= high <= 1, got "
                f"{given[name]}."
            )
    for name, choices in {
        "data.source": ("bundled", "folder", "tar", "tfds"),
        "masks.border": ("any", "always", "never"),
        "masks.hole": ("white", "black"),
        "masks.kind": masks.KINDS,
        "model.conv": ("partial", "standard"),
        "model.dtype": ("float32", "bfloat16"),
        "model.normalization": ("none", "imagenet"),
    }.items():
        if given[name] not in choices:
            raise ValueError(
                f"config: {name} must be one of {', '.join(choices)}, got "
                f"{given[name]!r}."
            )
    step = 2 ** given["model.depth"]
    if given["image_size"] % step:
        sizes = suggest_sizes(given["image_size"], step)
        raise ValueError(
            f"config: image_size = {given['image_size']} cannot be halved "
            f"model.depth = {given['model.depth']} times: use {sizes}, or a smaller "
            "depth."
        )


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``{'data.path': ..., ...}``, with sequences as tuples."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns the fields, but those of `RESUMABLE`, in which two experiments differ."""
    old, new = flatten(old), flatten(new)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if name not in RESUMABLE and old.get(name) != new.get(name)
    }


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line for `absl.app.run`; a mistake ends in a sentence."""
    try:
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            raise ValueError(f"unknown arguments: {' '.join(rest[1:])}")
        if flags.FLAGS.config is not None:
            flags.FLAGS.config.keys()  # If it could not be loaded, it says so now.
        return rest
    except (AttributeError, KeyError, OSError, TypeError, ValueError, flags.Error) as e:
        # ml_collections puts its whole traceback, or another error, into some messages.
        message = str(e).strip().splitlines()[-1].strip()
        if isinstance(e, AttributeError):
            message = message.strip("'").replace("\\'", "'").replace("\\n", ". ")
        sys.exit(f"{pathlib.Path(argv[0]).name}: {message}")


def _is_range(values: tuple[Any, ...]) -> bool:
    numbers = [v for v in values if _same_type(0.0, v)]
    return len(values) == len(numbers) == 2 and 0 <= values[0] <= values[1] <= 1


def _same_type(expected: Any, value: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(expected)
