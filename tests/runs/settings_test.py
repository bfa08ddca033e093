import importlib
import json

import jax.numpy as jnp
import pytest

from pconv_jax.runs import opening, settings
from pconv_jax.train import loop
from tests.helpers import ROOT
from tests.helpers.images import encode, photo, write_tar

EXPERIMENTS = sorted(ROOT.glob("configs/*.py"))


def load(path, *arguments):
    return importlib.import_module(f"configs.{path.stem}").get_config(*arguments)


def test_paper_has_the_numbers_of_the_paper():
    config = settings.default_config()
    assert (config.image_size, config.batch_size) == (512, 6)
    assert (config.model.depth, config.model.width) == (8, 64)
    rates = config.phase1.learning_rate, config.phase2.learning_rate
    assert rates == (2e-4, 5e-5)
    assert config.loss.to_dict() == {
        "valid": 1.0,
        "hole": 6.0,
        "perceptual": 0.05,
        "style_out": 120.0,
        "style_comp": 120.0,
        "total_variation": 0.1,
        "log_mse": 0.0,
    }


@pytest.mark.parametrize(
    "path", [p for p in EXPERIMENTS if p.stem != "release"], ids=lambda path: path.stem
)
def test_every_experiment_is_valid_and_strict_about_vgg(path):
    config = load(path)
    settings.check(config)
    assert config.is_locked
    assert config.vgg == ("auto" if path.stem == "pconv" else "imagenet")
    assert "python train.py --config configs/" in path.read_text()


def test_experiments_are_the_ones_that_are_tested():
    names = {path.stem for path in EXPERIMENTS}
    assert names >= {"pconv", "places2", "imagenet", "celeba_hq", "folder"}


def test_quickstart_and_unknown_variants():
    path = next(path for path in EXPERIMENTS if path.stem == "pconv")
    settings.check(load(path, "quickstart"))
    with pytest.raises(ValueError, match="'paper' and 'quickstart', got 'fast'"):
        load(path, "fast")


def test_the_runs_of_the_release_follow_each_other():
    path = next(path for path in EXPERIMENTS if path.stem == "release")
    before = ""
    for variant in ("coarse", "fine", "longer", "ragged", "wide"):
        config = load(path, variant)
        settings.check(config)
        if variant == "wide":
            widened = "runs/release-widened.safetensors"
            assert f"tools/widen.py {before} {widened}" in path.read_text()
            before = widened
        assert config.is_locked and config.init_from == before
        assert f"configs/release.py:{variant} " in path.read_text()
        before = loop.default_workdir(f"configs/release.py:{variant}")
    with pytest.raises(ValueError, match="coarse, .*, ragged, wide, got 'x'"):
        load(path, "x")


def test_unknown_field_cannot_be_set():
    with pytest.raises(AttributeError, match="batch_sise"):
        settings.default_config().batch_sise = 3


def test_all_wrong_fields_are_named_at_once():
    config = settings.default_config().to_dict()
    config["batch_sise"] = 3
    config["model"]["width"] = "64"
    del config["seed"]
    with pytest.raises(ValueError) as error:
        settings.check(config)
    assert str(error.value) == (
        "config: batch_sise is unknown; model.width must be of type int, got '64'; "
        "seed is missing."
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.source", "web", "data.source must be one of bundled, folder, tar, tfds"),
        ("model.conv", "gated", "model.conv must be one of partial, standard"),
        ("model.dtype", "float16", "model.dtype must be one of float32, bfloat16"),
        ("masks.kind", "stroke", "masks.kind must be one of strokes, "),
        ("masks.hole_ratio", (0.3,), "masks.hole_ratio must be two numbers"),
        ("masks.hole_ratio", (0.6, 0.1), "got .0.6, 0.1."),
        ("data.scale", (0.5, "1"), "data.scale must be two numbers"),
        ("seed", -1, "seed must be in .0, 2..32., got -1"),
        ("masks.hole", "grey", "masks.hole must be one of white, black"),
        ("masks.border", "some", "masks.border must be one of any, always, never"),
        ("log_every", 0, "log_every must be positive, got 0"),
        ("batch_size", -1, "batch_size must be positive, got -1"),
        ("phase1.steps", -1, "phase1.steps must not be negative, got -1"),
        ("average_decay", 1.0, "average_decay must be in .0, 1., got 1.0"),
        ("image_size", 500, "use 256 or 512, or a smaller depth"),
        ("image_size", 100, "use 256, or a smaller depth"),
    ],
)
def test_values_that_make_no_sense(name, value, message):
    config = settings.default_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        settings.check(config)


def test_integers_will_do_for_floats():
    config = settings.default_config().to_dict()
    config["loss"]["hole"] = 6
    settings.check(config)


def test_differences_leave_out_what_may_change_on_the_way():
    old = json.loads(settings.default_config().to_json())
    config = settings.default_config()
    assert settings.differences(old, config.to_dict()) == {}
    config.log_every = 1
    config.phase2.steps = 1
    assert settings.differences(old, config.to_dict()) == {}
    config.model.width = 8
    config.seed = 3
    changes = settings.differences(old, config.to_dict())
    assert changes == {"model.width": (64, 8), "seed": (0, 3)}


def test_model_and_source_of_an_experiment():
    config = settings.default_config()
    config.model.dtype = "bfloat16"
    model = opening.get_model(config)
    assert (model.depth, model.width, model.conv) == (8, 64, "partial")
    assert model.dtype == jnp.bfloat16
    names = [
        {source.name(i) for i in range(len(source))}
        for source in (
            opening.get_source(config, split) for split in ("train", "validation")
        )
    ]
    assert all(names) and not names[0] & names[1]


def test_folder_without_a_path():
    path = next(path for path in EXPERIMENTS if path.stem == "folder")
    with pytest.raises(ValueError, match="path is needed for kind 'folder'"):
        opening.get_source(load(path), "train")


def test_several_tar_files(tmp_path):
    config = settings.default_config()
    config.data.source = "tar"
    for name in ("path", "validation_path"):
        paths = [tmp_path / f"{name}{n}.tar" for n in range(2)]
        for n, path in enumerate(paths):
            write_tar(path, {f"{n}.png": encode(photo())})
        config.data[name] = ",".join(map(str, paths))
    for split in ("train", "validation"):
        assert len(opening.get_source(config, split)) == 2


def test_what_is_held_out_may_not_be_nothing(tmp_path):
    config = settings.default_config()
    config.data.source, config.data.path = "folder", str(tmp_path)
    (tmp_path / "a.png").write_bytes(encode(photo()))
    config.data.validation_fraction = 0.0
    with pytest.raises(ValueError, match=r"validation_fraction must be in .*got 0.0"):
        opening.get_source(config, "train")
