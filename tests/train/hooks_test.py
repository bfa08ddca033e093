import types
from unittest import mock

import numpy as np
import pytest

from pconv_jax.train import hooks


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = types.SimpleNamespace(seconds=100.0)
    time = types.SimpleNamespace(monotonic=lambda: clock.seconds)
    monkeypatch.setattr(hooks, "time", time)
    return clock


def test_the_pace_is_that_of_the_steps_alone(clock):
    writer = mock.Mock()
    log = hooks.Log(writer, mock.Mock(), mock.Mock(), batch_size=6, step=10)

    def add(*seconds):
        for s in seconds:
            clock.seconds += s
            log.add({"total": np.float32(s)})

    def written():
        log.write(learning_rate=0.1)
        step, scalars = writer.write_scalars.call_args.args
        return step, scalars.get("train/images_per_second")

    log.start_phase()
    add(50.0)  # It compiles.
    assert written() == (11, None)
    add(2.0, 2.0)
    with log.paused():
        clock.seconds += 30
    add(4.0)
    assert written() == (14, pytest.approx(3 * 6 / 8))
    with log.paused():
        clock.seconds += 30
    add(3.0)
    assert written() == (15, pytest.approx(6 / 3))
    log.start_phase()
    add(50.0, 1.5)
    assert written() == (17, pytest.approx(6 / 1.5))
