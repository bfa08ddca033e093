import contextlib
import dataclasses
import functools

import cv2
import jax
import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.runs import parallel
from pconv_jax.runs.config import default_config, read_settings
from pconv_jax.train import experiment
from pconv_jax.train.experiment import Features, open_experiment
from pconv_jax.train.step import UNSCALED, Scales

pytestmark = pytest.mark.usefixtures("fast_compilation")

TINY = {
    "image_size": 8,
    "batch_size": 8,
    "model.depth": 1,
    "model.width": 2,
    "masks.kind": "rectangles",
    "vgg": None,
}


def settings(**fields):
    config = default_config()
    config.update_from_flattened_dict(TINY | fields)
    return read_settings(config)


EXTRA = {"gain": np.float32(0.5)}


def features(params, images):
    """Stands in for VGG: the images and their 2 x 2 means."""
    side = images.shape[1] // 2
    small = images.reshape(len(images), side, 2, side, 2, 3).mean((2, 4))
    return params["gain"] * images, params["gain"] * small


def images(folder, count, *, channels=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.integers(0, 256, (24, 24, channels), np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.png"), image)
    return folder


# What processes compare, and what checkpoints keep.


def compared(monkeypatch, opened):
    """Get what a process tells the others of its experiment."""
    told = []

    def gather(digest):
        told.append(digest.item())
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "gather", gather)
        experiment._check_processes(opened)
    (digest,) = told
    return digest


def test_processes_compare_all_that_the_step_depends_on(monkeypatch):
    opened = open_experiment(settings())
    digest = compared(monkeypatch, opened)

    def with_data(**fields):
        data = dataclasses.replace(opened.settings.data, **fields)
        own = dataclasses.replace(opened.settings, data=data)
        return compared(monkeypatch, dataclasses.replace(opened, settings=own))

    places = {"path": ("a",), "validation_path": ("b",), "data_dir": "c", "workers": 1}
    for name, value in places.items():
        assert with_data(**{name: value}) == digest, name
    others = {"color_jitter": 0.1, "scale": (0.9, 1.0), "cache": "device"}
    for name, value in others.items():
        assert with_data(**{name: value}) != digest, name
    cached = {"cached": {"count": 3, "digest": ""}}
    identity = opened.identity | {"images": opened.identity["images"] | cached}
    assert compared(monkeypatch, dataclasses.replace(opened, identity=identity)) != (
        digest
    )


def test_processes_that_differ_say_what_they_have(monkeypatch):
    monkeypatch.setattr(parallel, "gather", lambda x: np.stack([x[0], x[0] + 1]))
    with pytest.raises(UserError, match=r"images \(here: train \d+, validation \d+\)"):
        open_experiment(settings())


def test_cached_images_are_those_that_can_be_read(tmp_path):
    folder = images(tmp_path / "photos", 45)
    fields = {"data.source": "folder", "data.path": (str(folder),)}
    fields |= {"data.cache": "device", "data.cache_side": 16}
    whole = open_experiment(settings(**fields))
    found = whole.identity["images"]
    assert found["cached"] == found["train"]
    identities = [found["cached"]]
    for number in (3, 4):  # One at a time: as many, but others.
        path = whole.train_source.name(number)
        with open(path, "r+b") as file:
            data = file.read()
            file.truncate(0)
        opened = open_experiment(settings(**fields))
        assert opened.identity["images"]["train"] == found["train"]
        identities.append(opened.identity["images"]["cached"])
        assert identities[-1]["count"] == len(opened.cache.sizes)
        with open(path, "wb") as file:
            file.write(data)
    counts = [identity["count"] for identity in identities]
    assert counts == [found["train"]["count"] - n for n in (0, 1, 1)]
    assert len({identity["digest"] for identity in identities}) == 3


def test_masks_are_identified_wherever_they_are(tmp_path):
    def identify(folder):
        opened = open_experiment(settings(**{"masks.folder": str(folder)}))
        return opened.identity["images"]["masks"]

    folder = images(tmp_path / "masks", 3, channels=1)
    identity = identify(folder)
    assert identity["count"] == 3
    folder = folder.rename(tmp_path / "moved")
    assert identify(folder) == identity
    (folder / "00.png").rename(folder / "03.png")
    assert identify(folder) != identity
    assert "masks" not in open_experiment(settings()).identity["images"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_fraction": 0.25}, "is 0.5 images of 2, .*fraction = 0.5"),
        ({"feature_fraction": 0.75}, "is 1.5 images of 2, .*fraction = 0.5 or 1"),
        ({"feature_fraction": 0.5, "accumulate": 2}, "is 0.5 images of 1, .* = 1"),
    ],
)
def test_a_feature_fraction_that_devices_would_round(monkeypatch, fields, message):
    open_experiment(settings(**fields))  # Without a VGG nothing depends on it.
    found = Features(EXTRA, features), "digest"
    monkeypatch.setattr(experiment, "_open_features", lambda *_: found)
    shares = "batch_size = 8, divided among 4 device"
    with pytest.raises(UserError, match=f"{shares}.* {message}.$"):
        open_experiment(settings(**fields))


@pytest.mark.parametrize(
    ("fraction", "batch_size", "accumulate"),
    [(1.0, 8, 2), (0.5, 8, 1), (0.333333, 24, 2), (0.07, 400, 1)],
)
def test_a_feature_fraction_that_is_whole_on_every_device(
    fraction, batch_size, accumulate
):
    fields = {"feature_fraction": fraction, "batch_size": batch_size}
    experiment.check_feature_fraction(settings(**fields, accumulate=accumulate))


# What reaches the training step.


@pytest.fixture
def one_device(monkeypatch):
    """For steps that compile faster, and need not be divided."""
    monkeypatch.setattr(parallel, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "replicate", jax.device_put)


def take_step(scales=UNSCALED, **fields):
    """Make one update by all terms of the loss; returns parameters and scalars."""
    opened = open_experiment(settings(**fields))
    opened = dataclasses.replace(opened, features=Features(EXTRA, features))
    return update(opened, opened.compile_step(opened.phases[1]), scales)


def update(opened, call, scales=UNSCALED):
    scales = Scales(*np.float32(scales))
    state = parallel.replicate(opened.create_state())
    with contextlib.closing(opened.open_batches(0)) as batches:
        state, (scalars,) = call(state, [next(batches)], [scales])
    return jax.device_get((state.params, scalars))


@functools.cache
def usual_step():
    return take_step()


def assert_differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    assert any(not np.array_equal(x, y) for x, y in pairs)


def test_a_step_repeats_itself(one_device):
    jax.tree.map(np.testing.assert_array_equal, take_step(), usual_step())


def test_schedules_reach_the_step(one_device):
    opened = open_experiment(settings())
    opened = dataclasses.replace(opened, features=Features(EXTRA, features))
    call = opened.compile_step(opened.phases[1])
    first = jax.device_get(opened.create_state().params)
    still, scalars = update(opened, call, Scales(learning_rate=0.0))
    jax.tree.map(np.testing.assert_array_equal, still, first)
    moved, same = update(opened, call)
    assert_differ(moved, first)
    jax.tree.map(np.testing.assert_array_equal, scalars, same)
    _, other = update(opened, call, Scales(features=0.5))
    assert other["total"] < scalars["total"]


@pytest.mark.parametrize(
    "fields",
    [
        {"loss.hole": 5.0},
        {"data.color_jitter": 0.2},
        {"data.scale": (0.2, 0.3)},
        {"feature_fraction": 0.5},
        {"accumulate": 2},
        {"clip_norm": 1e-8},
        {"weight_decay": 10.0},
        {"masks.pool": 1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_a_setting_reaches_the_step(one_device, fields):
    assert_differ(take_step(**fields), usual_step())


def test_settings_of_mask_folders_reach_the_step(one_device, tmp_path):
    folder = images(tmp_path / "masks", 4, channels=1)
    usual = {"masks.folder": str(folder), "masks.hole_ratio": (0.01, 0.99)}
    others = {"masks.hole_color": "black"}, {"masks.hole_ratio": (0.01, 0.1)}
    call, found = None, []
    for fields in ({}, *others):
        opened = open_experiment(settings(**usual | fields))
        call = call or opened.compile_step(opened.phases[1])
        found.append(update(opened, call)[1]["hole_ratio"])
    assert len(set(np.round(found, 6))) == 3


def test_the_scale_of_crops_reaches_the_step_on_cached_images(one_device):
    cached = {"data.cache": "device", "data.cache_side": 16}
    other = cached | {"data.scale": (0.2, 0.3)}
    assert_differ(take_step(**cached), take_step(**other))


def test_missing_images_are_reported_before_a_missing_vgg(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_VGG16", str(tmp_path / "none.pth"))
    fields = {"data.source": "folder", "data.path": [str(tmp_path / "none")]}
    with pytest.raises(UserError, match="path must be a folder of images"):
        open_experiment(settings(vgg="imagenet", **fields))
