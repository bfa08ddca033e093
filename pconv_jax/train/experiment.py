"""Everything that training needs, opened once from the settings."""

import dataclasses
import functools
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from pconv_jax import losses, vgg
from pconv_jax._errors import UserError
from pconv_jax.data import device_cache, pipeline
from pconv_jax.data.base import ImageSource, digest_names
from pconv_jax.data.device_cache import DeviceCache
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.runs import opening, parallel
from pconv_jax.runs.inference import Batch, Metrics
from pconv_jax.runs.settings import DataSettings, MaskSettings, Settings
from pconv_jax.train import optim
from pconv_jax.train.mask_sampling import choose_mask, draw_pool, mask_sampler
from pconv_jax.train.phases import Phase, get_phases
from pconv_jax.train.step import (
    CROP,
    Scales,
    TrainState,
    create_state,
    example_keys,
    scan_updates,
    train_step,
)
from pconv_jax.unet import PConvUNet
from pconv_jax.weights.formats.arrays import checksum, flatten
from pconv_jax.weights.network_config import model_config
from pconv_jax.weights.vgg import load_vgg_params

_logger = logging.getLogger(__name__)

CompiledCall = Callable[
    [TrainState, Sequence[Mapping[str, np.ndarray]], Sequence[Scales]],
    tuple[TrainState, list[Metrics]],
]
"""Makes several updates, given a batch and `Scales` for each; see `compile_step`."""


class Features(NamedTuple):
    """The network of the perceptual and style terms.

    Attributes:
      params: Its parameters, on every device.
      apply: The function of these parameters and images.
    """

    params: vgg.Params
    apply: vgg.ApplyFeatures


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that training needs, opened from the settings.

    Attributes:
      settings: The settings.
      model: The network.
      train_source: The images to train on.
      validation_source: The images to validate on.
      features: The network of the perceptual and style terms, or None to leave these
        terms out, or if no phase has them.
      mask_folder: The mask images to train on, or None to draw masks.
      cache: The images to train on, on every device, or None to read them from files.
      mask_pool: Masks to choose from, bool ``[P, S, S, 1]``, on every device, or None
        to draw one for every example.
      phases: The phases of training, in order. Some may be empty.
      identity: What a checkpoint must agree with to be resumed, JSON-able.
      warnings: Warnings for the log and the summary.
    """

    settings: Settings
    model: PConvUNet
    train_source: ImageSource
    validation_source: ImageSource
    mask_folder: MaskFolder | None
    features: Features | None
    cache: DeviceCache | None
    mask_pool: jax.Array | None
    phases: tuple[Phase, ...]
    identity: dict[str, Any]
    warnings: list[str]

    def optimizer(self, phase: Phase) -> optax.GradientTransformation:
        """Make the optimizer of a phase."""
        frozen = self.model.encoder_norms if phase.freeze_encoder_norm else ()
        return optim.make_optimizer(
            phase.learning_rate,
            frozen=frozen,
            clip_norm=self.settings.clip_norm,
            weight_decay=self.settings.weight_decay,
        )

    def create_state(self) -> TrainState:
        """Make the state before the first step."""
        return create_state(
            jax.random.key(self.settings.seed),
            model=self.model,
            optimizer=self.optimizer(self.phases[0]),
            image_size=self.settings.image_size,
            average=self.settings.average_decay > 0,
        )

    def compile_step(self, phase: Phase) -> CompiledCall:
        """Compile the call of a phase, which makes ``steps_per_call`` updates.

        Returns:
          A function ``(state, batches, scales) -> (state, scalars)`` of lists with the
          batch and the `Scales` of each update. It returns the scalars of each update.
          The state is donated: the one passed in is gone after the call.
        """
        settings = self.settings
        features = self.features if phase.use_features else None
        update = functools.partial(
            train_step,
            model=self.model,
            optimizer=self.optimizer(phase),
            apply_features=features and features.apply,
            loss_weights=losses.LossWeights(**dataclasses.asdict(settings.loss)),
            color_jitter=settings.data.color_jitter,
            feature_fraction=settings.feature_fraction,
            freeze_encoder_norm=phase.freeze_encoder_norm,
            accumulate=settings.accumulate,
            average_decay=settings.average_decay,
        )

        def updates(state, batches, extra, *, axis_name=None):
            params, cache, pool, scales = extra
            draw_mask = mask_sampler(settings.masks, settings.image_size)
            if pool is not None:
                draw_mask = functools.partial(choose_mask, pool=pool)

            def one(state, inputs):
                batch, scales = inputs
                if cache is not None:
                    batch = self._crop(cache, batch)
                return update(
                    state,
                    batch,
                    params,
                    scales=scales,
                    draw_mask=draw_mask,
                    axis_name=axis_name,
                )

            return scan_updates(one, state, (batches, scales))

        compiled = parallel.compile_train_step(updates, batch_axis=1)
        params = features and features.params

        def call(state, batches, scales):
            extra = params, self.cache, self.mask_pool, _stack(scales)
            return compiled(state, _stack(batches), extra)

        return call

    def _crop(self, cache: DeviceCache, batch: Batch) -> Batch:
        """Make a batch of images from one of indices."""
        crop = functools.partial(
            device_cache.random_crop,
            cache=cache,
            size=self.settings.image_size,
            scale=self.settings.data.scale,
        )
        keys = example_keys(batch["seed"], CROP)
        images = jax.vmap(crop)(keys, index=batch["index"])
        return {"image": images, "seed": batch["seed"]}

    def open_batches(
        self, start_step: int
    ) -> pipeline.TrainBatches | device_cache.IndexBatches:
        """Open this process's share of the batches from a step on."""
        settings = self.settings
        if self.cache is not None:
            return device_cache.IndexBatches(
                len(self.cache.sizes),
                batch_size=settings.batch_size,
                seed=settings.seed,
                start_step=start_step,
                process_index=parallel.process_index(),
                process_count=parallel.process_count(),
            )
        return pipeline.train_batches(
            self.train_source,
            batch_size=settings.batch_size,
            image_size=settings.image_size,
            seed=settings.seed,
            start_step=start_step,
            process_index=parallel.process_index(),
            process_count=parallel.process_count(),
            workers=settings.data.workers,
            scale=settings.data.scale,
            mask_folder=self.mask_folder,
        )


def _stack(trees: Sequence[Any]) -> Any:
    """Join trees of NumPy arrays along a new leading axis."""
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def open_experiment(
    settings: Settings, *, model: PConvUNet | None = None
) -> Experiment:
    """Open the images and weights of an experiment, and build its network.

    Args:
      settings: The settings.
      model: The network, if it is not the one that the settings describe.

    Raises:
      UserError: If images, masks or weights cannot be found, if the batch, or the part
        of it that the VGG sees, cannot be divided among the devices, or if several
        processes open different experiments.
    """
    parallel.check_batch_size(settings.batch_size, parts=settings.accumulate)
    model = model or opening.get_model(settings.model)
    _check_batch_norm(settings, model)
    phases = get_phases(settings)
    warnings: list[str] = []
    # Before the VGG, which may be downloaded: images are missing more often.
    train_source = opening.get_source(settings.data, "train")
    validation_source = opening.get_source(settings.data, "validation")
    features = digest = None
    if any(phase.use_features and phase.start < phase.stop for phase in phases):
        features, digest = _open_features(settings.vgg, model, warnings)
    if features:
        check_feature_fraction(settings)
    mask_folder = open_mask_folder(settings.masks)
    images = identify_images(train_source, validation_source, mask_folder)
    cache, readable = _open_cache(settings.data, train_source, warnings)
    experiment = Experiment(
        settings=settings,
        model=model,
        train_source=train_source,
        validation_source=validation_source,
        mask_folder=mask_folder,
        features=features,
        cache=cache,
        mask_pool=_draw_pool(settings),
        phases=phases,
        identity={
            "network": type(model).__name__,
            "model": model_config(model),
            "features": digest,
            "images": images | readable,
        },
        warnings=warnings,
    )
    _check_processes(experiment)
    return experiment


def open_mask_folder(settings: MaskSettings) -> MaskFolder | None:
    """Open the mask images of an experiment, if it has some.

    Raises:
      UserError: As `MaskFolder`.
    """
    if not settings.folder:
        return None
    return MaskFolder(
        settings.folder,
        hole_color=settings.hole_color,
        hole_ratio=settings.hole_ratio,
    )


def identify_images(
    train_source: ImageSource,
    validation_source: ImageSource,
    mask_folder: MaskFolder | None,
) -> dict[str, Any]:
    """Describe the images and masks of an experiment, wherever they are."""
    sources = {"train": train_source, "validation": validation_source}
    images = {
        name: {"count": len(source), "digest": source.digest()}
        for name, source in sources.items()
    }
    if mask_folder:
        root = os.path.commonpath(path.parent for path in mask_folder.paths)
        names = [path.relative_to(root).as_posix() for path in mask_folder.paths]
        images["masks"] = _identify(names)
    return images


def _identify(names: Sequence[str]) -> dict[str, Any]:
    """Describe images by their names."""
    return {"count": len(names), "digest": digest_names(names)}


def _open_cache(
    settings: DataSettings, source: ImageSource, warnings: list[str]
) -> tuple[DeviceCache | None, dict[str, Any]]:
    """Put the images on every device, if the settings ask for it; also identify them.

    The order of the images in an epoch depends on the number of those that can be read.
    """
    if settings.cache == "none":
        return None, {}
    images, unreadable = device_cache.read_cache(source, side=settings.cache_side)
    if unreadable:
        names = ", ".join(unreadable)
        warnings.append(f"{len(unreadable)} unreadable image(s): {names}")
    left_out = set(unreadable)
    readable = [
        source.key(index)
        for index in range(len(source))
        if source.name(index) not in left_out
    ]
    identity = _identify(readable) | {"count": len(images.sizes)}
    return parallel.replicate(images), {"cached": identity}


def _draw_pool(settings: Settings) -> jax.Array | None:
    """Draw the masks to choose from, if the settings ask for them."""
    if not settings.masks.pool:
        return None
    draw_mask = mask_sampler(settings.masks, settings.image_size)
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    pool = draw_pool(key, draw_mask, count=settings.masks.pool)
    return parallel.replicate(pool)


def check_feature_fraction(settings: Settings) -> None:
    """Check that every part of a batch has a whole number of images for the VGG.

    Otherwise the loss would depend on the number of devices.

    Raises:
      UserError: If it has not; the message suggests the nearest fractions that do.
    """
    devices, fraction = parallel.device_count(), settings.feature_fraction
    images = settings.batch_size // (devices * settings.accumulate)
    seen = fraction * images
    if seen >= 0.999 and abs(seen - round(seen)) < 1e-3:  # Up to rounding.
        return
    counts = sorted({max(1, int(seen)), max(1, math.ceil(seen))})
    fractions = " or ".join(f"{count / images:.6g}" for count in counts)
    raise UserError(
        f"config: feature_fraction = {fraction:g} of batch_size = "
        f"{settings.batch_size}, divided among {devices} device(s) with accumulate = "
        f"{settings.accumulate}, is {seen:g} images of {images}, which must be a "
        f"whole number: use feature_fraction = {fractions}."
    )


def _check_batch_norm(settings: Settings, model: PConvUNet) -> None:
    """Check that the innermost stage has more than one value per channel to average."""
    if parallel.device_count() > 1 or not model.encoder[-1].batch_norm:
        return
    images = settings.batch_size // settings.accumulate
    if images == 1 and settings.image_size == model.size_multiple:
        raise UserError(
            f"config: batch_size = {settings.batch_size} and accumulate = "
            f"{settings.accumulate} leave only one value per channel for the innermost "
            f"batch normalization, at image_size = {settings.image_size} and "
            f"model.depth = {len(model.encoder)}: use a larger batch or image, or a "
            "smaller depth."
        )


def _open_features(
    source: str | None, model: PConvUNet, warnings: list[str]
) -> tuple[Features | None, str | None]:
    """Load the VGG, which computes in the dtype of the network; also digest it."""
    if source is None:
        return None, None
    try:
        params = load_vgg_params("imagenet" if source == "auto" else source)
        digest = checksum(flatten(params))
    except UserError as error:
        if source == "imagenet":
            raise UserError(
                f"{error} To train without it, by the pixel terms alone, set "
                "--config.vgg=none."
            ) from error
        if source != "auto":
            raise
        warning = (
            "The perceptual and style terms use a RANDOM VGG16, which is no substitute "
            f"for a trained one. {error}"
        )
        warnings.append(warning)
        _logger.warning(warning)
        params = jax.jit(vgg.random_params)(jax.random.key(0))
        digest = "random"  # The last bits depend on the machine.
    apply = vgg.apply_features_for(params, dtype=model.dtype)
    return Features(parallel.replicate(params), apply), digest


def _check_processes(experiment: Experiment) -> None:
    """Check that all processes train the same network by the same loss."""
    settings, images = experiment.settings.to_dict(), experiment.identity["images"]
    for name in ("path", "validation_path", "data_dir", "workers"):
        del settings["data"][name]  # Each host may have its own.
    about = json.dumps([settings, experiment.identity])
    digest = np.array([zlib.crc32(about.encode())], np.uint32)
    if any(parallel.gather(digest) != digest):
        raise UserError(
            "the processes of this run differ in the configuration, in the VGG "
            f"features (here: {experiment.identity['features']}), or in the images "
            f"(here: {_format_counts(images)}): start all of them with the same."
        )


def _format_counts(images: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {about['count']}" for name, about in images.items())
