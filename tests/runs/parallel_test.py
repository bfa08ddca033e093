import os
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax.runs import parallel

# Training on one and on several devices is compared in train/step_test.py, and on
# several processes in train/loop_test.py.


@pytest.mark.parametrize(
    ("size", "advice"),
    [(6, "use 4 or 8"), (3, "use 4,"), (0, "use 4,"), (-1, "use 4,")],
)
def test_batch_sizes_that_cannot_be_shared(size, advice):
    parallel.check_batch_size(8)
    with pytest.raises(ValueError, match=f"batch_size = {size} .* 4 devices: {advice}"):
        parallel.check_batch_size(size)


def test_batches_that_devices_cannot_divide_into_parts():
    parallel.check_batch_size(8, parts=2)
    message = "batch_size = 12 .* 4 devices of 2 parts each: use 8 or 16"
    with pytest.raises(ValueError, match=message):
        parallel.check_batch_size(12, parts=2)


def test_replicated_trees_are_everywhere_and_share_nothing():
    # Three leaves at least: pmap confuses arguments where as many as it has are leaves.
    source = {"a": jnp.arange(4.0), "b": np.ones((2, 3)), "c": np.zeros(())}
    copy = parallel.replicate(source)
    chex.assert_trees_all_equal(copy, source)
    assert all(len(x.devices()) == 4 for x in jax.tree.leaves(copy))
    step = parallel.compile_train_step(
        lambda state, batch, extra, axis_name: (
            jax.tree.map(lambda x: x + 1, state),
            {"mean": jax.lax.pmean(batch.mean(), axis_name)},
        )
    )
    new, scalars = step(copy, np.arange(8.0), None)
    np.testing.assert_array_equal(source["a"], np.arange(4.0))
    np.testing.assert_array_equal(new["a"], np.arange(4.0) + 1)
    assert scalars["mean"] == 3.5
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(copy["a"])  # Donated.


def test_eval_steps_keep_the_order_of_a_batch():
    step = parallel.compile_eval_step(lambda v, batch: {"y": v * batch["x"]})
    x = np.arange(24.0).reshape(8, 3)
    np.testing.assert_array_equal(step(2.0, {"x": x})["y"], 2 * x)


@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_eval_steps_take_any_number_and_see_one_example_at_a_time(size):
    step = parallel.compile_eval_step(
        lambda v, batch: {"y": batch["x"] - batch["x"].mean(0), "z": v + batch["x"]}
    )
    x = np.arange(3.0 * size).reshape(size, 3)
    results = step(np.ones(3), {"x": x})
    np.testing.assert_array_equal(results["y"], np.zeros_like(x))
    np.testing.assert_array_equal(results["z"], x + 1)


@pytest.mark.parametrize("size", [1, 8, 11])
def test_eval_steps_may_see_several_examples_at_a_time(size):
    seen = []

    def count(v, batch):
        seen.append(batch["x"].shape)
        return {"count": jnp.ones(len(batch["x"])).cumsum(), "x": batch["x"]}

    step = parallel.compile_eval_step(count)
    x = np.arange(2.0 * size).reshape(size, 2)
    results = step(None, {"x": x}, at_a_time=2)
    assert set(seen) == {(2, 2)}  # On each of the four devices.
    np.testing.assert_array_equal(results["x"], x)
    np.testing.assert_array_equal(results["count"], np.arange(size) % 2 + 1)


def test_gather_and_own_share_of_a_single_process():
    x = np.arange(6)
    np.testing.assert_array_equal(parallel.own_share(x), x)
    np.testing.assert_array_equal(parallel.gather({"x": jnp.asarray(x)})["x"], x)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_to_stop_and_handlers_come_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with parallel.stop_requests() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(2) and asked(3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # The second time, at once.
            threading.Event().wait(5)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_no_handlers_outside_of_the_main_thread():
    found = []

    def work():
        with parallel.stop_requests() as asked:
            found.append(asked(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
