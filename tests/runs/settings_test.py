import importlib
import json

import jax.numpy as jnp
import pytest

from pconv_jax import UserError, masks
from pconv_jax.runs import opening
from pconv_jax.runs.config import (
    default_config,
    default_workdir,
    load_config,
    read_settings,
)
from pconv_jax.runs.settings import FIELDS, Settings, differences
from tests.helpers import ROOT
from tests.helpers.images import encode, photo, write_tar

EXPERIMENTS = sorted(ROOT.glob("configs/*.py"))


def load(path, *arguments):
    return importlib.import_module(f"configs.{path.stem}").get_config(*arguments)


def test_paper_has_the_numbers_of_the_paper():
    config = default_config()
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
    read_settings(config)
    assert config.is_locked
    assert config.vgg == ("auto" if path.stem == "pconv" else "imagenet")
    assert "python train.py --config configs/" in path.read_text()


def test_experiments_are_the_ones_that_are_tested():
    names = {path.stem for path in EXPERIMENTS}
    assert names >= {"pconv", "places2", "imagenet", "celeba_hq", "folder"}


def test_quickstart_and_unknown_variants():
    path = next(path for path in EXPERIMENTS if path.stem == "pconv")
    read_settings(load(path, "quickstart"))
    with pytest.raises(ValueError, match="'paper' and 'quickstart', got 'fast'"):
        load(path, "fast")


def test_the_runs_of_the_release_follow_each_other():
    path = next(path for path in EXPERIMENTS if path.stem == "release")
    before = None
    for variant in ("coarse", "fine", "longer", "ragged", "wide"):
        config = load(path, variant)
        read_settings(config)
        if variant == "wide":
            widened = "runs/release-widened.safetensors"
            assert f"tools/widen.py {before} {widened}" in path.read_text()
            before = widened
        assert config.is_locked and config.init_from == before
        assert f"configs/release.py:{variant} " in path.read_text()
        before = default_workdir(f"configs/release.py:{variant}")
    with pytest.raises(ValueError, match="coarse, .*, ragged, wide, got 'x'"):
        load(path, "x")


def test_unknown_field_cannot_be_set():
    with pytest.raises(AttributeError, match="batch_sise"):
        default_config().batch_sise = 3


def test_all_wrong_fields_are_named_at_once():
    config = default_config().to_dict()
    config["batch_sise"] = 3
    config["model"]["width"] = "64"
    del config["seed"]
    with pytest.raises(ValueError) as error:
        read_settings(config)
    assert str(error.value) == (
        "config: batch_sise is unknown; model.width must be an integer, got '64'; "
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
        ("seed", -1, r"seed must be an integer in \[0, 2\*\*32\), got -1"),
        ("masks.hole_color", "gray", "masks.hole_color must be one of white, black"),
        ("masks.border", "some", "masks.border must be one of any, always, never"),
        ("log_every", 0, r"log_every must be an integer in \[1, inf\), got 0"),
        ("batch_size", -1, r"batch_size must be an integer in \[1, inf\), got -1"),
        ("phase1.steps", -1, r"phase1.steps must be an integer in \[0, inf\), got -1"),
        ("phase1.learning_rate", -1.0, r"must be a number in \[0, inf\), got -1.0"),
        ("loss.hole", float("nan"), r"loss.hole must be a number in .*, got nan"),
        ("loss.valid", float("inf"), r"loss.valid must be a number in .*, got inf"),
        ("data.validation_fraction", 7.0, r"must be a number in \(0, 1\), got 7.0"),
        ("data.workers", -3, r"data.workers must be an integer in \[0, inf\), got -3"),
        ("masks.hole_ratio", (0.0, 0.5), r"must be two numbers in \(0, 1\)"),
        (
            "vgg",
            "nonsense",
            "vgg must be imagenet, auto, none or the path of .*nonsense",
        ),
        ("average_decay", 1.0, r"average_decay must be a number in \[0, 1\), got 1.0"),
        ("image_size", 500, "use 256 or 512, or a smaller depth"),
        ("image_size", 4, r"image_size must be an integer in \[8, inf\), got 4"),
        ("image_size", 100, "use 256, or a smaller depth"),
        ("image_size", 2**1024, "image_size must be an integer"),
        ("data.scale", (0.5, 10**400), "data.scale must be two numbers"),
    ],
)
def test_values_that_make_no_sense(name, value, message):
    config = default_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=message):
        read_settings(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name, field in FIELDS.items() if field.optional),
        ("data.path", ("",)),
        ("data.path", ["a.tar", ""]),
    ],
)
def test_an_empty_text_is_not_none(name, value):
    config = default_config()
    config.update_from_flattened_dict({name: value})
    message = f"config: {name} must not be empty, got .*; use None, or none"
    with pytest.raises(UserError, match=message):
        read_settings(config)


@pytest.mark.parametrize("value", ["a.tar", ("a.tar",), ["a.tar"]])
def test_one_path_may_be_a_text(value):
    config = default_config()
    config.data.path = config.data.validation_path = value
    data = read_settings(config).data
    assert data.path == data.validation_path == ("a.tar",)
    config.data.path = None
    assert read_settings(config).data.path is None


def test_holes_that_have_no_room_without_the_border():
    config = default_config()
    config.masks.border = "never"
    read_settings(config)
    config.masks.hole_ratio = (0.01, 0.7)
    with pytest.raises(ValueError, match="reaches 0.7, .* there is room for 0.648"):
        read_settings(config)
    config.masks.folder = "masks"  # Whose masks are not drawn.
    read_settings(config)


def test_integers_will_do_for_floats():
    config = default_config().to_dict()
    config["loss"]["hole"] = 7
    hole = read_settings(config).loss.hole
    assert hole == 7.0 and isinstance(hole, float)


def test_differences_leave_out_what_may_change_on_the_way():
    config = default_config()
    old = Settings.from_json(json.loads(config.to_json()))
    assert differences(old, read_settings(config)) == {}
    config.log_every = 1
    config.phase2.steps = 1
    assert differences(old, read_settings(config)) == {}
    config.model.width = 8
    config.seed = 3
    changes = differences(old, read_settings(config))
    assert changes == {"seed": (0, 3), "model.width": (64, 8)}


def test_a_cosine_fixes_the_length_of_the_second_phase():
    config = default_config()
    config.phase2.schedule = "cosine"
    old = read_settings(config)
    config.phase2.steps = 7
    assert differences(old, read_settings(config)) == {"phase2.steps": (500_000, 7)}


def test_settings_that_exclude_each_other():
    config = default_config()
    config.masks.thin = config.masks.wide = 0.6
    with pytest.raises(
        UserError, match=r"thin \+ masks.wide must be 1 at most, got 1.2"
    ):
        read_settings(config)
    config.masks.wide = 0.4
    config.data.cache, config.masks.folder = "device", "masks"
    with pytest.raises(UserError, match="masks.folder is read by the host, and data.c"):
        read_settings(config)
    config.data.cache, config.masks.pool = "none", 8
    with pytest.raises(UserError, match="masks.pool is a number of masks to draw: lea"):
        read_settings(config)


def test_steps_that_are_not_whole_calls():
    config = default_config()
    config.steps_per_call, config.log_every, config.phase1.steps = 8, 20, 804
    with pytest.raises(
        UserError, match="phase1.steps = 804, log_every = 20 must be mu"
    ):
        read_settings(config)
    config.log_every, config.phase1.steps = 16, 800
    read_settings(config)


def test_a_config_and_the_settings_say_the_same():
    assert read_settings(default_config()) == Settings()
    assert default_config().to_dict() == Settings().to_dict()
    assert (
        Settings.from_json(json.loads(json.dumps(Settings().to_dict()))) == Settings()
    )


def test_settings_of_older_versions():
    """As config.json and checkpoints held them, with '' for None."""
    old = json.loads(default_config().to_json())
    old["masks"]["hole"] = "black"
    del old["masks"]["hole_color"]
    old["data"] |= dict.fromkeys(("validation_path", "name", "data_dir", "feature"), "")
    old["data"] |= {"source": "tar", "path": "a.tar,b.tar"}
    old["masks"]["folder"] = old["init_from"] = ""
    old["model"]["normalization"] = old["vgg"] = "none"
    settings = Settings.from_json(old)
    assert settings.masks.hole_color == "black" and settings.masks.folder is None
    assert settings.data.path == ("a.tar", "b.tar")
    assert settings.data.validation_path is settings.data.name is None
    assert settings.model.normalization is settings.vgg is settings.init_from is None
    old["data"] |= {"source": "folder", "path": "a,b"}
    assert Settings.from_json(old).data.path == ("a,b",)


def test_every_field_is_described_and_its_default_allowed():
    for name, field in FIELDS.items():
        assert field.description.endswith(".") and field.type_name, name
        assert field.convert(field.default) == field.default, name
        assert field.problem(field.default) is None, name
    assert FIELDS["masks.kind"].choices == masks.KINDS
    resumable = {name for name, field in FIELDS.items() if field.resumable}
    assert resumable == {
        "checkpoint_every",
        "data.data_dir",
        "data.path",
        "data.validation_path",
        "data.workers",
        "evaluation_examples",
        "export.folder",
        "export.minutes",
        "export.part_mib",
        "keep_checkpoints",
        "log_every",
        "phase2.steps",
        "picture_every",
        "validate_every",
    }


def test_model_and_source_of_an_experiment():
    config = default_config()
    config.model.dtype = "bfloat16"
    settings = read_settings(config)
    model = opening.get_model(settings.model)
    assert (model.depth, model.width, model.conv) == (8, 64, "partial")
    assert model.dtype == jnp.bfloat16
    names = [
        {source.name(i) for i in range(len(source))}
        for source in (
            opening.get_source(settings.data, split)
            for split in ("train", "validation")
        )
    ]
    assert all(names) and not names[0] & names[1]


def test_folder_without_a_path():
    path = next(path for path in EXPERIMENTS if path.stem == "folder")
    with pytest.raises(ValueError, match="data.path is needed for data.source=folder"):
        opening.get_source(read_settings(load(path)).data, "train")


def test_several_tar_files(tmp_path):
    config = default_config()
    config.data.source = "tar"
    for name in ("path", "validation_path"):
        paths = [tmp_path / f"{name}{n}.tar" for n in range(2)]
        for n, path in enumerate(paths):
            write_tar(path, {f"{n}.png": encode(photo())})
        config.data[name] = tuple(map(str, paths))
    for split in ("train", "validation"):
        assert len(opening.get_source(read_settings(config).data, split)) == 2


def test_what_is_held_out_may_not_be_nothing(tmp_path):
    config = default_config()
    config.data.source, config.data.path = "folder", (str(tmp_path),)
    (tmp_path / "a.png").write_bytes(encode(photo()))
    config.data.validation_fraction = 0.0
    with pytest.raises(ValueError, match=r"validation_fraction must be .*got 0.0"):
        read_settings(config)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "a.py:x",
            "def get_config():\n    pass",
            "get_config.. of .* takes no arg",
        ),
        ("a.py", "def get_config(kind):\n    pass", "get_config.. of .* needs an arg"),
        ("a.py", "def get_config():\n    pass", "return a ConfigDict, got NoneType"),
        ("a.py", "def get_config():\n    return {}", "return a ConfigDict, got dict"),
        ("a.py", "", "a.py defines no get_config"),
        ("a.yaml", "a: 1", "--config must be a .py file, got .*a.yaml"),
        ("b.py", None, "b.py"),
    ],
)
def test_config_files_that_are_none(name, content, problem, tmp_path):
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(UserError, match=problem):
        load_config(str(tmp_path / name))


def test_a_bug_in_a_config_file_keeps_its_traceback(tmp_path):
    (tmp_path / "a.py").write_text("def get_config():\n    return 1 + None")
    with pytest.raises(TypeError, match="unsupported operand"):
        load_config(str(tmp_path / "a.py"))
