# %% [markdown]
# # Repairing photos
#
# The bundled network fills the white area of a mask. All other pixels stay exactly as
# they are.

# %%
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from pconv_jax import Inpainter

photo = Image.fromarray(data.chelsea())
mask = Image.new("L", photo.size)  # Black: nothing is filled yet.
draw = ImageDraw.Draw(mask)
draw.line([(60, 40), (200, 160), (230, 290)], fill=255, width=6)
draw.line([(20, 200), (180, 130), (420, 60)], fill=255, width=5)

# %%
inpainter = Inpainter.from_pretrained()
repaired = inpainter(photo, mask)


def show(*images):
    """Show images beside each other."""
    figure, axes = plt.subplots(1, len(images), figsize=(11, 3))
    for axis, image in zip(axes, images):
        axis.imshow(image, cmap="gray")
        axis.axis("off")
    figure.tight_layout()


show(photo, mask, repaired)

# %% [markdown]
# ## What stays
#
# An inpainter takes Pillow images, arrays or paths, and returns an image of the same
# type. This shows that only the hole has changed.

# %%
before, after = np.asarray(photo), np.asarray(repaired)
hole = np.asarray(mask) > 127
print("changed outside of the hole:", int((before != after)[~hole].sum()))
print("hole:", f"{hole.mean():.1%} of the pixels")

# %% [markdown]
# ## Removing an object
#
# Cover the whole object and a few pixels around it; `dilate` enlarges the hole. If you
# leave parts of the object, such as its shadow, they may be copied into the hole.
# `sharp` fills wide holes with whole pieces of the photo, as `pconv inpaint` does.

# %%
rocket = Image.fromarray(data.rocket())
mast = Image.new("L", rocket.size)
shape = [(194, 116), (204, 116), (220, 398), (164, 398)]
ImageDraw.Draw(mast).polygon(shape, fill=255)
removed = inpainter(rocket, mast, dilate=3, sharp=True)
show(rocket, mast, removed)

# %% [markdown]
# ## With and without detail
#
# The network alone fills holes with smooth colors. By default, a search then copies
# grain and texture from patches of the same photo. Another `seed` gives another result.
# From left to right: without detail, with detail, and with another seed.

# %%
smooth = Inpainter.from_pretrained(detail=False)(photo, mask)
other = inpainter(photo, mask, seed=1)
box = (130, 90, 290, 220)
show(smooth.crop(box), repaired.crop(box), other.crop(box))
