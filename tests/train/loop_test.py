import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import cv2
import jax
import numpy as np
import pytest

from pconv_jax import RunError, UserError, _processes, cli, vgg
from pconv_jax.evaluate import runner
from pconv_jax.runs import opening, parallel
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.runs.config import default_config, default_workdir, read_settings
from pconv_jax.train import experiment, export, hooks, loop, restore
from pconv_jax.train.loggers import MetricWriter
from pconv_jax.unet import IMAGENET, PConvUNet
from pconv_jax.weights import hub
from pconv_jax.weights import vgg as vgg_weights
from tests.helpers import ROOT
from tests.helpers.commands import training_environment

pytestmark = pytest.mark.usefixtures("fast_compilation")


_PACE = "train/images_per_second"

TINY = {
    "image_size": 16,
    "batch_size": 4,
    "model.depth": 2,
    "model.width": 4,
    "masks.kind": "rectangles",
    "vgg": None,
    "phase1.steps": 4,
    "phase2.steps": 2,
    "log_every": 1,
    "picture_every": 3,
    "validate_every": 3,
    "validation_examples": 2,
    "evaluation_examples": 2,
    "checkpoint_every": 2,
}


def tiny(**fields):
    config = default_config()
    config.update_from_flattened_dict(TINY | fields)
    return config


def read_checkpoint(workdir, step=None):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step, items, _ = checkpoints.restore(
            ("params", "batch_stats", "opt_state", "average"), step=step
        )
    return step, items


def read_meta(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore([])[2]


def read_metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_validation(workdir):
    """Returns the lines of validation, without the time of day."""
    lines = [line for line in read_metrics(workdir) if "validation/psnr" in line]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def best_step(workdir):
    with Checkpoints(workdir / "checkpoints", best_metric="psnr") as checkpoints:
        return checkpoints.best_step()


def assert_same_checkpoint(a, b):
    (step, items), (other_step, other_items) = read_checkpoint(a), read_checkpoint(b)
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, items, other_items)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of both phases, and its summary."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, loop.train_and_evaluate(tiny(), workdir)


def test_a_run_leaves_what_it_promises(finished):
    workdir, summary = finished
    assert summary["step"] == 6 and summary["finished"] and not summary["warnings"]
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert len(summary["table"]) == 13
    assert "50%-60%  yes" in loop.format_summary(summary, workdir)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        tiny().to_json()
    )
    pictures = sorted(path.name for path in (workdir / "pictures").iterdir())
    # Every third step, and where a phase ends.
    assert pictures == [f"validation_{step:07d}.png" for step in (3, 4, 6)]
    grid = cv2.imread(str(workdir / "pictures" / pictures[0]))
    assert grid.shape[1] == 4 * 16 + 3 * 2
    assert list((workdir / "tensorboard").iterdir())
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert len(steps) >= 3 and steps[-1] == 6


def test_a_run_logs_every_term_once_a_step(finished):
    workdir, summary = finished
    lines = read_metrics(workdir)
    train = [line for line in lines if "train/total" in line]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    terms = {"total", "valid", "hole", "total_variation", "gradient_norm", "hole_ratio"}
    expected = {"step", "time"} | {f"train/{t}" for t in terms | {"learning_rate"}}
    # The first step of a phase takes as long as it takes to compile.
    paces = [set(line) - expected for line in train if expected <= set(line)]
    pace = {"train/images_per_second"}
    assert paces == [set(), pace, pace, pace, set(), pace]
    rates = [line["train/learning_rate"] for line in train]
    assert rates == [2e-4] * 4 + [5e-5] * 2
    validation = [line for line in lines if "validation/psnr" in line]
    assert [line["step"] for line in validation] == [3, 4, 6]
    assert validation[-1]["validation/psnr"] == summary["validation"]["psnr"]


def test_second_phase_starts_by_itself(finished):
    workdir, _ = finished
    _, before = read_checkpoint(workdir, 4)
    _, after = read_checkpoint(workdir, 6)
    for tree in ("params", "batch_stats"):
        # The encoder's normalization is frozen, the decoder's is not.
        jax.tree.map(
            np.testing.assert_array_equal, before[tree]["bn2"], after[tree]["bn2"]
        )
        for a, b in zip(before[tree]["bn3"].values(), after[tree]["bn3"].values()):
            assert not np.array_equal(a, b)
    assert not np.array_equal(
        before["params"]["pconv1"]["kernel"], after["params"]["pconv1"]["kernel"]
    )
    counts = [
        [int(x) for x in jax.tree.leaves(items["opt_state"]) if np.ndim(x) == 0]
        for items in (before, after)
    ]
    assert counts == [[4], [2]]  # A new optimizer.


def test_a_finished_run_is_only_validated_again(finished):
    workdir, summary = finished
    lines = read_metrics(workdir)
    again = loop.train_and_evaluate(tiny(), workdir)
    assert again["validation"] == pytest.approx(summary["validation"])
    assert read_metrics(workdir) == lines


@pytest.mark.slow
def test_schedules_and_calls_of_several_updates_resume_bit_for_bit(
    tmp_path, monkeypatch
):
    fields = dict.fromkeys(("log_every", "checkpoint_every", "validate_every"), 2)
    fields |= {f"{phase}.steps": 4 for phase in ("pixels", "phase1", "phase2")}
    fields |= {f"{phase}.schedule": "cosine" for phase in ("pixels", "phase1")}
    fields |= {"phase1.ramp_steps": 3, "pixels.warmup_steps": 2, "clip_norm": 0.5}
    fields |= {"picture_every": 12, "average_decay": 0.9, "steps_per_call": 2}
    fields |= {"weight_decay": 0.01}
    config = tiny(**fields)
    loop.train_and_evaluate(config, tmp_path / "whole")
    lines = [x for x in read_metrics(tmp_path / "whole") if "train/total" in x]
    rates = {x["step"]: x["train/learning_rate"] for x in lines}
    assert rates == pytest.approx(
        {2: 2e-4, 4: 1e-4, 6: 1e-4 * (1 + 0.5**0.5), 8: 1e-4 * (1 - 0.5**0.5)}
        | {10: 5e-5, 12: 5e-5}
    )
    for stop in (2, 6, 8):  # In the first phase, in the second, and at its end.
        requests = contextlib.nullcontext(lambda call, stop=stop: call == stop // 2)
        with monkeypatch.context() as patch:
            patch.setattr(parallel, "stop_requests", lambda r=requests: r)
            stopped = loop.train_and_evaluate(config, tmp_path / "broken")
        assert (stopped["step"], stopped["finished"]) == (stop, False)
    loop.train_and_evaluate(config, tmp_path / "broken")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "broken")


CACHED = {
    "data.cache": "device",
    "data.cache_side": 24,
    "data.color_jitter": 0.2,
    "masks.wide": 0.25,
}


@pytest.mark.slow
def test_a_run_on_cached_images_needs_no_grain_and_resumes_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = loop.train_and_evaluate(tiny(**CACHED), whole)
    assert summary["finished"]
    fields = CACHED | {"phase2.steps": 1}
    program = (
        "import sys\n"
        "for name in ('grain', 'tensorflow_datasets'): sys.modules[name] = None\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 4)\n"
        "jax.config.update('jax_disable_most_optimizations', True)\n"
        "from pconv_jax import cli\n"
        "cli.main(['train', *sys.argv[1:]], program='train.py')\n"
    )
    flags = [f"--config.{name}={value}" for name, value in (TINY | fields).items()]
    config = [f"--config={ROOT}/configs/pconv.py", f"--workdir={broken}"]
    result = run([sys.executable, "-c", program, *config, *flags])
    assert result.returncode == 0, result.stderr
    assert "Finished at step 5" in result.stdout
    assert loop.train_and_evaluate(tiny(**CACHED), broken) == summary
    assert_same_checkpoint(whole, broken)


@pytest.mark.slow
def test_a_longer_second_phase_goes_on_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "run"
    loop.train_and_evaluate(tiny(**{"phase2.steps": 1}), workdir)
    assert read_checkpoint(workdir)[0] == 5
    loop.train_and_evaluate(tiny(), workdir)
    assert_same_checkpoint(workdir, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
def test_a_stop_where_validation_is_due_only_puts_it_off(
    finished, step, tmp_path, monkeypatch
):
    """Between the phases, and at the last step."""
    whole, summary = finished
    requests = contextlib.nullcontext(lambda number: number == step)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "stop_requests", lambda: requests)
        stopped = loop.train_and_evaluate(tiny(), tmp_path)
    assert (stopped["step"], stopped["finished"]) == (step, False)
    assert step not in [line["step"] for line in read_validation(tmp_path)]
    for _ in range(2):  # The second time, there is nothing left to do.
        resumed = loop.train_and_evaluate(tiny(), tmp_path)
        assert resumed == summary
        assert read_validation(tmp_path) == read_validation(whole)
    assert_same_checkpoint(tmp_path, whole)
    assert best_step(tmp_path) == best_step(whole)
    pictures = [
        {path.name: path.read_bytes() for path in (workdir / "pictures").iterdir()}
        for workdir in (tmp_path, whole)
    ]
    assert pictures[0] == pictures[1]


def stop_where(monkeypatch, is_asked):
    """Asks for a stop where a function of the step says so."""
    requests = contextlib.nullcontext(is_asked)
    monkeypatch.setattr(parallel, "stop_requests", lambda: requests)


def test_a_stopped_run_saves_before_it_writes_its_weights(tmp_path, monkeypatch):
    events = []
    for hook in (hooks.Save, export.Export):
        call, name = hook.__call__, hook.__name__

        def record(*args, call=call, name=name, **options):
            events.append((name, options.get("phase")))
            return call(*args, **options)

        monkeypatch.setattr(hook, "__call__", record)
    stop_where(monkeypatch, lambda step: step == 1)
    fields = {"phase1.steps": 1, "export.minutes": 60.0}
    assert loop.train_and_evaluate(tiny(**fields), tmp_path)["step"] == 1
    assert events == [("Save", None), ("Export", "phase1")]
    assert (tmp_path / "weights-phase1.safetensors").exists()
    monkeypatch.undo()
    loop.train_and_evaluate(tiny(**fields), tmp_path)
    assert (tmp_path / "weights-phase2.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_stop_during_validation_takes_no_further_step(
    finished, step, tmp_path, monkeypatch
):
    """Within a phase, where one ends, and at the last step, where nothing is left."""
    whole, summary = finished
    validated, validate = [], hooks.Validate.__call__

    def record(self, state, **options):
        validated.append(int(state.step))
        return validate(self, state, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Validate, "__call__", record)
        stop_where(patch, lambda _: step in validated)
        stopped = loop.train_and_evaluate(tiny(), tmp_path)
    assert (stopped["step"], stopped["finished"]) == (step, step == 6)
    assert read_checkpoint(tmp_path)[0] == step
    assert loop.train_and_evaluate(tiny(), tmp_path) == summary
    assert_same_checkpoint(tmp_path, whole)
    assert read_validation(tmp_path) == read_validation(whole)


@pytest.mark.slow
def test_an_end_during_validation_costs_no_step(finished, tmp_path, monkeypatch):
    whole, summary = finished

    def end(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate_network", end)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(tiny(), tmp_path)
    assert read_checkpoint(tmp_path)[0] == 3  # Where only validation is due.
    assert loop.train_and_evaluate(tiny(), tmp_path) == summary
    assert read_validation(tmp_path) == read_validation(whole)
    assert_same_checkpoint(tmp_path, whole)


def test_second_phase_from_another_run(finished, tmp_path):
    workdir, source = tmp_path / "run", finished[0]
    fields = {"init_from": str(source), "phase1.steps": 0, "phase2.steps": 1}
    loop.train_and_evaluate(tiny(**fields), workdir)
    _, before = read_checkpoint(source)
    _, after = read_checkpoint(workdir)
    jax.tree.map(
        np.testing.assert_array_equal,
        before["batch_stats"]["bn2"],
        after["batch_stats"]["bn2"],
    )
    kernels = (x["params"]["pconv1"]["kernel"] for x in (before, after))
    # One step of Adam at 5e-5.
    assert 0 < np.abs(np.subtract(*kernels)).max() <= 5.01e-5


def test_init_from_nothing(tmp_path):
    with pytest.raises(ValueError, match="init_from: there is no checkpoint in"):
        loop.train_and_evaluate(
            tiny(init_from=str(tmp_path / "nowhere")), tmp_path / "run"
        )


def test_init_from_weights_of_another_project(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match="'pconv convert SOURCE .*' makes one"):
        loop.train_and_evaluate(
            tiny(init_from=str(tmp_path / "weights.pth")), tmp_path / "run"
        )


def test_another_configuration_is_refused_and_nothing_is_lost(finished):
    workdir, _ = finished
    step = read_checkpoint(workdir)[0]
    with pytest.raises(ValueError, match=r"model.width: 4, now 8.*another workdir"):
        loop.train_and_evaluate(tiny(**{"model.width": 8}), workdir)
    assert read_checkpoint(workdir)[0] == step
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 4


def fail(*_):
    raise UserError("no batches")


def test_what_never_took_a_step_can_be_mended(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no such folder"):
        loop.train_and_evaluate(tiny(**{"masks.folder": "/nowhere"}), tmp_path)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "open_batches", fail)
        with pytest.raises(UserError, match="no batches"):
            loop.train_and_evaluate(tiny(**{"loss.hole": 5.0}), tmp_path)
    assert (tmp_path / "config.json").exists()
    fields = {"phase1.steps": 1, "phase2.steps": 0}
    assert loop.train_and_evaluate(tiny(**fields), tmp_path)["finished"]


def test_a_workdir_in_use_is_left_alone(finished, tmp_path, monkeypatch):
    compile_step = experiment.Experiment.compile_step

    def compile_while_another_comes(self, phase):
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by another"):
            loop.train_and_evaluate(tiny(), tmp_path)
        return compile_step(self, phase)

    monkeypatch.setattr(
        experiment.Experiment, "compile_step", compile_while_another_comes
    )
    assert loop.train_and_evaluate(tiny(), tmp_path)["finished"]
    assert read_validation(tmp_path) == read_validation(finished[0])
    assert_same_checkpoint(tmp_path, finished[0])
    monkeypatch.undo()
    assert loop.train_and_evaluate(tiny(), tmp_path)["finished"]


@pytest.mark.slow
def test_a_network_of_another_class_is_told_apart(tmp_path):
    class Other(PConvUNet):
        pass

    fields = {"phase1.steps": 1, "phase2.steps": 0}
    other = Other(depth=2, width=4)
    loop.train_and_evaluate(tiny(**fields), tmp_path / "run", model=other)
    for read in (
        lambda: runner.evaluate_run(tmp_path / "run", learned=False),
        lambda: loop.train_and_evaluate(tiny(**fields), tmp_path / "run"),
        lambda: loop.train_and_evaluate(
            tiny(**fields, init_from=str(tmp_path / "run")), tmp_path / "next"
        ),
    ):
        with pytest.raises(ValueError, match="run holds a Other, "):
            read()
    fields["init_from"] = str(tmp_path / "run")
    loop.train_and_evaluate(tiny(**fields), tmp_path / "next", model=other)


@pytest.mark.slow
def test_a_network_is_told_apart_by_what_no_array_shows(tmp_path):
    fields = {"phase1.steps": 1, "phase2.steps": 0}
    other = PConvUNet(depth=2, width=4, normalization=IMAGENET)
    summary = loop.train_and_evaluate(tiny(**fields), tmp_path / "run", model=other)
    evaluation = runner.evaluate_run(
        tmp_path / "run", learned=False, methods=["network"]
    )
    assert evaluation.mean() == pytest.approx(summary["validation"])
    for read in (
        lambda: loop.train_and_evaluate(tiny(**fields), tmp_path / "run"),
        lambda: loop.train_and_evaluate(
            tiny(**fields, init_from=str(tmp_path / "run")), tmp_path / "next"
        ),
    ):
        with pytest.raises(ValueError, match="a network with other normalization"):
            read()


def test_divergence_names_term_and_step_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny(**{"phase1.learning_rate": 1e30, "checkpoint_every": 1})
    with pytest.raises(hooks.TrainingDivergedError) as error:
        loop.train_and_evaluate(config, tmp_path)
    step, items = read_checkpoint(tmp_path)
    message = str(error.value)
    assert f"at step {step + 1}. The newest checkpoint is of step {step}" in message
    assert message.split(" is ")[0] in {"total", "valid", "hole", "gradient_norm"}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(items["params"]))


def test_divergence_between_two_logs_is_found_before_saving(tmp_path):
    fields = {"phase1.learning_rate": 1e30, "log_every": 100, "validate_every": 100}
    with pytest.raises(hooks.TrainingDivergedError, match="at step 2"):
        loop.train_and_evaluate(tiny(**fields), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_divergence_before_the_first_checkpoint(tmp_path):
    fields = {"phase1.learning_rate": 1e30, "checkpoint_every": 100}
    with pytest.raises(hooks.TrainingDivergedError, match="There is no checkpoint yet"):
        loop.train_and_evaluate(tiny(**fields, validate_every=100), tmp_path)


def photos(folder, names):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in names:
        image = rng.integers(0, 256, (20, 20, 3), np.uint8)
        cv2.imwrite(str(folder / f"{name}.png"), image)
    return folder


def test_other_images_need_a_decision(tmp_path, capsys):
    folder = photos(tmp_path / "photos", range(12))
    fields = {
        "data.source": "folder",
        "phase1.steps": 1,
        "phase2.steps": 0,
    }
    workdir = tmp_path / "run"
    config = tiny(**fields, **{"data.path": (str(folder),)})
    loop.train_and_evaluate(config, workdir)
    # Elsewhere, the same images are the same.
    folder = folder.rename(tmp_path / "moved")
    (workdir / "config.json").unlink()
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        meta = checkpoints.restore([])[2]
    count = meta["images"]["train"]["count"]
    removed = sorted(folder.iterdir())[:3]
    for path in removed:
        path.unlink()
    (tmp_path / "photos").symlink_to(folder)
    with pytest.raises(ValueError, match=f"on other images .*train: {count} images, n"):
        loop.train_and_evaluate(config, workdir)
    summary = loop.train_and_evaluate(config, workdir, allow_other_images=True)
    assert "was trained on other images" in summary["warnings"][0]
    # What the run went on with is not forgotten when it is resumed once more.
    config.phase2.steps = 1
    again = loop.train_and_evaluate(config, workdir, allow_other_images=True)
    assert again["warnings"] == summary["warnings"]
    assert read_meta(workdir)["warnings"] == summary["warnings"]
    assert loop.train_and_evaluate(config, workdir)["warnings"] == summary["warnings"]


def test_other_masks_need_a_decision(tmp_path):
    folder = photos(tmp_path / "masks", range(3))
    fields = {"masks.folder": str(folder), "phase1.steps": 1, "phase2.steps": 0}
    config = tiny(**fields, validate_every=0, picture_every=0)
    workdir = tmp_path / "run"
    loop.train_and_evaluate(config, workdir)
    assert loop.train_and_evaluate(config, workdir)["warnings"] == []
    (folder / "0.png").rename(folder / "3.png")
    with pytest.raises(UserError, match=r"\(masks: 3 images, now with other names\)"):
        loop.train_and_evaluate(config, workdir)
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match=r"\(masks: 3 images, now 2\)"):
        loop.train_and_evaluate(config, workdir)
    summary = loop.train_and_evaluate(config, workdir, allow_other_images=True)
    assert "masks: 3 images, now 2" in summary["warnings"][0]


def test_checkpoints_of_older_versions_say_less_of_their_images():
    one, other = ({"count": n, "digest": f"{n}"} for n in (1, 2))
    identity = {"images": {"train": one, "masks": one, "cached": one}}
    opened = types.SimpleNamespace(identity=identity, warnings=[])
    path = pathlib.Path("run")
    for images in ({}, {"images": {"train": one}}, identity):
        restore._check_images(opened, images, path, allow=False)
    for name in identity["images"]:
        with pytest.raises(UserError, match=rf"\({name}: 2 images, now 1\)"):
            meta = {"images": {name: other}}
            restore._check_images(opened, meta, path, allow=False)


def test_a_workdir_without_its_settings_is_compared_by_its_checkpoint(
    finished, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(ValueError, match=r"seed: 0, now 7.*another workdir"):
        loop.train_and_evaluate(tiny(seed=7), workdir)
    with pytest.raises(ValueError, match=r"loss.hole: 6.0, now 5.0"):
        loop.train_and_evaluate(tiny(**{"loss.hole": 5.0}), workdir)
    assert loop.train_and_evaluate(tiny(), workdir)["finished"]


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[" * 10_000, "[1]", '{"a": 1}'])
def test_a_foreign_or_torn_config_is_refused_and_kept(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json that cannot be read"):
        loop.train_and_evaluate(tiny(), tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to workdir .*file/run"):
        loop.train_and_evaluate(tiny(), tmp_path / "file" / "run")


LOGGED = {
    "log_every": 4,
    "checkpoint_every": 1,
    "phase1.steps": 9,
    "phase2.steps": 0,
    "picture_every": 100,
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The workdir of a run whose logs are of several steps."""
    workdir = tmp_path_factory.mktemp("logged") / "run"
    loop.train_and_evaluate(tiny(**LOGGED), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("at", ["before saving", "after saving", "in validation"])
def test_the_log_is_that_of_a_run_that_never_ended(logged, tmp_path, monkeypatch, at):
    calls = []

    def end(original, number, first):
        def ended(*args, **options):
            calls.append(1)
            if len(calls) == number and first:
                raise KeyboardInterrupt
            result = original(*args, **options)
            if len(calls) == number:
                raise KeyboardInterrupt
            return result

        return ended

    with monkeypatch.context() as patch:
        if at == "in validation":  # After the line, before the checkpoint has it.
            name, ended = "write_scalars", end(MetricWriter.write_scalars, 2, False)
            patch.setattr(MetricWriter, name, ended)
        else:
            ended = end(hooks.Save.__call__, 6, at == "before saving")
            patch.setattr(hooks.Save, "__call__", ended)
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(tiny(**LOGGED), tmp_path)
    loop.train_and_evaluate(tiny(**LOGGED), tmp_path)
    lines = [
        [
            {k: v for k, v in line.items() if k not in ("time", _PACE)}
            for line in read_metrics(workdir)
        ]
        for workdir in (logged, tmp_path)
    ]
    assert lines[0] == lines[1]


def test_batch_that_devices_cannot_share(tmp_path):
    with pytest.raises(ValueError, match="batch_size = 6 .* 4 devices: use 4 or 8"):
        loop.train_and_evaluate(tiny(batch_size=6), tmp_path)


def test_unreadable_images_are_in_the_summary(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(45):
        image = rng.integers(0, 256, (24, 24, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), image)
    config = tiny(**{"data.source": "folder", "data.path": (str(folder),)})
    config.phase1.steps = 12
    source = opening.get_source(read_settings(config).data, "train")
    name = source.name(3)
    pathlib.Path(name).write_bytes(b"")
    summary = loop.train_and_evaluate(config, tmp_path / "run")
    assert summary["finished"]
    assert summary["warnings"] == [f"1 unreadable image(s): {name}"]
    # Checkpoints have it, and so has a run that does not read the image again.
    assert read_meta(tmp_path / "run")["warnings"] == summary["warnings"]
    again = loop.train_and_evaluate(config, tmp_path / "run")
    assert again["warnings"] == summary["warnings"]


def test_unreadable_images_are_named_once_though_more_are_found(tmp_path):
    opened = types.SimpleNamespace(warnings=["a"], settings=None)
    run_ = loop._Run(opened, [], types.SimpleNamespace(step=0), None, None)
    run_._warn_of([])
    assert opened.warnings == ["a"]
    run_._warn_of(["y"])
    run_._warn_of(["x"])  # In the next phase.
    run_._warn_of(["y", "x"])
    assert opened.warnings == ["a", "2 unreadable image(s): x, y"]


@pytest.mark.slow
def test_random_features_are_warned_of_until_the_end(tmp_path, monkeypatch):
    def no_network():
        raise hub.DownloadError("no network")

    monkeypatch.setattr(vgg_weights, "download_vgg16", no_network)
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PCONV_VGG16", raising=False)
    fields = {"phase1.steps": 1, "phase2.steps": 0, "vgg": "auto"}
    summary = loop.train_and_evaluate(tiny(**fields), tmp_path / "run")
    (warning,) = summary["warnings"]
    assert "RANDOM VGG16" in warning and "PCONV_VGG16" in warning
    assert f"WARNING: {warning}" in loop.format_summary(summary, tmp_path)
    assert "train/style_comp" in read_metrics(tmp_path / "run")[0]
    # Now there are others: the loss would not be the same any more.
    others = jax.device_get(vgg.random_params(jax.random.key(1)))
    monkeypatch.setattr(experiment, "load_vgg_params", lambda source="imagenet": others)
    with pytest.raises(ValueError, match="VGG features: random, now .*'auto' finds"):
        loop.train_and_evaluate(tiny(**fields | {"phase2.steps": 1}), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(vgg_weights, "download_vgg16", no_network)
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no VGG16 weights.*set --config.vgg=none"):
        loop.train_and_evaluate(tiny(vgg="imagenet"), tmp_path / "strict")


@pytest.mark.slow
def test_a_vgg_is_read_when_a_phase_has_its_terms(tmp_path, monkeypatch):
    def no_vgg(source):
        raise UserError(f"there is no {source}")

    monkeypatch.setattr(experiment, "load_vgg_params", no_vgg)
    fields = {"vgg": "imagenet", "pixels.steps": 1, "phase1.steps": 0}
    fields |= {"validate_every": 0, "picture_every": 0}
    summary = loop.train_and_evaluate(tiny(**fields | {"phase2.steps": 0}), tmp_path)
    assert summary["finished"] and summary["step"] == 1
    longer = tiny(**fields | {"phase2.steps": 1})
    with pytest.raises(UserError, match="there is no imagenet"):
        loop.train_and_evaluate(longer, tmp_path)
    params = jax.device_get(vgg.random_params(jax.random.key(0)))
    monkeypatch.setattr(experiment, "load_vgg_params", lambda source: params)
    assert loop.train_and_evaluate(longer, tmp_path)["step"] == 2
    lines = read_metrics(tmp_path)
    assert ["train/style_comp" in line for line in lines] == [False, True]


def test_default_workdir():
    assert default_workdir("configs/pconv.py:quickstart") == ("runs/pconv-quickstart")
    assert default_workdir("configs/folder.py") == "runs/folder"


# Real processes.


def command(workdir, *arguments, **fields):
    long = {
        "phase1.steps": 24,
        "phase2.steps": 8,
        "picture_every": 16,
        "validate_every": 16,
        "average_decay": 0.9,
    }
    fields = TINY | long | fields
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={ROOT}/configs/pconv.py"
    program = [sys.executable, str(ROOT / "train.py")]
    return [*program, config, *flags, f"--workdir={workdir}", *arguments]


def run(arguments):
    return subprocess.run(
        arguments,
        env=training_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def start_and_signal(arguments, workdir, number, after):
    """Sends a signal as soon as there is a checkpoint of some step, and waits."""
    process = start(arguments)
    wait_for_checkpoint(process, workdir, after)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.decode()


def start(arguments):
    return subprocess.Popen(
        arguments,
        env=training_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_checkpoint(process, workdir, step):
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / str(step)).exists():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start_two(workdir, fields, fields_of_the_second=()):
    """Starts two processes that share a run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [
        "--distributed",
        f"--coordinator-address=127.0.0.1:{port}",
        "--num-processes=2",
    ]
    return [
        start(command(workdir, *flags, f"--process-id={number}", **fields | dict(own)))
        for number, own in enumerate([(), fields_of_the_second])
    ]


@pytest.mark.slow
def test_killed_and_stopped_runs_end_as_one_that_never_was(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(command(whole))
    assert result.returncode == 0, result.stderr
    assert "Finished at step 32" in result.stdout

    # With the weights killed in mid-flight, and then by a scheduler's polite request.
    code, _ = start_and_signal(command(broken), broken, signal.SIGKILL, after=6)
    assert code == -signal.SIGKILL
    first = read_checkpoint(broken)[0]
    code, output = start_and_signal(
        command(broken), broken, signal.SIGTERM, after=first + 4
    )
    second = read_checkpoint(broken)[0]
    assert first + 4 <= second < 32
    assert code == 0 and f"Stopped at step {second}. The same command" in output
    assert json.loads((broken / "summary.json").read_text())["finished"] is False

    result = run(command(broken))
    assert "Finished at step 32" in result.stdout
    assert_same_checkpoint(whole, broken)
    losses = [
        {
            line["step"]: line["train/total"]
            for line in read_metrics(workdir)[:-1]
            if "train/total" in line
        }
        for workdir in (whole, broken)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 32
    assert read_validation(whole) == read_validation(broken)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    fields = {"phase1.steps": 3, "phase2.steps": 1}
    result = run(command(tmp_path / "one", **fields))
    assert result.returncode == 0, result.stderr
    for process in start_two(tmp_path / "two", fields):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    (_, one), (_, two) = (read_checkpoint(tmp_path / name) for name in ("one", "two"))
    for name in ("params", "batch_stats"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            one[name],
            two[name],
        )
    a, b = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert a[0]["train/total"] == pytest.approx(b[0]["train/total"], rel=1e-4)
    assert a[-1]["validation/l1"] == pytest.approx(b[-1]["validation/l1"], rel=1e-2)


@pytest.mark.slow
def test_two_processes_stop_together_though_one_is_asked(tmp_path):
    processes = start_two(tmp_path, {"phase1.steps": 1000})
    wait_for_checkpoint(processes[0], tmp_path, 4)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    step = read_checkpoint(tmp_path)[0]
    assert 4 < step < 1000
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
        assert f"Stopped at step {step}. The same command" in output


@pytest.mark.slow
def test_two_processes_put_a_damaged_checkpoint_aside(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    notes = workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"metrics": -1}))
    long = ("phase1.steps", "phase2.steps", "picture_every", "validate_every")
    fields = {"average_decay": 0.0} | {name: TINY[name] for name in long}
    for process in start_two(workdir, fields):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert {"6", "6.unreadable"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_for_others_can_be_interrupted(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--distributed", f"--coordinator-address=127.0.0.1:{port}"]
    flags += ["--num-processes=2", f"--process-id={number}"]
    # Background jobs of shells ignore the signal, and so would their child processes.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(command(tmp_path, *flags))
    signal.signal(signal.SIGINT, previous)
    if number == 0:
        for _ in range(600):
            if listening := _addresses(process.pid, port):
                break
            time.sleep(0.1)
        # 127.0.0.1, also if written as an address of IPv6, and no other.
        assert listening <= {"0100007F", "0000000000000000FFFF00000100007F"}
    else:
        time.sleep(12)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert b"interrupted" in output and b"Traceback" not in output


def _addresses(pid, port):
    """Get the addresses at which a process listens to a port."""
    rows = []
    for kind in ("tcp", "tcp6"):
        rows += pathlib.Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]
    local = [row.split()[1].split(":") for row in rows if row.split()[3] == "0A"]
    return {address for address, number in local if int(number, 16) == port}


@pytest.mark.slow
def test_two_processes_of_other_experiments_are_told_apart(tmp_path):
    for process in start_two(tmp_path, {"loss.hole": 6.0}, {"loss.hole": 5.0}):
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 1, output
        assert "the processes of this run differ in the configuration" in output
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=2"], "Did you mean 'batch_size'"),
        (["--config.batch_size=two"], "batch_size must be an integer, got 'two'"),
        (["--config.data.scale=1"], "data.scale must be two numbers"),
        (["--config=nowhere.py"], "there is no file nowhere.py"),
        (["--config=foldr"], "nor a config of that name in the package (accelerator, "),
        (["--batch_size=3"], "Did you mean '--config.batch_size'"),
        (["--config=configs/pconv.py:fast"], "variants are 'paper' and 'quickstart'"),
        (["--steps=3"], "unknown argument: --steps=3"),
        (["steps=3"], "unknown argument: steps=3"),
    ],
)
def test_mistakes_on_the_command_line_end_in_a_sentence(
    monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(ROOT)
    if not arguments[0].startswith("--config="):
        arguments = ["--config=configs/pconv.py", *arguments]
    argv = ["train", *arguments, f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv, program="train.py")
    assert message in exit_.value.code and exit_.value.code.startswith("train.py: ")
    assert "\n" not in exit_.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.source": "folder", "data.path": "/no/such"}, "/no/such"),
        ({"image_size": 18}, "use 16 or 20, or a smaller depth"),
        ({"data.scale": 0.5}, "data.scale must be two numbers"),
        ({"batch_size": 1, "model.depth": 4}, "one value per"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, fields, message):
    result = run(command(tmp_path, **fields))
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())  # Mended, the same command works.


def test_processes_are_not_told_of_others_for_nothing(tmp_path):
    result = run(command(tmp_path / "run", "--num-processes=2", "--process-id=1"))
    assert result.returncode == 1 and "needs --distributed" in result.stderr
    result = run(command(tmp_path / "run", "--distributed", "--process-id=1"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "coordinator_address = None" in result.stderr
    assert not list(tmp_path.iterdir())


def test_memory_is_given_back_after_the_first_call_of_a_step(monkeypatch):
    events = []
    monkeypatch.setattr(_processes, "trim_memory", lambda: events.append("trim"))
    call = loop._trim_after_first(lambda *inputs: events.append(inputs))
    call(1, 2)
    call(3)
    assert events == [(1, 2), "trim", (3,)]
