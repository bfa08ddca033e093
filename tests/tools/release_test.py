import contextlib
import dataclasses
import json
import pathlib
import sys
import threading
import time
from unittest import mock

import jax
import pytest

from pconv_jax import UserError
from pconv_jax.runs.config import read_settings
from pconv_jax.train import export, plan
from pconv_jax.train.hooks import TrainingDivergedError
from pconv_jax.train.loop import format_summary
from pconv_jax.unet import PConvUNet
from pconv_jax.weights.pretrained import from_pretrained, save_pretrained
from tests.train.loop_test import tiny
from tools import release

pytestmark = pytest.mark.usefixtures("fast_compilation")

Failure = jax.errors.JaxRuntimeError
OUT_OF_MEMORY = Failure("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
NO_ALGORITHM = Failure("No valid algorithm for the convolution.")


def make_settings(**fields):
    fields = {"pixels.steps": 100, "phase1.steps": 60, "phase2.steps": 40} | fields
    return read_settings(tiny(**fields | {"picture_every": 999, "validate_every": 999}))


@pytest.fixture
def start(tmp_path):
    """Weights of a narrower network, in parts."""
    model = PConvUNet(depth=2, width=2)
    images, mask = jax.numpy.zeros((1, 8, 8, 3)), jax.numpy.ones((1, 8, 8, 1))
    variables = jax.device_get(model.init(jax.random.key(0), images, mask))
    path = tmp_path / "start.safetensors"
    save_pretrained(path, model, variables)
    export.split(path, tmp_path, 2000)
    path.unlink()
    return str(path)


class Runs:
    """Stands in for training: fails as it is told, and writes what a run would."""

    def __init__(self, *failures):
        self.failures, self.settings = list(failures), []

    def __call__(self, settings, workdir):
        self.settings.append(settings)
        workdir.mkdir(parents=True)
        failure, step = (self.failures or [(None, 9)]).pop(0)
        if step:
            weights = from_pretrained(settings.init_from)
            network = weights.model, weights.variables
            save_pretrained(workdir / export.NAME, *network, info={"step": step})
            stops = {"pixels": 4, "phase1": 7, "phase2": 9}
            phases = [{"name": name, "stop": stop} for name, stop in stops.items()]
            (workdir / plan.FILE).write_text(json.dumps(phases))
        if failure:
            raise failure
        return {"step": step, "finished": True, "validation": {}}


def run_release(settings, tmp_path, **fields):
    (tmp_path / "out").mkdir()
    release.release(
        settings,
        out=tmp_path / "out",
        work=tmp_path / "work",
        deadline=time.monotonic() + 60,
        **fields,
    )
    return json.loads((tmp_path / "out" / "release.json").read_text())["events"]


@pytest.mark.slow
def test_every_failure_has_a_remedy_and_training_goes_on(tmp_path, monkeypatch, start):
    runs = Runs(
        (NO_ALGORITHM, None),
        (OUT_OF_MEMORY, None),
        (TrainingDivergedError("total is nan at step 5."), 4),
        (NO_ALGORITHM, 7),
    )
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    monkeypatch.setattr(release, "choose", lambda settings, *_, **__: settings)
    settings = make_settings(
        init_from=start, vgg="vgg.npz", batch_size=8, **{"model.dtype": "bfloat16"}
    )
    events = run_release(settings, tmp_path)
    remedies = [event["remedy"] for event in events if "remedy" in event]
    assert remedies == [
        "float32",
        "half the batch",
        "half the learning rates",
        "no VGG",
    ]
    assert events[-1]["event"] == "training ended"
    first, exact, halved, slower, last = runs.settings
    assert from_pretrained(first.init_from).model.width == 4  # Widened.
    assert (first.model.dtype, exact.model.dtype) == ("bfloat16", "float32")
    assert (exact.batch_size, halved.batch_size) == (8, 4)
    assert halved.init_from == first.init_from  # No weights were written.
    # The third run finished the first phase, and the fourth the second.
    assert slower.init_from.endswith("work/run-3/weights.safetensors")
    assert slower.phase1.learning_rate == halved.phase1.learning_rate / 2
    steps = [(s.pixels.steps, s.phase1.steps, s.phase2.steps) for s in runs.settings]
    assert steps == [(100, 60, 40)] * 3 + [(0, 60, 40), (0, 0, 40)]
    assert last.vgg is None and slower.vgg == "vgg.npz"
    assert 0 < last.minutes <= slower.minutes <= 0.92


def test_a_failure_without_a_remedy_is_raised(tmp_path, monkeypatch, start):
    runs = Runs((OUT_OF_MEMORY, None))
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    monkeypatch.setattr(release, "choose", lambda settings, *_, **__: settings)
    with pytest.raises(Failure, match="RESOURCE_EXHAUSTED"):  # Four devices.
        run_release(make_settings(init_from=start, batch_size=4), tmp_path)


def test_half_a_batch_must_leave_whole_images_for_the_vgg(tmp_path):
    settings = make_settings(batch_size=16, vgg="auto", feature_fraction=0.5)
    settings, remedy = release.recover(settings, OUT_OF_MEMORY, tmp_path)
    assert (settings.batch_size, remedy) == (8, "half the batch")
    assert release.recover(settings, OUT_OF_MEMORY, tmp_path) == (settings, None)


def test_a_failure_after_the_last_phase_is_raised(tmp_path, monkeypatch, start):
    runs = Runs((NO_ALGORITHM, 10))
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    monkeypatch.setattr(release, "choose", lambda settings, *_, **__: settings)
    settings = make_settings(init_from=start, **{"model.dtype": "bfloat16"})
    with pytest.raises(Failure, match="No valid algorithm"):
        run_release(settings, tmp_path)


NO_TIME = plan.NoTimeError("minutes: 0 s are left")


def test_too_few_minutes_for_a_remedy_end_in_the_weights_so_far(
    tmp_path, monkeypatch, start
):
    runs = Runs((NO_ALGORITHM, 4), (NO_TIME, None))
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    settings = make_settings(init_from=start, **{"model.dtype": "bfloat16"})
    events = run_release(settings, tmp_path, measure_seconds=0)
    names = [event["event"] for event in events[-2:]]
    assert names == ["training starts", "no time is left"]
    assert events[-1]["error"] == str(NO_TIME)


@pytest.mark.parametrize("error", [NO_TIME, UserError("batch_size")])
def test_mistakes_in_the_settings_are_raised(tmp_path, monkeypatch, start, error):
    monkeypatch.setattr(release, "train_and_evaluate", Runs((error, None)))
    with pytest.raises(UserError, match=str(error)):
        run_release(make_settings(init_from=start), tmp_path, measure_seconds=0)


def test_a_mistake_in_a_remedy_is_not_taken_for_the_end(tmp_path, monkeypatch, start):
    runs = Runs((NO_ALGORITHM, 4), (UserError("batch_size"), None))
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    settings = make_settings(init_from=start, **{"model.dtype": "bfloat16"})
    with pytest.raises(UserError, match="batch_size"):
        run_release(settings, tmp_path, measure_seconds=0)


@pytest.mark.parametrize("before", ["weights.safetensors.1", None])
@pytest.mark.parametrize("written", ["weights.safetensors", None])
def test_the_last_resort_succeeds_with_weights_alone(
    tmp_path, monkeypatch, before, written
):
    codes = []
    monkeypatch.setattr(release.os, "_exit", codes.append)
    if before:  # By an earlier command.
        (tmp_path / before).touch()
    weights = release.Weights(tmp_path)
    if written:
        (tmp_path / written).touch()
    path = tmp_path / release.FILE
    release._end(release.Report(path), weights)
    (event,) = json.loads(path.read_text())["events"]
    assert event["event"] == "ended before training did"
    assert event["weights"] == bool(written)
    assert codes == [0 if written else 1]


def test_the_last_resort_waits_for_no_disk(tmp_path, monkeypatch):
    codes, ended = [], threading.Event()
    monkeypatch.setattr(release.os, "_exit", codes.append)
    monkeypatch.setattr(release, "_PATIENCE", 0.01)
    monkeypatch.setattr(release._files, "write_json", lambda *_: ended.wait(60))
    report = release.Report(tmp_path / release.FILE)
    release._end(report, release.Weights(tmp_path))
    assert codes == [1] and not ended.is_set()
    ended.set()


@pytest.mark.parametrize("writes", [True, False])
def test_the_exit_status_says_whether_there_are_weights(tmp_path, monkeypatch, writes):
    out = tmp_path / "out"

    def train(settings, *, out, report, **options):
        if writes:
            (out / "weights.safetensors.1").touch()

    monkeypatch.setattr(release, "release", train)
    monkeypatch.setattr(release.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(release.threading, "Timer", mock.Mock())
    monkeypatch.setattr(release.logs, "log_to_stderr", lambda: None)
    argv = ["release", str(out), "--minutes=1", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", [*argv, "--config=pconv:quickstart"])
    expected = contextlib.nullcontext() if writes else pytest.raises(SystemExit)
    with expected as error:
        release.main()
    assert writes or error.value.code == 1


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"bfloat16": 1.0, "double batch": 1.5, "float32": 0.9}, "double batch"),
        ({"bfloat16": None, "double batch": None, "float32": 2.0}, "float32"),
        ({"bfloat16": None, "double batch": None, "float32": None}, "bfloat16"),
    ],
)
def test_the_fastest_candidate_is_chosen(tmp_path, monkeypatch, seconds, best):
    settings = make_settings(**{"model.dtype": "bfloat16"})
    found = release.candidates(settings)
    assert found.keys() == seconds.keys()

    def measure(experiment, candidate):
        (name,) = (name for name, other in found.items() if other == candidate)
        if seconds[name] is None:
            raise NO_ALGORITHM
        return seconds[name]

    monkeypatch.setattr(release, "open_experiment", lambda settings: None)
    monkeypatch.setattr(release, "_measure", measure)
    report = release.Report(tmp_path / "release.json")
    until = time.monotonic() + 60
    assert release.choose(settings, report, until=until) == found[best]


def test_without_time_to_measure_the_settings_are_taken(tmp_path, monkeypatch, start):
    runs = Runs()
    monkeypatch.setattr(release, "train_and_evaluate", runs)
    monkeypatch.delattr(release, "choose")
    settings = make_settings(init_from=start, batch_size=8)
    events = run_release(settings, tmp_path, measure_seconds=0)
    assert [event["event"] for event in events] == ["training starts", "training ended"]
    assert runs.settings[0].batch_size == 8


def test_time_for_one_candidate_only(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "open_experiment", lambda settings: None)
    monkeypatch.setattr(release, "_measure", lambda *_: 1.0)
    settings, path = make_settings(), tmp_path / "release.json"
    chosen = release.choose(settings, release.Report(path), until=0.0)
    assert chosen == settings
    events = [event["event"] for event in json.loads(path.read_text())["events"]]
    assert "no time for another candidate" in events and "chosen" in events


@pytest.mark.slow
def test_a_release_of_seconds(tmp_path, monkeypatch, start):
    monkeypatch.setattr(plan, "_SECONDS", 0.0)
    fit_phases = plan.fit_phases

    def fit(phases, paces, *, seconds, multiple):
        assert seconds > 1 and multiple == 1
        return fit_phases(phases, paces, seconds=5 * sum(paces.values()))

    monkeypatch.setattr(plan, "fit_phases", fit)
    settings = make_settings(
        init_from=start,
        average_decay=0.9,
        **{"data.cache": "device", "data.cache_side": 24, "pixels.steps": 0},
    )
    settings = dataclasses.replace(settings, validate_every=0, picture_every=0)
    (tmp_path / "out").mkdir()
    summary = release.release(
        settings,
        out=tmp_path / "out",
        work=tmp_path / "work",
        deadline=time.monotonic() + 300,
        part_mib=0.002,
    )
    assert summary["step"] > 0 and summary["finished"] and not summary["validation"]
    assert f"Finished at step {summary['step']}.\n" in format_summary(summary, "run")
    names = {path.name for path in pathlib.Path(tmp_path / "out").iterdir()}
    assert {"release.json", "run-1-metrics.jsonl", f"{export.NAME}.2"} <= names
    export.join(tmp_path / "out" / export.NAME)
    weights = from_pretrained(tmp_path / "out" / export.NAME)
    assert weights.info["step"] == summary["step"] and weights.model.width == 4
