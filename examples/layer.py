# %% [markdown]
# # The layer in your own model
#
# A partial convolution takes images *and a mask*, where 1 = valid and 0 = hole. It
# returns features and their mask, in which the holes are smaller. Here a small network
# learns to fill holes in images of sine waves, first in Linen and then in NNX.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

from pconv_jax import PartialConv, composite, partial_conv, random_mask
from pconv_jax import nnx as pconv_nnx

# %% [markdown]
# ## What the layer does
#
# `PartialConv` takes the keyword arguments of `flax.linen.Conv`, with
# [few exceptions](../layer.md#compared-with-other-layers). Values in the hole never
# affect the outputs; here they are NaN. After one layer with a 5 x 5 kernel, the hole
# is 2 pixels narrower on each side.

# %%
images = jnp.ones((1, 16, 16, 3)).at[:, 5:12, 5:12].set(jnp.nan)
mask = jnp.ones((1, 16, 16, 1)).at[:, 5:12, 5:12].set(0)
layer = PartialConv(features=8, kernel_size=(5, 5))
variables = layer.init(jax.random.key(0), images, mask)
outputs, new_mask = layer.apply(variables, images, mask)
print("outputs", outputs.shape, "finite:", bool(jnp.isfinite(outputs).all()))
print("hole pixels:", int((mask == 0).sum()), "->", int((new_mask == 0).sum()))

# %% [markdown]
# ## A model in Linen
#
# Each layer passes its mask to the next. Four layers, with dilation, close the holes.


# %%
class Filler(nn.Module):
    """Four partial convolutions and a head."""

    @nn.compact
    def __call__(self, images, mask):
        x = images
        for dilation in (1, 2, 4, 2):
            x, mask = PartialConv(24, (3, 3), kernel_dilation=dilation)(x, mask)
            x = nn.relu(x)
        return nn.Conv(1, (1, 1))(x)


def draw_waves(key, count):
    """Draw images of sine waves, [count, 32, 32, 1]."""
    angle, phase = jax.random.uniform(key, (2, count, 1, 1)) * 2 * jnp.pi
    y, x = jnp.mgrid[:32, :32] / 4
    return jnp.sin(x * jnp.cos(angle) + y * jnp.sin(angle) + phase)[..., None]


def draw_mask(key):
    """Draw a mask whose holes take 10 to 30 % of the pixels, [32, 32, 1]."""
    return random_mask(key, (32, 32), hole_ratio=(0.1, 0.3), kind="blobs")


def draw_batch(key):
    """Draw 16 images and their masks."""
    image_key, mask_key = jax.random.split(key)
    images = draw_waves(image_key, 16)
    mask_keys = jax.random.split(mask_key, len(images))
    return images, jax.vmap(draw_mask)(mask_keys)


def hole_error(outputs, images, mask):
    """Compute the mean absolute error in the holes."""
    return jnp.sum(jnp.abs(outputs - images) * (1 - mask)) / jnp.sum(1 - mask)


# %% [markdown]
# The loss covers only the holes, so the network cannot just copy its input.

# %%
STEPS = 150
model = Filler()
images, mask = draw_batch(jax.random.key(1))
params = model.init(jax.random.key(2), images, mask)
optimizer = optax.adam(3e-3)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, opt_state, key):
    images, mask = draw_batch(key)

    def loss(params):
        return hole_error(model.apply(params, images, mask), images, mask)

    error, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, error


errors = []
for key in jax.random.split(jax.random.key(3), STEPS):
    params, opt_state, error = train_step(params, opt_state, key)
    errors.append(float(error))
print(f"error in the holes: {errors[0]:.2f} -> {sum(errors[-10:]) / 10:.2f}")

# %%
outputs = model.apply(params, images, mask)
filled = composite(outputs, images, mask)  # Valid pixels stay as they are.
figure, axes = plt.subplots(3, 6, figsize=(9, 4.5))
for i in range(6):
    for axis, image in zip(axes[:, i], (images * mask, filled, images)):
        axis.imshow(image[i, ..., 0], cmap="gray", vmin=-1, vmax=1)
        axis.axis("off")
figure.suptitle("With holes, filled, and the truth")
figure.tight_layout()

# %% [markdown]
# ## A model in NNX
#
# `pconv_jax.nnx` has the same layers for Flax NNX. Here is the same network again.


# %%
class NNXFiller(nnx.Module):
    """The same four partial convolutions and head."""

    def __init__(self, rngs):
        self.convs = nnx.List()
        for channels, dilation in zip((1, 24, 24, 24), (1, 2, 4, 2)):
            conv = pconv_nnx.PartialConv(
                channels, 24, (3, 3), kernel_dilation=dilation, rngs=rngs
            )
            self.convs.append(conv)
        self.head = nnx.Conv(24, 1, (1, 1), rngs=rngs)

    def __call__(self, images, mask):
        x = images
        for conv in self.convs:
            x, mask = conv(x, mask)
            x = nnx.relu(x)
        return self.head(x)


@nnx.jit
def nnx_train_step(model, optimizer, key):
    images, mask = draw_batch(key)

    def loss(model):
        return hole_error(model(images, mask), images, mask)

    error, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return error


nnx_model = NNXFiller(nnx.Rngs(2))
nnx_optimizer = nnx.Optimizer(nnx_model, optax.adam(3e-3), wrt=nnx.Param)
errors = []
for key in jax.random.split(jax.random.key(3), STEPS):
    errors.append(float(nnx_train_step(nnx_model, nnx_optimizer, key)))
print(f"error in the holes: {errors[0]:.2f} -> {sum(errors[-10:]) / 10:.2f}")

# %% [markdown]
# ## Without Flax
#
# `pconv_jax.partial_conv` is a pure function of arrays and a kernel, for Equinox, Haiku
# or plain JAX.

# %%
kernel = jax.random.normal(jax.random.key(4), (3, 3, 1, 24)) / 3
features, new_mask = partial_conv(images, mask, kernel, strides=2, padding=1)
print("features", features.shape, "mask", new_mask.shape)
