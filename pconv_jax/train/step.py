"""One step of training, as a pure function of the state and a batch.

A batch is a dict of arrays, as `pconv_jax.data.pipeline` yields them: ``image``, uint8
``[N, H, W, 3]``; and either ``mask``, ``[N, H, W, 1]`` with 1 = valid, or ``seed``,
uint32 ``[N]``, from which the mask of each example is drawn on the device. The result
for an example depends neither on its place in the batch nor on its device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from pconv_jax import losses
from pconv_jax.runs.inference import Batch, DrawMask, Metrics, prepare_batch
from pconv_jax.unet import PConvUNet

# Maps parameters and images to feature maps, e.g. vgg.vgg16_features.
ApplyFeatures = Callable[[Any, jax.Array], Any]


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
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> Any:
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
    def init():
        images = jnp.zeros((2, image_size, image_size, model.out_features))
        variables = model.init(key, images, jnp.ones((*images.shape[:-1], 1)))
        params, stats = variables["params"], variables.get("batch_stats", {})
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
    feature_params: Any,
    *,
    scales: Scales = UNSCALED,
    model: PConvUNet,
    optimizer: optax.GradientTransformation,
    apply_features: ApplyFeatures | None,
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
      feature_params: Parameters of ``apply_features``.
      scales: Factors of this update. By default all are 1.
      model: The network.
      optimizer: The optimizer that made `TrainState.opt_state`.
      apply_features: The network of the perceptual and style terms. None leaves these
        terms out.
      loss_weights: Weights of the loss terms.
      feature_fraction: Part of the images that the perceptual and style terms see, at
        least one: the first of the batch. The default is 1.
      draw_mask: Draws the masks of a batch that has none.
      color_jitter: Largest relative change of brightness, contrast and saturation, see
        `jitter_colors`. The default is 0.
      freeze_encoder_norm: Whether the encoder normalizes by its running statistics, see
        `PConvUNet`.
      accumulate: Number of parts in which the batch is computed, one after the other,
        to save memory. The gradients of the parts are averaged. Batch normalization
        sees one part at a time and updates its running statistics after each.
      average_decay: Decay of `TrainState.average`, if the state has one. It is smaller
        in the first steps, so that the average soon forgets the initial weights.
      axis_name: Name of the mapped axis that divides the batch. None (the default) if
        it is not divided.

    Returns:
      The state after the update, and means over the whole batch: each loss term,
      ``total``, ``gradient_norm`` and ``hole_ratio``.

    Raises:
      ValueError: If ``accumulate`` does not divide the batch.
    """
    model = model.clone(axis_name=axis_name)
    features_fn = apply_features and functools.partial(apply_features, feature_params)
    loss_weights = _scale_features(loss_weights, scales.features)

    def loss_fn(params, batch_stats, images, mask):
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
            weights=loss_weights,
            count=max(1, round(feature_fraction * len(images))),
        )
        scalars = terms | {"hole_ratio": 1 - mask.mean()}
        return scalars["total"], (scalars, updates.get("batch_stats", {}))

    def differentiate(batch_stats, batch):
        images, mask = prepare_batch(batch, draw_mask=draw_mask)
        if color_jitter:
            # Masks are drawn from the same seeds.
            keys = jax.vmap(lambda seed: jax.random.key(~seed))(batch["seed"])
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
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: u * scales.learning_rate, updates)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average:
        decay = jnp.minimum(average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(
            {"params": params, "batch_stats": batch_stats}, average, 1 - decay
        )
    state = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        average=average,
    )
    return state, scalars | {"gradient_norm": optax.tree.norm(grads)}


def jitter_colors(keys: jax.Array, images: jax.Array, *, amount: float) -> jax.Array:
    """Change brightness, contrast and saturation of each image by random factors.

    Args:
      keys: PRNG keys ``[N]``.
      images: ``[N, H, W, 3]`` in [-1, 1].
      amount: Factors are uniform in [1 - amount, 1 + amount].

    Returns:
      ``[N, H, W, 3]`` in [-1, 1].
    """
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=-1))(keys)
    brightness, contrast, saturation = (1 + amount * numbers).T[..., None, None, None]
    images = (images + 1) / 2 * brightness
    # The luma of ITU-R BT.601.
    gray = (images @ jnp.array([0.299, 0.587, 0.114]))[..., None]
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
    part = (x[:count] for x in (output, images, mask))
    terms |= {
        name: term
        for name, term in loss(*part, features_fn=features_fn).items()
        if name not in terms
    }
    means = jax.tree.map(jnp.mean, terms)
    means["total"] = jnp.asarray(
        sum(getattr(weights, n) * x for n, x in means.items() if n != "total")
    )
    return means


def _scale_features(weights: losses.LossWeights, factor: Any) -> losses.LossWeights:
    """Scale the weights of the perceptual and style terms."""
    names = ("perceptual", "style_out", "style_comp")
    return weights._replace(**{n: getattr(weights, n) * factor for n in names})


def _over_parts(function, carry, batch, parts):
    """Apply ``(carry, batch) -> (carry, y)`` to parts of a batch; average y."""
    if parts == 1:
        return function(carry, batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % parts:
        raise ValueError(
            f"accumulate = {parts} must divide the batch of a device, {size}."
        )
    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

    def add(carry, part):
        carry, total = carry
        carry, y = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, y)), None

    first = jax.tree.map(lambda x: x[0], batch)
    _, shapes = jax.eval_shape(function, carry, first)
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)
    (carry, total), _ = lax.scan(add, (carry, zeros), batch)
    return carry, jax.tree.map(lambda y: y / parts, total)
