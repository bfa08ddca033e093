"""The measured programs in JAX. Each is built from its name and settings."""

import functools
import importlib.metadata
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from benchmarks import cases, inputs
from benchmarks.worker import Program
from pconv_jax import layers, ops, unet


def describe() -> dict[str, Any]:
    """Describe the versions and the device that the programs run on."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind,
    }


def peak_device_memory() -> int | None:
    """Get the peak bytes in use on the device so far; None on CPUs."""
    stats = jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


def build(program: str, *, decoder: str = "taps", **settings: Any) -> Program:
    """Build and compile a program.

    Args:
      program: Its name.
      decoder: Form in which upsampled features are convolved: 'repeated', or 'taps'
        (the package's form, the default).
      **settings: Settings of the program.
    """
    if decoder == "taps":
        return _PROGRAMS[program](**settings)
    with nn.intercept_methods(_repeat_pixels):
        return _PROGRAMS[program](**settings)


def _repeat_pixels(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Give layers repeated pixels instead of `ops.Upsampled`."""
    if isinstance(context.module, layers.PartialConv):
        args = jax.tree.map(
            lambda x: ops.upsample(x.x) if isinstance(x, ops.Upsampled) else x,
            args,
            is_leaf=lambda x: isinstance(x, ops.Upsampled),
        )
    return method(*args, **kwargs)


def _matmul(n: int, dtype: str) -> Program:
    x = jnp.asarray(inputs.normal(n, n), dtype)
    return _compiled(jnp.matmul, x, x)


def _layer(
    conv: str,
    size: int,
    batch: int,
    channels: int,
    features: int,
    backward: bool,
    dtype: str,
) -> Program:
    x = jnp.asarray(inputs.normal(batch, size, size, channels), dtype)
    mask = _draw_mask(batch, size)
    standard = nn.Conv(features, (3, 3), padding=1, dtype=jnp.dtype(dtype))
    partial = layers.PartialConv(features, (3, 3), padding=1, dtype=jnp.dtype(dtype))

    def forward_standard(params, x, mask):
        return standard.apply({"params": params}, x), mask

    def forward_partial(params, x, mask):
        return partial.apply({"params": params}, x, mask)

    forward = {
        "standard": forward_standard,
        "partial": forward_partial,
        "dense": _dense_partial_conv,
    }[conv]
    if conv == "dense":
        mask = jnp.repeat(mask, channels, -1).astype(jnp.float32)
    params = standard.init(jax.random.key(0), x)["params"]
    if not backward:
        return _compiled(forward, params, x, mask)

    def forward_and_backward(params, x, mask, cotangent):
        y, pullback, new_mask = jax.vjp(
            lambda params, x: forward(params, x, mask), params, x, has_aux=True
        )
        return y, new_mask, pullback(cotangent)

    cotangent = jnp.asarray(inputs.normal(batch, size, size, features), dtype)
    return _compiled(forward_and_backward, params, x, mask, cotangent)


def _dense_partial_conv(params, x, mask):
    """Compute a partial convolution as usual, with masks as wide as the features."""
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    kernel = params["kernel"]
    valid = conv(mask, jnp.ones_like(kernel))
    new_mask = jnp.minimum(valid, 1)
    ratio = np.prod(kernel.shape[:-1]) / jnp.maximum(valid, 1) * new_mask
    y = conv(x * mask.astype(x.dtype), kernel.astype(x.dtype)) * ratio.astype(x.dtype)
    return (y + params["bias"].astype(x.dtype)) * new_mask.astype(x.dtype), new_mask


def _inference(
    size: int,
    batch: int,
    dtype: str = "float32",
    depth: int = 8,
    width: int = 64,
    hole_ratio: float = inputs.HOLE_RATIO,
) -> Program:
    model = unet.PConvUNet(depth=depth, width=width, dtype=jnp.dtype(dtype))
    images = jnp.asarray(inputs.images(batch, size))
    mask = _draw_mask(batch, size, hole_ratio)
    variables = jax.jit(model.init)(jax.random.key(0), images, mask)
    return _compiled(
        lambda *args: model.apply(*args)[0],
        variables,
        images,
        mask,
    )


def _stage(stage: int, size: int, batch: int, depth: int, width: int) -> Program:
    """Build one stage of the network, with normalization and activation."""
    channels, features, kernel_size, side = cases.stages(
        size, depth=depth, width=width
    )[stage]
    last = stage == 2 * depth - 1
    conv = layers.PartialConv(
        features,
        (kernel_size,) * 2,
        strides=2 if stage < depth else 1,
        padding=kernel_size // 2,
        use_bias=stage == 0 or last,
    )
    mask = _draw_mask(batch, side)
    if stage < depth:
        x = jnp.asarray(inputs.normal(batch, 2 * side, 2 * side, channels))
        args = x, ops.upsample(mask)
    else:
        small = channels - features
        x = jnp.asarray(inputs.normal(batch, side // 2, side // 2, small))
        skip = jnp.asarray(inputs.normal(batch, side, side, channels - small))
        args = (ops.Upsampled(x), skip), (ops.Upsampled(mask[:, ::2, ::2]), mask)
    variables = jax.jit(conv.init)(jax.random.key(0), *args)
    scale, shift = jnp.asarray(inputs.normal(2, features))

    def forward(variables, args, scale, shift):
        y, mask = conv.apply(variables, *args)
        return (y if last else jax.nn.leaky_relu(y * scale + shift, 0.2)), mask

    return _compiled(forward, variables, args, scale, shift)


def _training(size: int, batch: int, depth: int, width: int, dtype: str):
    """Make a state, a batch, VGG16's parameters and the training step."""
    from pconv_jax import vgg
    from pconv_jax.train import optim
    from pconv_jax.train.step import create_state, train_step

    model = unet.PConvUNet(depth=depth, width=width, dtype=dtype)
    optimizer = optim.make_optimizer(2e-4)
    state = create_state(
        jax.random.key(0), model=model, optimizer=optimizer, image_size=size
    )
    images = {
        "image": np.uint8(inputs.images(batch, size) * 127.5 + 127.5),
        "mask": np.uint8(inputs.mask(batch, size)),
    }
    features = functools.partial(vgg.vgg16_features, dtype=dtype)
    params = jax.jit(vgg.random_params)(jax.random.key(1))
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, apply_features=features
    )
    return state, jax.device_put(images), params, step


def _train(
    size: int, batch: int, depth: int, width: int, dtype: str = "float32"
) -> Program:
    state, data, params, step = _training(size, batch, depth, width, dtype)
    compiled, seconds = _compile(step, state, data, params, donate_argnums=0)

    def call():
        nonlocal state
        state, scalars = compiled(state, data, params)
        jax.block_until_ready((state, scalars))

    return Program(call, seconds)


def _part(
    part: str, size: int, batch: int, depth: int, width: int, dtype: str = "float32"
) -> Program:
    """Build one part of the training step."""
    from pconv_jax import losses
    from pconv_jax.runs.inference import prepare_batch

    state, data, vgg, step = _training(size, batch, depth, width, dtype)
    model, optimizer = step.keywords["model"], step.keywords["optimizer"]
    features = functools.partial(step.keywords["apply_features"], vgg)
    images, mask = prepare_batch(data)
    output = jnp.asarray(inputs.images(batch, size, seed=1))

    def forward(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        (y, _), updates = model.apply(
            variables, images, mask, train=True, mutable=["batch_stats"]
        )
        return y, updates

    def network_gradient(params):
        y, pullback, updates = jax.vjp(forward, params, has_aux=True)
        return y, pullback(output), updates

    def loss_gradient(features_fn, output, images, mask):
        def loss(output):
            terms = losses.inpainting_loss(
                output, images, mask, features_fn=features_fn
            )
            return terms["total"].mean()

        return jax.value_and_grad(loss)(output)

    def update(params, grads, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    params = state.params
    if part == "optimizer":
        # As in the training step, the state is overwritten.
        compiled, seconds = _compile(
            update, params, params, state.opt_state, donate_argnums=2
        )
        opt_state = state.opt_state

        def call():
            nonlocal opt_state
            new_params, opt_state = compiled(params, params, opt_state)
            jax.block_until_ready((new_params, opt_state))

        return Program(call, seconds)
    function, *arguments = {
        "network forward": (forward, params),
        "network forward and backward": (network_gradient, params),
        "VGG16 forward, 3 images": (
            lambda xs: [features(x) for x in xs],
            [output, images, ops.composite(output, images, mask)],
        ),
        # All data are arguments: XLA would compute constants during compilation.
        "loss forward and backward": (
            functools.partial(loss_gradient, features),
            output,
            images,
            mask,
        ),
        "loss without VGG16": (
            functools.partial(loss_gradient, None),
            output,
            images,
            mask,
        ),
    }[part]
    return _compiled(function, *arguments)


def _data(size: int, batch: int, workers: int, count: int) -> Program:
    """Build the input pipeline, which reads half-megapixel JPEG files from a folder."""
    import weakref

    import cv2

    from pconv_jax.data import pipeline, sources

    # Removed at the end of the process.
    folder = tempfile.TemporaryDirectory()
    photos = sources.open_source("bundled", split="train")
    for i in range(32):
        photo = cv2.resize(photos[i % len(photos)], (800, 600))
        cv2.imwrite(f"{folder.name}/{i}.jpg", photo[:, :, ::-1])
    batches = pipeline.train_batches(
        sources.FolderSource(folder.name),
        batch_size=batch,
        image_size=size,
        seed=0,
        workers=workers,
    )
    weakref.finalize(folder, batches.close)

    def call(folder=folder):
        for _ in range(count // batch):
            next(batches)

    return Program(call)


def _masks(size: int, batch: int, count: int) -> Program:
    from pconv_jax import masks

    keys = jax.random.split(jax.random.key(0), batch)
    return _compiled(jax.vmap(lambda key: masks.random_mask(key, (size, size))), keys)


def _start(code: str) -> Program:
    """Build a program that starts Python and runs code."""
    command = [sys.executable, "-c", code]
    return Program(lambda: subprocess.run(command, check=True, capture_output=True))


def _repair(size: int, first: bool, sharp: bool) -> Program:
    """Build a program that repairs a photo by the command, after installation or later.

    Args:
      size: Side of the photo in pixels.
      first: Whether nothing was compiled before.
      sharp: Whether wide holes are filled with pieces, as by default.
    """
    import cv2

    from pconv_jax.data import sources

    folder = tempfile.TemporaryDirectory()  # Removed at the end of the process.
    photo = cv2.resize(sources.open_source("bundled", split="train")[0], (size, size))
    hole = np.zeros((size, size), np.uint8)  # A square and a scratch.
    hole[size // 4 : size // 4 + 6] = 255
    hole[size * 3 // 8 : size * 5 // 8, size * 3 // 8 : size * 5 // 8] = 255
    names = [f"{folder.name}/{name}.png" for name in ("photo", "mask", "repaired")]
    for name, image in zip(names, (photo, hole)):
        cv2.imwrite(name, image)
    command = [sys.executable, "-m", "pconv_jax.cli", "inpaint", "--force"]
    command += ["--image", names[0], "--mask", names[1], "--output", names[2]]
    command += [] if sharp else ["--no-sharp"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("JAX_COMP")}
    numbers = itertools.count()

    def call(folder=folder):
        home = f"{folder.name}/cache-{next(numbers) if first else 0}"
        subprocess.run(
            command,
            env=environment | {"PCONV_CACHE": home},
            check=True,
            capture_output=True,
        )

    return Program(call)


def _draw_mask(
    batch: int, size: int, hole_ratio: float = inputs.HOLE_RATIO
) -> jax.Array:
    """Draw masks as bool, which layers take as they are."""
    return jnp.asarray(inputs.mask(batch, size, hole_ratio), bool)


def _compiled(function: Callable, *args) -> Program:
    compiled, seconds = _compile(function, *args)
    return Program(lambda: jax.block_until_ready(compiled(*args)), seconds)


def _compile(function: Callable, *args, **options):
    start = time.perf_counter()
    compiled = jax.jit(function, **options).lower(*args).compile()
    return compiled, time.perf_counter() - start


_PROGRAMS = {
    "data": _data,
    "inference": _inference,
    "layer": _layer,
    "masks": _masks,
    "matmul": _matmul,
    "part": _part,
    "repair": _repair,
    "stage": _stage,
    "start": _start,
    "train": _train,
}
