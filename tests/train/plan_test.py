import concurrent.futures
import contextlib
import json
import threading
import types

import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.train import loop, plan
from pconv_jax.train.phases import Phase
from tests.train.loop_test import assert_same_checkpoint, read_metrics, tiny

pytestmark = pytest.mark.usefixtures("fast_compilation")

PHASES = (
    Phase("pixels", 0, 0, 1e-3),
    Phase("phase1", 0, 300, 1e-3, warmup_steps=30, ramp_steps=15),
    Phase("phase2", 300, 400, 1e-4, schedule="cosine"),
)


def test_phases_take_the_time_and_keep_their_proportions():
    paces = {"phase1": 0.5, "phase2": 0.25}  # 175 s for all steps.
    pixels, first, second = plan.fit_phases(PHASES, paces, seconds=350)
    assert (pixels.start, pixels.stop) == (0, 0)
    assert (first.start, first.stop) == (0, 600)
    assert (second.start, second.stop) == (600, 800)
    assert (first.warmup_steps, first.ramp_steps) == (60, 30)
    assert second.schedule == "cosine" and second.learning_rate == 1e-4


@pytest.mark.parametrize("seconds", [3.0, 3.2, 4.9, 10.0, 87.3, 1e4])
def test_phases_are_whole_calls_and_end_in_time(seconds):
    paces = {"phase1": 0.25, "phase2": 0.125}
    phases = plan.fit_phases(PHASES, paces, seconds=seconds, multiple=8)
    steps = {p.name: p.stop - p.start for p in phases}
    assert all(n % 8 == 0 for n in steps.values()) and steps["phase2"] >= 8
    taken = 0.25 * steps["phase1"] + 0.125 * steps["phase2"]
    assert taken <= seconds < taken + 8 * 0.25 + 8 * 0.125


def test_minutes_that_are_over_before_the_first_step():
    with pytest.raises(plan.NoTimeError, match="minutes: 0 s are left .* takes 0.8 s"):
        plan.fit_phases(PHASES, {"phase1": 0.5, "phase2": 0.25}, seconds=-3)


@pytest.mark.parametrize(
    ("paces", "calls"),
    [((0.01, 0.01), 51), ((0.1, 0.5), 7), ((0.5, 0.1), 7), ((4.0, 0.1), 3)],
)
def test_processes_with_other_clocks_measure_as_many_calls(monkeypatch, paces, calls):
    own, meeting, told = threading.local(), threading.Barrier(2, timeout=10), {}

    def gather(seconds):
        told[own.pace] = seconds
        meeting.wait()
        return np.concatenate([told[pace] for pace in sorted(told)])

    def call():
        own.calls += 1
        own.clock += own.pace if own.calls > 1 else 100 * own.pace  # It compiles.
        return []

    def measure(number):
        own.pace = paces[number] + 1e-6 * number  # Of each process another.
        own.clock = own.calls = 0
        return plan._measure_call(call), own.pace, own.calls

    clock = types.SimpleNamespace(monotonic=lambda: own.clock)
    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(plan.parallel, "gather", gather)
    with concurrent.futures.ThreadPoolExecutor(2) as processes:
        for measured, pace, made in processes.map(measure, range(2)):
            assert measured == pytest.approx(pace)
            assert made == calls


@pytest.mark.slow
def test_a_run_of_minutes_resumes_with_the_steps_that_it_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "_SECONDS", 0.0)

    def measure(steps):
        def fit(phases, paces, *, seconds, multiple):
            assert paces.keys() == {"phase1", "phase2"} and min(paces.values()) > 0
            assert 0 < seconds < 60 and multiple == 1
            paces = dict.fromkeys(paces, 1.0)
            return fit_phases(phases, paces, seconds=steps, multiple=multiple)

        return fit

    fit_phases = plan.fit_phases
    monkeypatch.setattr(plan, "fit_phases", measure(steps=3))
    fields = {"minutes": 1.0, "phase1.steps": 200, "phase2.steps": 100}
    fields |= {f"{name}_every": 1 for name in ("log", "checkpoint")}
    fields |= {"validate_every": 9, "picture_every": 9, "phase1.schedule": "cosine"}
    summary = loop.train_and_evaluate(tiny(**fields), tmp_path / "whole")
    assert summary["finished"] and summary["step"] == 3
    lines = read_metrics(tmp_path / "whole")
    rates = [x["train/learning_rate"] for x in lines if "train/total" in x]
    assert rates == pytest.approx([2e-4, 1e-4, 5e-5])
    written = json.loads((tmp_path / "whole" / plan.FILE).read_text())
    assert [phase["stop"] for phase in written] == [0, 2, 3]

    broken = tmp_path / "broken"
    requests = contextlib.nullcontext(lambda call: call == 1)
    with monkeypatch.context() as patch:
        patch.setattr(loop.parallel, "stop_requests", lambda: requests)
        assert loop.train_and_evaluate(tiny(**fields), broken)["step"] == 1
    monkeypatch.setattr(plan, "fit_phases", measure(steps=30))
    assert loop.train_and_evaluate(tiny(**fields), broken) == summary
    assert_same_checkpoint(tmp_path / "whole", broken)

    (broken / plan.FILE).unlink()
    with pytest.raises(UserError, match=r"phases.json, which the run wrote before"):
        loop.train_and_evaluate(tiny(**fields), broken)
    with pytest.raises(UserError, match=r"phase2.steps: 100, now 200"):
        loop.train_and_evaluate(tiny(**fields | {"phase2.steps": 200}), broken)


def test_minutes_need_a_phase_with_steps():
    phase = Phase("pixels", 0, 0, 1e-3)
    with pytest.raises(UserError, match="minutes: no phase has steps"):
        plan.fit_phases([phase], {}, seconds=10)
