"""Every setting of an experiment: its type, default, range and meaning, once.

`Settings` is a tree of frozen dataclasses. Validation, the command line, its help and
the comparison of two experiments are all derived from its fields. The defaults are the
recipe of the paper (Liu et al. 2018, sections 3 and 4).
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pconv_jax._errors import UserError
from pconv_jax.runs.fields import Field, Paths, build, fields_of, flatten, nest, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network; see `pconv_jax.PConvUNet`."""

    depth: int = setting(
        8,
        "Number of encoder stages; image_size must be a multiple of 2**depth.",
        within="[1, 16]",
    )
    width: int = setting(64, "Features of the first stage.", within="[1, inf)")
    conv: Literal["partial", "standard"] = setting(
        "partial",
        "Kind of convolution; standard is the paper's baseline.",
    )
    normalization: Literal["imagenet"] | None = setting(
        None, "Normalization of images inside the network."
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Type of the convolutions, VGG's too. JAX_DEFAULT_MATMUL_PRECISION sets what "
        "float32 means on NVIDIA GPUs (TF32 by default).",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images."""

    source: Literal["bundled", "folder", "tar", "tfds"] = setting(
        "bundled", "Where images come from; bundled means scikit-image's photos."
    )
    path: Paths | None = setting(
        None, "The folder of images, or one or several tar files.", resumable=True
    )
    validation_path: Paths | None = setting(
        None,
        "Like path, for validation. None holds out a fraction of path.",
        resumable=True,
    )
    validation_fraction: float = setting(
        0.05, "Fraction of the images of path that is held out.", within="(0, 1)"
    )
    name: str | None = setting(None, "Name of the TFDS data set.")
    data_dir: str | None = setting(
        None,
        "Folder of TFDS data sets. None is ~/tensorflow_datasets.",
        resumable=True,
    )
    feature: str | None = setting(
        None, "Image feature of the TFDS data set. None finds it, if there is only one."
    )
    train_split: str = setting("train", "TFDS split to train on.")
    validation_split: str = setting("validation", "TFDS split to validate on.")
    workers: int = setting(
        0,
        "Worker processes that read images; 0 reads in threads.",
        within="[0, inf)",
        resumable=True,
    )
    cache: Literal["none", "device"] = setting(
        "none",
        "Where decoded images are kept: nowhere, or all of them in the memory of every "
        "device, which crops them in the step.",
    )
    cache_side: int = setting(
        320,
        "Shorter side of images in the cache, in pixels; larger ones are shrunk.",
        within="[1, inf)",
    )
    color_jitter: float = setting(
        0.0,
        "Largest relative change of brightness, contrast and saturation of a crop.",
        within="[0, 1)",
    )
    scale: tuple[float, float] = setting(
        (0.5, 1.0),
        "Range of the side of a random square crop over the image's shorter side.",
        within="(0, 1]",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """The holes that are trained on."""

    folder: str | None = setting(
        None, "Folder of mask images. None draws masks, see pconv_jax.random_mask."
    )
    hole_color: Literal["white", "black"] = setting(
        "white", "Color of the holes in mask images."
    )
    kind: Literal[
        "strokes",
        "blobs",
        "rectangles",
        "mixed",
        "ragged",
        "lines",
        "text",
        "dots",
        "thin",
        "wide",
    ] = setting("mixed", "Kind of hole that is drawn.")
    thin: float = setting(
        0.0,
        "Fraction of the drawn masks that are of kind thin instead, with 0.5 % to 10 % "
        "of the pixels.",
        within="[0, 1]",
    )
    wide: float = setting(
        0.0,
        "Fraction of the drawn masks that are of kind wide instead, with 6 % to 36 % "
        "of the pixels.",
        within="[0, 1]",
    )
    hole_ratio: tuple[float, float] = setting(
        (0.01, 0.6),
        "Range of the fraction of the pixels that is hole.",
        within="(0, 1)",
    )
    pool: int = setting(
        0,
        "Number of masks that are drawn before the first step; each example takes one "
        "of them, turned and mirrored at random. Drawing a mask takes hundreds of "
        "short loops, which are slow on accelerators. 0 draws one for every example.",
        within="[0, inf)",
    )
    border: Literal["any", "always", "never"] = setting(
        "any", "Whether holes touch the border of the image."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights of the loss terms, equation 7 of the paper."""

    valid: float = setting(1.0, "Weight of L_valid.", within="[0, inf)")
    hole: float = setting(6.0, "Weight of L_hole.", within="[0, inf)")
    perceptual: float = setting(0.05, "Weight of L_perceptual.", within="[0, inf)")
    style_out: float = setting(120.0, "Weight of L_style_out.", within="[0, inf)")
    style_comp: float = setting(120.0, "Weight of L_style_comp.", within="[0, inf)")
    total_variation: float = setting(0.1, "Weight of L_tv.", within="[0, inf)")
    log_mse: float = setting(
        0.0,
        "Weight of losses.log_mse, not in the paper.",
        within="[0, inf)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """One phase of training."""

    # The paper trains for ten days; open-mmlab's mmagic, which reports results like the
    # paper's, has these numbers of steps.
    steps: int = setting(800_000, "Number of updates.", within="[0, inf)")
    learning_rate: float = setting(2e-4, "Learning rate of Adam.", within="[0, inf)")
    schedule: Literal["constant", "cosine"] = setting(
        "constant",
        "Learning rate over the phase; cosine falls to zero at its end.",
    )
    warmup_steps: int = setting(
        0,
        "Updates at the start over which the learning rate rises linearly.",
        within="[0, inf)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSettings(PhaseSettings):
    """An optional phase before the first: the loss without the terms of the VGG.

    It takes a fraction of the time, and it is not in the paper.
    """

    steps: int = setting(0, "Number of updates.", within="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainSettings(PhaseSettings):
    """The first phase of the paper, with the whole loss."""

    ramp_steps: int = setting(
        0,
        "Updates at the start over which the weights of the perceptual and style "
        "terms rise linearly.",
        within="[0, inf)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuningSettings(PhaseSettings):
    """The second phase: the encoder's batch normalization is frozen."""

    steps: int = setting(
        500_000,
        "Number of updates. A run may be resumed with more, if the learning rate is "
        "constant.",
        within="[0, inf)",
        resumable=True,
    )
    learning_rate: float = setting(5e-5, "Learning rate of Adam.", within="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The weights file that a run writes as it goes, with kernels in float16."""

    minutes: float = setting(
        0.0,
        "Minutes between two writes, in addition to those at the ends of phases; 0 "
        "writes none.",
        within="[0, inf)",
        resumable=True,
    )
    folder: str | None = setting(
        None,
        "Folder of a copy or of the parts. None means the workdir.",
        resumable=True,
    )
    part_mib: float = setting(
        0.0,
        "Size in MiB of the parts that are also written; 0 for none.",
        within="[0, inf)",
        resumable=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of an experiment."""

    seed: int = setting(0, "Seed of all random numbers.", within="[0, 2**32)")
    image_size: int = setting(
        512, "Side of the square crops, in pixels.", within="[8, inf)"
    )
    batch_size: int = setting(
        6, "Number of images of a step, over all devices.", within="[1, inf)"
    )
    accumulate: int = setting(
        1,
        "Parts in which a device computes its share of a batch, to save memory. Batch "
        "normalization sees one part at a time.",
        within="[1, inf)",
    )
    steps_per_call: int = setting(
        1,
        "Updates in one call of the compiled program. More of them save time between "
        "calls, which matters if an update takes milliseconds.",
        within="[1, inf)",
    )
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    masks: MaskSettings = MaskSettings()
    loss: LossSettings = LossSettings()
    vgg: str | None = setting(
        "imagenet",
        "VGG of the perceptual and style terms: imagenet, the path of a weights file, "
        "auto (random weights and a warning where there are none), or none to leave "
        "these terms out.",
    )
    feature_fraction: float = setting(
        1.0,
        "Fraction of a batch on which the perceptual and style terms are computed.",
        within="(0, 1]",
    )
    average_decay: float = setting(
        0.0,
        "Decay of a moving average of the weights, which is then evaluated and saved; "
        "0 for none, as in the paper.",
        within="[0, 1)",
    )
    minutes: float = setting(
        0.0,
        "Minutes that the steps may take: before the first step, the pace is measured, "
        "and the numbers of steps of all phases are scaled to fit. Validation, images "
        "and checkpoints take additional time. 0 keeps the numbers of steps.",
        within="[0, inf)",
    )
    clip_norm: float = setting(
        0.0,
        "Largest norm of the gradient, which is scaled down to it; 0 for no limit, as "
        "in the paper.",
        within="[0, inf)",
    )
    weight_decay: float = setting(
        0.0,
        "Decay of the kernels, as in AdamW; 0 for none, as in the paper.",
        within="[0, inf)",
    )
    pixels: PixelSettings = PixelSettings()
    phase1: MainSettings = MainSettings()
    phase2: FineTuningSettings = FineTuningSettings()
    init_from: str | None = setting(
        None, "Weights to start from: another run's workdir, or a weights file."
    )
    export: ExportSettings = ExportSettings()
    log_every: int = setting(
        100, "Steps between two lines of the log.", within="[1, inf)", resumable=True
    )
    picture_every: int = setting(
        5_000,
        "Steps between two image grids, in addition to those at the ends of phases; 0 "
        "for none at all.",
        within="[0, inf)",
        resumable=True,
    )
    validate_every: int = setting(
        10_000,
        "Steps between two validations, in addition to those at the ends of phases; 0 "
        "for none at all.",
        within="[0, inf)",
        resumable=True,
    )
    validation_examples: int = setting(
        20,
        "Validation examples of each hole bin, with and without holes at the border.",
        within="[1, inf)",
    )
    checkpoint_every: int = setting(
        2_000, "Steps between two checkpoints.", within="[1, inf)", resumable=True
    )
    keep_checkpoints: int = setting(
        3,
        "How many of the newest checkpoints to keep; the best one is kept as well.",
        within="[1, inf)",
        resumable=True,
    )
    evaluation_examples: int = setting(
        100,
        "Like validation_examples, for pconv eval.",
        within="[1, inf)",
        resumable=True,
    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read and check settings.

        Args:
          values: Nested values by name, of all settings. The word ``"none"`` is None
            where None is allowed, as on the command line.

        Raises:
          UserError: If fields are unknown, missing or have a wrong type; the message
            names all of them. If a value is out of range; it names the first.
        """
        given = flatten(values)
        problems = [f"{name} is unknown" for name in given if name not in FIELDS]
        problems += [f"{name} is missing" for name in FIELDS if name not in given]
        converted = {}
        for name in FIELDS.keys() & given.keys():
            try:
                converted[name] = FIELDS[name].convert(given[name])
            except TypeError as error:
                problems.append(f"{name} {error}")
        if problems:
            raise UserError("config: " + "; ".join(sorted(problems)) + ".")
        for name, field in FIELDS.items():
            if problem := field.problem(converted[name]):
                raise UserError(f"config: {name} {problem}.")
        settings = build(cls, nest(converted))
        settings._check_together()
        return settings

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read the settings of a run, also of one that an older version started.

        Args:
          values: What `to_dict` gave, and JSON gave back.

        Raises:
          UserError: As `from_dict`.
        """
        return cls.from_dict(_upgrade(values))

    def to_dict(self) -> dict[str, Any]:
        """Convert the settings to nested values by name, which JSON can hold."""
        return dataclasses.asdict(self)

    def _check_together(self) -> None:
        self._check_vgg()
        self._check_masks()
        self._check_steps()
        self._check_size()

    def _check_vgg(self) -> None:
        is_path = self.vgg and pathlib.PurePath(self.vgg).suffix
        if self.vgg not in ("imagenet", "auto", None) and not is_path:
            raise UserError(
                "config: vgg must be imagenet, auto, none or the path of a weights "
                f"file, got {self.vgg!r}."
            )

    def _check_masks(self) -> None:
        masks = self.masks
        if masks.border == "never" and not masks.folder:
            self._check_room(masks.hole_ratio[1])
        if self.data.cache == "device" and masks.folder:
            raise UserError(
                "config: masks.folder is read by the host, and data.cache = 'device' "
                "draws masks on the device: leave one of them out."
            )
        if masks.pool and masks.folder:
            raise UserError(
                "config: masks.folder holds masks, and masks.pool is a number of masks "
                "to draw: leave one of them out."
            )
        if (sum_ := masks.thin + masks.wide) > 1:
            raise UserError(
                f"config: masks.thin + masks.wide must be 1 at most, got {sum_:g}."
            )

    def _check_room(self, largest: float) -> None:
        """Check that the largest hole fits where it does not touch the border."""
        from pconv_jax.masks import inner_pixels  # JAX takes long to import.

        size = self.image_size
        room = inner_pixels((size, size)) / size**2
        if largest > room:
            raise UserError(
                f"config: masks.hole_ratio reaches {largest}, but with masks.border = "
                f"'never' there is room for {room:.3f} of the pixels."
            )

    def _check_steps(self) -> None:
        steps = [name for name in FIELDS if name.endswith((".steps", "_every"))]
        values, calls = flatten(self.to_dict()), self.steps_per_call
        if broken := [f"{n} = {values[n]}" for n in steps if values[n] % calls]:
            raise UserError(
                f"config: {', '.join(broken)} must be multiples of steps_per_call = "
                f"{calls}: a call is never interrupted."
            )

    def _check_size(self) -> None:
        step = 2**self.model.depth
        if self.image_size % step:
            from pconv_jax.unet import suggest_sizes  # Flax takes long to import.

            sizes = suggest_sizes(self.image_size, step)
            raise UserError(
                f"config: image_size = {self.image_size} cannot be halved "
                f"model.depth = {self.model.depth} times: use {sizes}, or a smaller "
                "depth."
            )


def suggest_field(name: str) -> str:
    """Guess which field was meant, as a sentence for an error, or ``""``."""
    close = difflib.get_close_matches(name, FIELDS, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Find the settings in which two experiments differ.

    Args:
      old: Settings of a run.
      new: Settings to resume it with.

    Returns:
      The old and the new value of each setting that must not change on resume.
    """
    before, after = flatten(old.to_dict()), flatten(new.to_dict())
    fixed = {name for name, field in FIELDS.items() if not field.resumable}
    if old.phase2.schedule != "constant" or old.minutes:
        fixed.add("phase2.steps")  # Every learning rate depends on it.
    return {
        name: (before[name], after[name])
        for name in FIELDS
        if name in fixed and before[name] != after[name]
    }


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the settings of an older version's run to today's names and values."""
    flat = flatten(values)
    if "masks.hole" in flat:
        flat["masks.hole_color"] = flat.pop("masks.hole")
    for name in ("data.path", "data.validation_path"):
        if flat.get("data.source") == "tar" and isinstance(flat.get(name), str):
            flat[name] = flat[name].split(",")
    for name, field in FIELDS.items():
        value = flat.setdefault(name, field.default)
        if field.optional and value in ("", [""]):
            flat[name] = None
    return nest(flat)


FIELDS: Mapping[str, Field] = {field.name: field for field in fields_of(Settings)}
"""Every setting by its name with dots, in order."""
