# %% [markdown]
# # Training an inpainter on a folder
#
# This does in Python what `pconv train --config folder --config.data.path=DIR` does in
# a terminal. The network, the crops and the number of steps are small, so that it takes
# less than a minute on two CPU cores.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw
from skimage import data

from pconv_jax import Inpainter, save_pretrained, train_and_evaluate
from pconv_jax.runs.config import default_config
from pconv_jax.runs.opening import load_run

# %% [markdown]
# ## Photos
#
# Any folder of images will do, and may have subfolders. This one contains crops of
# photos that come with scikit-image.

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
(folder / "photos").mkdir()
for name, photo in {
    "astronaut": data.astronaut(),
    "cat": data.chelsea(),
    "coffee": data.coffee(),
    "rocket": data.rocket(),
}.items():
    image = Image.fromarray(photo)
    for number, left in enumerate(range(0, image.width - 200, 60)):
        crop = image.crop((left, 40, left + 200, 240))
        crop.save(folder / "photos" / f"{name}-{number}.png")
print(len(list((folder / "photos").iterdir())), "photos")

# %% [markdown]
# ## Settings
#
# `default_config` returns the paper's recipe. The
# [guide to training](../train.md#all-settings) lists all settings. `vgg = None` leaves
# out the perceptual and style terms of the loss, which take most of the time and need a
# trained VGG16. Phase 2, which freezes the batch normalization of the encoder, is left
# out as well.

# %%
config = default_config()
config.data.source = "folder"
config.data.path = (str(folder / "photos"),)
config.image_size = 64
config.batch_size = 8
config.model.depth = 4
config.model.width = 16
config.vgg = None
config.phase1.steps, config.phase1.learning_rate = 120, 2e-3
config.phase2.steps = 0
config.log_every = 40
config.validate_every = config.checkpoint_every = config.picture_every = 120
config.validation_examples = 1

# %% [markdown]
# ## Training
#
# One image in twenty is held out for validation. If you start training again with the
# same workdir, it resumes from the last checkpoint.

# %%
workdir = folder / "run"
summary = train_and_evaluate(config, workdir)
print("finished:", summary["finished"], "at step", summary["step"])
print(f"PSNR of the held-out images: {summary['validation']['psnr']:.1f} dB")

# %% [markdown]
# `metrics.jsonl` has one line per event. A run also writes TensorBoard logs, image
# grids and `summary.json`.

# %%
lines = (workdir / "metrics.jsonl").read_text().splitlines()
records = [json.loads(line) for line in lines]
for record in records:
    if "validation/psnr" in record:
        print("step", record["step"], "l1", round(record["validation/l1"], 2), "%")

# %% [markdown]
# ## The trained network
#
# A weights file contains the network and its weights. `Inpainter`, `pconv inpaint` and
# `pconv eval` read it. `pconv convert run out.safetensors` writes such a file, with a
# description of the run.

# %%
run = load_run(workdir)
weights = folder / "mine.safetensors"
save_pretrained(weights, run.model, run.variables)
inpainter = Inpainter.from_pretrained(weights, detail=False)
photo = Image.fromarray(data.coffee()[60:316, 100:420])
mask = Image.new("L", photo.size)  # White is filled.
draw = ImageDraw.Draw(mask)
draw.line([(20, 30), (180, 120), (300, 150)], fill=255, width=6)
draw.line([(40, 240), (120, 90), (280, 20)], fill=255, width=6)
repaired = inpainter(photo, mask)

figure, axes = plt.subplots(1, 3, figsize=(11, 3))
for axis, image in zip(axes, (photo, mask, repaired)):
    axis.imshow(image, cmap="gray")
    axis.axis("off")
figure.tight_layout()

# %%
temporary.cleanup()
