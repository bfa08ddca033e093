import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pconv_jax import losses, masks, metrics, vgg
from pconv_jax.runs import parallel
from pconv_jax.runs.inference import fill_step, prepare_batch, score_step
from pconv_jax.train import optim
from pconv_jax.train.step import (
    COLORS,
    CROP,
    MASK,
    Scales,
    add_masks,
    create_state,
    example_keys,
    jitter_colors,
    scan_updates,
    train_step,
)
from pconv_jax.unet import PConvUNet
from tests.helpers.cases import mostly_slow

pytestmark = pytest.mark.usefixtures("fast_compilation")


SIZE = 16

MODEL = PConvUNet(depth=2, width=4)

OPTIMIZER = optim.make_optimizer(1e-3)


def draw(key):
    """Stands in for masks.random_mask, which takes long to compile."""
    return (jax.random.uniform(key, (SIZE, SIZE, 1)) > 0.3).astype(jnp.float32)


def features(params, images):
    """Stands in for VGG: a map of the images and one of their 2 x 2 means."""
    small = images.reshape(len(images), SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))
    return params["gain"] * images, params["gain"] * small


def make_batch(size=8, *, with_mask=False, number=0):
    rng = np.random.default_rng(number)
    batch = {
        "image": rng.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8),
        "seed": rng.integers(2**32, size=size, dtype=np.uint32),
    }
    if with_mask:
        _, mask = prepare_batch(add_masks(batch, draw))
        batch["mask"] = np.asarray(mask, np.uint8)
    return batch


@functools.cache
def first_state():
    key = jax.random.key(0)
    state = create_state(key, model=MODEL, optimizer=OPTIMIZER, image_size=SIZE)
    return jax.tree.map(np.asarray, state)


def make_state():
    return jax.tree.map(jnp.array, first_state())


def make_step(**options):
    defaults = dict(
        model=MODEL, optimizer=OPTIMIZER, apply_features=features, draw_mask=draw
    )
    return functools.partial(train_step, **(defaults | options))


@functools.cache
def jitted_step():
    """The step of several tests, compiled once for each shape of its batches."""
    return jax.jit(make_step())


EXTRA = {"gain": np.float32(0.5)}


def test_scalars_are_the_terms_of_the_loss_and_the_update_is_adams():
    state, batch = make_state(), make_batch()
    new_state, scalars = jitted_step()(state, batch, EXTRA)

    images, mask = prepare_batch(add_masks(batch, draw))

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (output, _), updates = MODEL.apply(
            variables, images, mask, train=True, mutable=["batch_stats"]
        )
        terms = losses.inpainting_loss(
            output, images, mask, features_fn=lambda x: features(EXTRA, x)
        )
        terms = {name: term.mean() for name, term in terms.items()}
        return terms["total"], (terms, updates["batch_stats"])

    grads, (terms, batch_stats) = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    for name, term in terms.items():
        np.testing.assert_allclose(scalars[name], term, rtol=1e-5, err_msg=name)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(scalars["gradient_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(scalars["hole_ratio"], 1 - mask.mean(), rtol=1e-5)
    chex.assert_trees_all_close(new_state.batch_stats, batch_stats, rtol=1e-4)
    assert new_state.step == 1
    moved = jax.tree.map(
        lambda new, old: jnp.abs(new - old).max(), new_state.params, state.params
    )
    # One step of Adam moves every parameter by the learning rate at most.
    assert all(0 < m <= 1.001e-3 for m in jax.tree.leaves(moved))


@pytest.mark.parametrize("with_mask", mostly_slow([False, True], every=2))
def test_four_devices_do_what_one_does(with_mask):
    assert jax.device_count() == 4
    batch = make_batch(8, with_mask=with_mask)
    one, scalars_one = jitted_step()(make_state(), batch, EXTRA)
    compiled = parallel.compile_train_step(make_step())
    four, scalars_four = compiled(parallel.replicate(make_state()), batch, EXTRA)
    for name in scalars_one:
        np.testing.assert_allclose(scalars_four[name], scalars_one[name], rtol=1e-5)
    chex.assert_trees_all_close(four.batch_stats, one.batch_stats, rtol=0, atol=1e-6)
    # Adam's first step is the learning rate times the gradient's sign, which is hard on
    # gradients near zero: moments are compared instead, and parameters by plain SGD.
    chex.assert_trees_all_close(four.opt_state, one.opt_state, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_four_devices_update_as_one_does_by_gradient_descent():
    step = make_step(optimizer=optax.sgd(0.01))
    batch, state = make_batch(8), make_state().replace(opt_state=optax.EmptyState())
    state = state.replace(opt_state=optax.sgd(0.01).init(state.params))
    one, _ = jax.jit(step)(state, batch, EXTRA)
    compiled = parallel.compile_train_step(step)
    four, _ = compiled(parallel.replicate(state), batch, EXTRA)
    chex.assert_trees_all_close(four.params, one.params, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_average_forgets_the_first_weights_and_follows_the_others():
    state = make_state()
    weights = {"params": state.params, "batch_stats": state.batch_stats}
    expected = average = jax.tree.map(np.zeros_like, weights)
    state = state.replace(average=average)
    step = jax.jit(make_step(average_decay=0.15))
    for decay in (0.1, 0.15):  # min(0.15, (1 + t) / (10 + t))
        state, _ = step(state, make_batch(), EXTRA)
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            expected,
            {"params": state.params, "batch_stats": state.batch_stats},
        )
    chex.assert_trees_all_close(state.average, expected, rtol=1e-5, atol=1e-7)
    assert state.variables is state.average
    assert make_state().variables.keys() == {"params", "batch_stats"}


@pytest.mark.slow
def test_scales_scale_the_update_and_the_terms_of_the_features():
    state, batch = make_state(), make_batch(4)
    step = jax.jit(make_step(optimizer=optax.sgd(0.1)))
    state = state.replace(opt_state=optax.sgd(0.1).init(state.params))
    moves = {}
    for rate in (1.0, 0.25):
        new, _ = step(state, batch, EXTRA, scales=Scales(learning_rate=rate))
        moves[rate] = jax.tree.map(jnp.subtract, new.params, state.params)
    quarter = jax.tree.map(lambda x: 0.25 * x, moves[1.0])
    chex.assert_trees_all_close(moves[0.25], quarter, rtol=1e-2, atol=1e-6)

    _, scalars = step(state, batch, EXTRA, scales=Scales(features=0.5))
    weights = losses.PAPER_WEIGHTS._asdict()
    for name in ("perceptual", "style_out", "style_comp"):
        weights[name] *= 0.5
    total = sum(weights[n] * scalars[n] for n in weights if n in scalars)
    np.testing.assert_allclose(scalars["total"], total, rtol=1e-5)


def test_colors_change_by_the_three_factors_alone():
    keys = jax.random.split(jax.random.key(1), 200)
    # Gray stays gray, and the pixels are dark enough not to be clipped.
    gray, red = np.full(3, 0.5), np.array([0.6, 0.4, 0.4])
    images = jnp.asarray(np.stack([gray, red]).reshape(1, 1, 2, 3) * 2 - 1)
    images = jnp.broadcast_to(images, (200, 1, 2, 3))
    changed = (np.asarray(jitter_colors(keys, images, amount=0.2)) + 1) / 2
    gray, red = changed[:, 0, 0], changed[:, 0, 1]
    np.testing.assert_allclose(gray, gray[:, :1].repeat(3, 1), atol=1e-6)
    spread = red[:, 0] - red[:, 1]  # 0.2 times all three factors.
    assert 0.2 * 0.8**3 <= spread.min() and spread.max() <= 0.2 * 1.2**3
    np.testing.assert_allclose(red[:, 1], red[:, 2], atol=1e-6)
    luma = np.array([0.299, 0.587, 0.114])
    mean = (gray @ luma + red @ luma) / 2  # Contrast and saturation keep it.
    brightness = mean / ((0.5 + np.array([0.6, 0.4, 0.4]) @ luma) / 2)
    assert 0.8 <= brightness.min() < 0.83 and 1.17 < brightness.max() <= 1.2001
    same = jitter_colors(keys, images, amount=0.0)
    np.testing.assert_allclose(same, images, atol=1e-6)


@pytest.mark.slow
def test_feature_terms_of_a_part_of_the_batch():
    state, batch = make_state(), make_batch(4)
    step = jax.jit(make_step(feature_fraction=0.5, optimizer=optax.sgd(0.0)))
    state = state.replace(opt_state=optax.sgd(0.0).init(state.params))
    _, scalars = step(state, batch, EXTRA)
    images, mask = prepare_batch(add_masks(batch, draw))

    @jax.jit
    def loss(params, images, mask):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (output, _), _ = MODEL.apply(
            variables, images, mask, train=True, mutable=["batch_stats"]
        )
        return losses.inpainting_loss(
            output, images, mask, features_fn=lambda x: features(EXTRA, x)
        )

    terms = loss(state.params, images, mask)
    seen = {"perceptual": 2, "style_out": 2, "style_comp": 2}
    for name in terms.keys() - {"total"}:
        expected = terms[name][: seen.get(name, 4)].mean()
        np.testing.assert_allclose(scalars[name], expected, rtol=1e-4, err_msg=name)
    weights = losses.PAPER_WEIGHTS._asdict()
    total = sum(weights[n] * scalars[n] for n in weights if n in scalars)
    np.testing.assert_allclose(scalars["total"], total, rtol=1e-5)


@pytest.mark.slow
def test_several_updates_of_a_call_are_those_of_several_calls():
    batches = [make_batch(4, number=n) for n in range(3)]
    scales = [Scales(np.float32(rate), np.float32(0.5)) for rate in (1, 0.5, 0.1)]
    step = make_step(optimizer=optax.sgd(0.01))
    first = make_state().replace(opt_state=optax.sgd(0.01).init(make_state().params))
    expected, terms = first, []
    one = jax.jit(step)
    for batch, scale in zip(batches, scales):
        expected, scalars = one(expected, batch, EXTRA, scales=scale)
        terms.append(scalars)

    def update(state, inputs):
        return step(state, inputs[0], EXTRA, scales=inputs[1])

    stacked = jax.tree.map(lambda *x: np.stack(x), *zip(batches, scales))
    state, scalars = jax.jit(lambda *x: scan_updates(update, *x))(first, stacked)
    assert state.step == 3 and len(scalars) == 3
    chex.assert_trees_all_close(scalars, terms, rtol=1e-4)
    chex.assert_trees_all_close(state.params, expected.params, rtol=0, atol=1e-6)


def test_order_in_the_batch_does_not_matter():
    order = np.array([2, 0, 3, 1, 6, 7, 5, 4])
    batch = make_batch(8)
    shuffled = {name: x[order] for name, x in batch.items()}
    step = jitted_step()
    _, a = step(make_state(), batch, EXTRA)
    _, b = step(make_state(), shuffled, EXTRA)
    chex.assert_trees_all_close(a, b, rtol=1e-4)
    _, mask = prepare_batch(add_masks(batch, draw))
    _, shuffled_mask = prepare_batch(add_masks(shuffled, draw))
    np.testing.assert_array_equal(mask[order], shuffled_mask)


def test_random_numbers_of_an_example_differ_by_their_purpose():
    seeds = np.array([0, 1, 2**32 - 1], np.uint32)
    keys = [example_keys(seeds, purpose) for purpose in (MASK, CROP, COLORS)]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == 9


def test_a_batch_without_masks_needs_seeds_and_a_function_that_draws():
    batch = make_batch(4)
    with pytest.raises(ValueError, match="batch must have a mask, .* draw_mask = None"):
        add_masks(batch, None)
    with pytest.raises(ValueError, match=r"got \['image'\]"):
        add_masks({"image": batch["image"]}, draw)
    with pytest.raises(ValueError, match="feature_params is needed"):
        make_step()(make_state(), batch, None)


@pytest.mark.slow
def test_dtypes_stay_the_same_where_64_bits_are_the_default():
    step = jax.jit(make_step(average_decay=0.9, color_jitter=0.1, accumulate=2))
    state = make_state()
    weights = {"params": state.params, "batch_stats": state.batch_stats}
    state = state.replace(average=weights)
    with jax.enable_x64(True):
        after, scalars = step(state, make_batch(4), EXTRA)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert all(x.dtype == jnp.float32 for x in scalars.values())


def test_steps_are_traced_once():
    chex.clear_trace_counter()
    training_step = make_step()

    @chex.assert_max_traces(n=1)
    def step(*arguments):
        return training_step(*arguments)

    step = jax.jit(step)
    state = make_state()
    for _ in range(3):
        state, _ = step(state, make_batch(4), EXTRA)
    assert state.step == 3


@pytest.mark.slow
def test_mapped_steps_are_traced_once():
    traces = []

    def step(*arguments, axis_name=None):
        traces.append(axis_name)
        return make_step()(*arguments, axis_name=axis_name)

    compiled = parallel.compile_train_step(step)
    state = parallel.replicate(make_state())
    for _ in range(3):
        state, _ = compiled(state, make_batch(4), EXTRA)
    assert traces == [parallel.AXIS]


def test_second_phase_leaves_the_encoders_normalization_alone():
    frozen = MODEL.encoder_norms
    assert frozen == ("bn2",)
    state = make_state()
    optimizer = optim.make_optimizer(1e-2, frozen=frozen)
    step = jax.jit(make_step(optimizer=optimizer, freeze_encoder_norm=True))
    new_state, _ = step(state, make_batch(4), EXTRA)
    for name in state.batch_stats:
        same = [
            np.array_equal(a, b)
            for tree in ("params", "batch_stats")
            for a, b in zip(
                jax.tree.leaves(getattr(state, tree)[name]),
                jax.tree.leaves(getattr(new_state, tree)[name]),
            )
        ]
        assert all(same) if name in frozen else not any(same), name


def test_no_feature_terms_without_features():
    _, scalars = jax.jit(make_step(apply_features=None))(
        make_state(), make_batch(4), None
    )
    assert "perceptual" not in scalars and "style_out" not in scalars
    weights = losses.PAPER_WEIGHTS
    total = (
        weights.valid * scalars["valid"]
        + weights.hole * scalars["hole"]
        + weights.total_variation * scalars["total_variation"]
    )
    np.testing.assert_allclose(scalars["total"], total, rtol=1e-6)


def test_fill_step_gives_images_as_they_are_saved():
    state, batch = make_state(), make_batch(4, with_mask=True)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    step = parallel.compile_eval_step(functools.partial(fill_step, model=MODEL))
    filled = step(variables, batch)
    output, _ = jax.jit(MODEL.apply)(variables, *prepare_batch(batch))
    expected = (np.clip(output, -1, 1) + 1) * 127.5
    assert filled["output"].dtype == np.uint8 and filled["finite"].all()
    assert np.abs(filled["output"] - expected).max() < 0.501
    variables["params"]["pconv4"]["bias"] = np.array([0, np.inf, 0], np.float32)
    assert not step(variables, batch)["finite"].any()


def test_score_step_scores_the_composite_and_the_output():
    batch = make_batch(4, with_mask=True)
    rng = np.random.default_rng(1)
    batch["output"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
    scores = jax.jit(score_step)(batch)
    mask, truth, output = batch["mask"], batch["image"] / 255, batch["output"] / 255
    comp = np.where(mask == 1, truth, output)
    truth, output, comp = (np.float32(x) for x in (truth, output, comp))
    expected = {
        "l1": np.abs(comp - truth).mean((1, 2, 3)),
        "psnr": metrics.psnr(comp, truth),
        "ssim": metrics.ssim(comp, truth),
        "output_l1": np.abs(output - truth).mean((1, 2, 3)),
        "output_psnr": metrics.psnr(output, truth),
        "output_ssim": metrics.ssim(output, truth),
        "hole_ratio": masks.hole_ratio(mask),
    }
    # All errors of the composite lie in the hole.
    expected["l1_hole"] = expected["l1"] / expected["hole_ratio"]
    chex.assert_trees_all_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_images_are_scaled_to_the_ends_of_the_range():
    image = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)
    mask = np.array([1, 0, 1], np.uint8).reshape(1, 1, 3, 1)
    images, mask = prepare_batch({"image": image, "mask": mask})
    np.testing.assert_allclose(images.ravel(), [-1, -0.6, 1], rtol=1e-6)
    np.testing.assert_array_equal(mask.ravel(), [1.0, 0.0, 1.0])


@pytest.mark.slow
def test_parts_of_a_batch_give_its_gradient():
    stages = [
        [stage._replace(batch_norm=False) for stage in side]
        for side in (MODEL.encoder, MODEL.decoder)
    ]
    model = PConvUNet(stages=stages)
    optimizer = optax.sgd(0.1)
    state = create_state(
        jax.random.key(0), model=model, optimizer=optimizer, image_size=SIZE
    )
    step = make_step(model=model, optimizer=optimizer)
    whole, scalars = jax.jit(step)(state, make_batch(8), EXTRA)
    step = functools.partial(step, accumulate=4)
    parts, part_scalars = jax.jit(step)(state, make_batch(8), EXTRA)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(part_scalars, scalars, rtol=1e-5)
    assert parts.step == 1


@pytest.mark.slow
def test_parts_of_a_batch_are_normalized_one_after_the_other():
    batch, step = make_batch(8), make_step(optimizer=optax.sgd(0.0))
    state = make_state().replace(opt_state=optax.sgd(0.0).init(make_state().params))
    parts, _ = jax.jit(functools.partial(step, accumulate=2))(state, batch, EXTRA)
    step = jax.jit(step)
    expected, _ = step(state, {n: x[:4] for n, x in batch.items()}, EXTRA)
    expected, _ = step(expected, {n: x[4:] for n, x in batch.items()}, EXTRA)
    chex.assert_trees_all_close(parts.batch_stats, expected.batch_stats, rtol=1e-5)


def test_a_batch_that_cannot_be_divided_into_parts():
    with pytest.raises(ValueError, match="accumulate = 3 must divide .* a device, 4"):
        make_step(accumulate=3)(make_state(), make_batch(4), EXTRA)
    with pytest.raises(ValueError, match="accumulate = 0 must divide .* a device, 4"):
        make_step(accumulate=0)(make_state(), make_batch(4), EXTRA)


def test_what_a_step_needs_must_be_there():
    state, batch = make_state(), make_batch(4, with_mask=True)
    with pytest.raises(ValueError, match="0 for one without, got 0.9"):
        make_step(average_decay=0.9)(state, batch, EXTRA)
    averaged = state.replace(average=state.variables)
    with pytest.raises(ValueError, match="above 0 for a state with an average, .* 0.0"):
        make_step()(averaged, batch, EXTRA)
    without_seeds = {name: x for name, x in batch.items() if name != "seed"}
    with pytest.raises(ValueError, match="a seed for each example for color_jitter"):
        make_step(color_jitter=0.1)(state, without_seeds, EXTRA)
    floats = batch | {"image": batch["image"] / np.float32(127.5) - 1}
    with pytest.raises(ValueError, match="image must be uint8, got float32"):
        make_step()(state, floats, EXTRA)


BFLOAT16 = MODEL.clone(dtype=jnp.bfloat16)


@pytest.mark.slow
def test_losses_in_bfloat16_are_those_in_float32():
    params = vgg.random_params(jax.random.key(0))
    state, batch = make_state(), make_batch(8)

    def scalars(model):
        apply_features = functools.partial(vgg.vgg16_features, dtype=model.dtype)
        step = jax.jit(make_step(model=model, apply_features=apply_features))
        return step(state, batch, params)[1]

    full, half = scalars(MODEL), scalars(BFLOAT16)
    assert all(x.dtype == jnp.float32 for x in half.values())
    # The gradient is of those of all layers, each rounded to 8 bits.
    for name in full.keys() - {"gradient_norm"}:
        np.testing.assert_allclose(half[name], full[name], rtol=0.01, err_msg=name)
    np.testing.assert_allclose(half["gradient_norm"], full["gradient_norm"], rtol=0.05)


@pytest.mark.slow
def test_training_in_bfloat16_follows_that_in_float32():
    def train(model):
        step, state = jax.jit(make_step(model=model)), make_state()
        losses = []
        for number in range(200):
            batch = make_batch(4) | {"seed": np.arange(4, dtype=np.uint32) + 4 * number}
            state, scalars = step(state, batch, EXTRA)
            losses.append(float(scalars["total"]))
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state.params))
        return np.array(losses)

    full, half = train(MODEL), train(BFLOAT16)
    assert half[-20:].mean() < 0.5 * half[:5].mean()
    np.testing.assert_allclose(half[-50:].mean(), full[-50:].mean(), rtol=0.05)
