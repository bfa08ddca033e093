"""One step of training, as a pure function of the state and a batch.

A batch is a dict of arrays, as `pconv_jax.data.pipeline` yields them: ``image``, uint8
``[N, H, W, 3]``; ``mask``, ``[N, H, W, 1]`` with 1 = valid; and ``seed``, uint32
``[N]``, from which all random numbers of an example are drawn on the device, also its
mask if there is none in the batch. The random numbers of an example depend neither on
its place in the batch nor on its device.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pconv_jax import losses, masks, ops, vgg
from pconv_jax.runs.inference import Batch, Metrics, prepare_batch
from pconv_jax.unet import PConvUNet

Carry = TypeVar("Carry")
Y = TypeVar("Y")

# Parameters or statistics: arrays by name, in modules by name.
Tree = Mapping[str, Any]

# Draws a mask [H, W, 1] from a key.
DrawMask = Callable[[jax.Array], jax.Array]

MASK, CROP, COLORS = range(3)
"""What the random numbers of an example are for; see `example_keys`."""


class Scales(NamedTuple):
    """Factors that change from one update to the next.

    Attributes:
      learning_rate: Factor of the optimizer's updates. The default is 1.
      features: Factor of the weights of the perceptual and style terms. The default is
        1.
    """

    learning_rate: jax.Array | np.ndarray | float = 1.0
    features: jax.Array | np.ndarray | float = 1.0


UNSCALED = Scales()


@flax.struct.dataclass
class TrainState:
    """State of training, which a step reads and returns.

    Attributes:
      step: Number of updates so far, int32.
      params: Parameters of the network.
      batch_stats: Running statistics of its batch normalization.
      opt_state: State of the optimizer.
      average: Moving average of ``params`` and ``batch_stats``; empty without one.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: optax.OptState
    average: Tree = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> Tree:
        """Variables of the network for evaluation, the average if there is one."""
        return self.average or {
            "params": self.params,
            "batch_stats": self.batch_stats,
        }


def create_state(
    key: jax.Array,
    *,
    model: PConvUNet,
    optimizer: optax.GradientTransformation,
    image_size: int,
    average: bool = False,
) -> TrainState:
    """Make the state before the first step.

    Args:
      key: PRNG key of the initial weights.
      model: The network.
      optimizer: The optimizer.
      image_size: Side of the square images, in pixels.
      average: Whether the state has a moving average. By default it has none.
    """

    @jax.jit
    def init() -> TrainState:
        # In training, a network gives images like those that it takes.
        shape = (2, image_size, image_size, model.decoder[-1].features)
        images, mask = jnp.zeros(shape), jnp.ones((*shape[:-1], 1))
        variables = model.init(key, images, mask)
        params, stats = variables["params"], dict(variables).get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=stats,
            opt_state=optimizer.init(params),
            average={"params": params, "batch_stats": stats} if average else {},
        )

    return init()


def train_step(
    state: TrainState,
    batch: Batch,
    feature_params: vgg.Params | None,
    *,
    scales: Scales = UNSCALED,
    model: PConvUNet,
    optimizer: optax.GradientTransformation,
    apply_features: vgg.ApplyFeatures | None,
    loss_weights: losses.LossWeights = losses.PAPER_WEIGHTS,
    feature_fraction: float = 1.0,
    draw_mask: DrawMask | None = None,
    color_jitter: float = 0.0,
    freeze_encoder_norm: bool = False,
    accumulate: int = 1,
    average_decay: float = 0.0,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Make one update.

    Args:
      state: The state before the update.
      batch: The batch, see the module; under ``jax.pmap`` this device's part of it.
      feature_params: Parameters of ``apply_features``, or None without it.
      scales: Factors of this update. By default all are 1.
      model: The network.
      optimizer: The optimizer that made `TrainState.opt_state`.
      apply_features: The network of the perceptual and style terms, e.g.
        `vgg.vgg16_features`. None leaves these terms out.
      loss_weights: Weights of the loss terms. The defaults are the paper's.
      feature_fraction: Part of the images that the perceptual and style terms see, at
        least one: the first of each part that is computed at once. The default is 1.
      draw_mask: Draws a mask ``[H, W, 1]`` from a key, for a batch without masks. By
        default the batch must have them.
      color_jitter: Largest relative change of brightness, contrast and saturation, see
        `jitter_colors`. The default is 0.
      freeze_encoder_norm: Whether the encoder normalizes by its running statistics, see
        `PConvUNet`. The default is False.
      accumulate: Number of parts in which the batch is computed, one after the other,
        to save memory. The gradients of the parts are averaged. Batch normalization
        sees one part at a time and updates its running statistics after each. The
        default is 1.
      average_decay: Decay of `TrainState.average`. It is smaller in the first steps, so
        that the average soon forgets the initial weights. The default, 0, is for a
        state without an average.
      axis_name: Name of the mapped axis that divides the batch. None (the default) if
        it is not divided.

    Returns:
      The state after the update, and means over the whole batch: each loss term,
      ``total``, ``gradient_norm`` and ``hole_ratio``.

    Raises:
      ValueError: If ``accumulate`` does not divide the batch, if the batch lacks what
        is computed from, if parameters are missing, or if the state has an average and
        no decay is given, or the reverse.
    """
    if bool(state.average) != bool(average_decay):
        raise ValueError(
            "average_decay must be above 0 for a state with an average, and 0 for one "
            f"without, got {average_decay}."
        )
    features_fn = None
    if apply_features is not None:
        if feature_params is None:
            raise ValueError("feature_params is needed for apply_features, got None.")
        features_fn = functools.partial(apply_features, feature_params)
    loss_fn = functools.partial(
        _compute_loss,
        model=model.clone(axis_name=axis_name),
        freeze_encoder_norm=freeze_encoder_norm,
        features_fn=features_fn,
        weights=_scale_features(loss_weights, scales.features),
        feature_fraction=feature_fraction,
    )

    def differentiate(
        batch_stats: Tree, batch: Batch
    ) -> tuple[Tree, tuple[Tree, Metrics]]:
        images, mask = prepare_batch(add_masks(batch, draw_mask))
        if color_jitter:
            if "seed" not in batch:
                raise ValueError(
                    "batch must have a seed for each example for color_jitter, got "
                    f"{sorted(batch)}."
                )
            keys = example_keys(batch["seed"], COLORS)
            images = jitter_colors(keys, images, amount=color_jitter)
        grads, (scalars, batch_stats) = jax.grad(loss_fn, has_aux=True)(
            state.params, batch_stats, images, mask
        )
        return batch_stats, (grads, scalars)

    batch_stats, (grads, scalars) = _over_parts(
        differentiate, state.batch_stats, batch, accumulate
    )
    if axis_name is not None:
        # Inside pmap the gradients are averaged, not the loss: the mean of a loss over
        # devices has another gradient. The statistics agree already, up to rounding.
        grads, batch_stats, scalars = lax.pmean(
            (grads, batch_stats, scalars), axis_name
        )
    scalars = scalars | {"gradient_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: u * scales.learning_rate, updates)
    params = cast(Tree, optax.apply_updates(state.params, updates))
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        average=_update_average(state, params, batch_stats, decay=average_decay),
    )
    return new_state, scalars


def example_keys(seeds: jax.Array, purpose: int) -> jax.Array:
    """Make a PRNG key for each example, others for each purpose.

    Args:
      seeds: uint32 ``[N]``.
      purpose: `MASK`, `CROP` or `COLORS`.

    Returns:
      Keys ``[N]``.
    """
    keys = jax.vmap(jax.random.key)(seeds)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, purpose)


def add_masks(batch: Batch, draw_mask: DrawMask | None) -> Batch:
    """Draw the masks of a batch if it has none.

    Raises:
      ValueError: If there is no ``draw_mask`` to draw them, or there are no seeds.
    """
    if "mask" in batch:
        return batch
    if draw_mask is None or "seed" not in batch:
        raise ValueError(
            "batch must have a mask, or a seed for each example and a draw_mask, got "
            f"{sorted(batch)} and draw_mask = {draw_mask}."
        )
    masks = jax.vmap(draw_mask)(example_keys(batch["seed"], MASK))
    return {**batch, "mask": masks}


def jitter_colors(keys: jax.Array, images: jax.Array, *, amount: float) -> jax.Array:
    """Change brightness, contrast and saturation of each image by random factors.

    Args:
      keys: PRNG keys ``[N]``.
      images: ``[N, H, W, 3]`` in [-1, 1].
      amount: Factors are uniform in [1 - amount, 1 + amount].

    Returns:
      ``[N, H, W, 3]`` in [-1, 1].
    """
    dtype = images.dtype  # Not x64's default.
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (3,), dtype, -1))(keys)
    brightness, contrast, saturation = (1 + amount * numbers).T[..., None, None, None]
    images = (images + 1) / 2 * brightness
    # The luma of ITU-R BT.601.
    gray = (images @ jnp.array([0.299, 0.587, 0.114], dtype))[..., None]
    mean = gray.mean(axis=(1, 2), keepdims=True)
    images = mean + contrast * (gray + saturation * (images - gray) - mean)
    return 2 * jnp.clip(images, 0, 1) - 1


def scan_updates(
    update: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    state: TrainState,
    inputs: Any,
) -> tuple[TrainState, list[Metrics]]:
    """Make several updates, one after the other, in one program.

    Args:
      update: One of them, ``(state, inputs) -> (state, scalars)``.
      state: The state before the first.
      inputs: Their inputs, along the leading axis of every array.

    Returns:
      The state after the last update, and the scalars of each.
    """
    count = len(jax.tree.leaves(inputs)[0])
    if count == 1:  # A loop would only cost time.
        state, scalars = update(state, jax.tree.map(lambda x: x[0], inputs))
        return state, [scalars]
    state, scalars = lax.scan(update, state, inputs)
    return state, [jax.tree.map(lambda x, i=i: x[i], scalars) for i in range(count)]


def _compute_loss(
    params: Tree,
    batch_stats: Tree,
    images: jax.Array,
    mask: jax.Array,
    *,
    model: PConvUNet,
    freeze_encoder_norm: bool,
    features_fn: losses.FeaturesFn | None,
    weights: losses.LossWeights,
    feature_fraction: float,
) -> tuple[jax.Array, tuple[Metrics, Tree]]:
    """Compute the total loss; also all scalars, and the new running statistics."""
    (output, _), updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        mask,
        train=True,
        freeze_encoder_norm=freeze_encoder_norm,
        mutable=["batch_stats"],
    )
    terms = _mean_terms(
        output,
        images,
        mask,
        features_fn=features_fn,
        weights=weights,
        count=max(1, round(feature_fraction * len(images))),
    )
    scalars = terms | {"hole_ratio": masks.hole_ratio(mask).mean()}
    return terms["total"], (scalars, dict(updates).get("batch_stats", {}))


def _mean_terms(
    output: jax.Array,
    images: jax.Array,
    mask: jax.Array,
    *,
    features_fn: losses.FeaturesFn | None,
    weights: losses.LossWeights,
    count: int,
) -> Metrics:
    """Average the terms of the loss; those of features, over ``count`` images."""
    loss = functools.partial(losses.inpainting_loss, weights=weights)
    if features_fn is None or count >= len(images):
        return jax.tree.map(
            jnp.mean, loss(output, images, mask, features_fn=features_fn)
        )
    terms = loss(output, images, mask, features_fn=None)
    comp = ops.composite(output, images, mask)
    part = (x[:count] for x in (output, comp, images))
    terms |= losses.feature_terms(*part, features_fn=features_fn)
    means = jax.tree.map(jnp.mean, terms)
    means["total"] = jnp.asarray(
        sum(getattr(weights, n) * x for n, x in means.items() if n != "total")
    )
    return means


def _scale_features(
    weights: losses.LossWeights, factor: jax.Array | np.ndarray | float
) -> losses.LossWeights:
    """Scale the weights of the perceptual and style terms."""
    names = ("perceptual", "style_out", "style_comp")
    return weights._replace(**{n: getattr(weights, n) * factor for n in names})


def _update_average(
    state: TrainState,
    params: Tree,
    batch_stats: Tree,
    *,
    decay: float,
) -> Tree:
    """Move the average of a state, if it has one, toward new weights."""
    if not state.average:
        return state.average
    step = state.step.astype(jnp.float32)  # A quotient of integers is x64's default.
    new = {"params": params, "batch_stats": batch_stats}
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return cast(Tree, optax.incremental_update(new, state.average, rate))


def _over_parts(
    function: Callable[[Carry, Batch], tuple[Carry, Y]],
    carry: Carry,
    batch: Batch,
    parts: int,
) -> tuple[Carry, Y]:
    """Apply ``(carry, batch) -> (carry, y)`` to parts of a batch; average y."""
    if parts == 1:
        return function(carry, batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    if parts < 1 or size % parts:
        raise ValueError(
            f"accumulate = {parts} must divide the batch of a device, {size}."
        )
    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def add(carry_and_total: tuple[Carry, Y], part: Batch) -> Any:
        carry, total = carry_and_total
        carry, y = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, y)), None

    first = jax.tree.map(lambda x: x[0], batch)
    _, shapes = jax.eval_shape(function, carry, first)
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)
    (carry, total), _ = lax.scan(add, (carry, zeros), batch)
    return carry, jax.tree.map(lambda y: y / parts, total)
