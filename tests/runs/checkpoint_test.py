import errno
import glob
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from pconv_jax._errors import RunError
from pconv_jax.runs import parallel
from pconv_jax.runs.checkpoint import Checkpoints
from tests.helpers import ROOT

# When the first of several arrays cannot be read, Orbax closes its event loop under
# the others, and the threads that were reading them complain to nobody in particular.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_items(seed, features=64):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "pconv1": {"kernel": jax.random.normal(keys[0], (3, 3, 64, features))},
        "head": {"bias": jax.random.normal(keys[1], (features,), jnp.bfloat16)},
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.linear_schedule(1e-3, 0.0, 10)),
    )
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    return {
        "params": params,
        "batch_stats": {"bn": {"mean": jnp.full((3,), seed, jnp.float32)}},
        "opt_state": tx.update(gradients, tx.init(params), params)[1],
        "counters": {"step": jnp.asarray(seed, jnp.int32)},
    }


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def save_steps(directory, steps):
    with Checkpoints(directory, keep=10) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_items(step), meta={"step": step})


def run(script, *args, **env):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_round_trip_keeps_classes_dtypes_and_values(tmp_path):
    items = make_items(1)
    meta = {"config": {"lr": 2e-4, "hole": [1, 2]}, "phase": 1, "note": None}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.save(7, items, meta=meta)
        assert checkpoints.latest_step() == 7
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        step, restored, restored_meta = checkpoints.restore(
            jax.eval_shape(lambda: items)
        )
    assert (step, restored_meta) == (7, meta)
    assert_trees_equal(restored, items)
    assert isinstance(restored["opt_state"][1][0], optax.ScaleByAdamState)


def test_relative_paths_are_those_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("run", [1])
    assert (tmp_path / "run" / "1").is_dir()


def test_names_alone_give_nested_dicts_of_what_was_asked_for(tmp_path):
    save_steps(tmp_path, [3])
    shutil.rmtree(tmp_path / "3" / "opt_state")  # Must not be needed.
    with Checkpoints(tmp_path) as checkpoints:
        _, items, _ = checkpoints.restore(["params", "batch_stats"])
    expected = make_items(3)
    assert list(items) == ["params", "batch_stats"]
    assert_trees_equal(items["params"], expected["params"])
    assert_trees_equal(items["batch_stats"], expected["batch_stats"])


def test_targets_decide_the_dtype(tmp_path):
    params = {"w": jnp.asarray([1.0, 2.5], jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params})
        target = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
        _, items, _ = checkpoints.restore({"params": target})
    assert_trees_equal(items["params"], {"w": np.asarray([1, 2.5], jnp.bfloat16)})


def test_a_network_without_batch_stats(tmp_path):
    items = {"params": {"w": jnp.ones(2)}, "batch_stats": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, items)
        assert_trees_equal(checkpoints.restore(items)[1], items)
        assert_trees_equal(checkpoints.restore(list(items))[1], items)


def test_an_empty_directory_has_no_checkpoint_and_is_not_made(tmp_path):
    with Checkpoints(tmp_path / "run", best_metric="psnr") as checkpoints:
        assert checkpoints.restore(["params"]) is None
        assert checkpoints.steps() == []
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        with pytest.raises(ValueError, match="no checkpoint of step 3"):
            checkpoints.restore(["params"], step=3)
    assert not (tmp_path / "run").exists()


def test_what_happens_to_the_state_after_save_does_not_matter(tmp_path):
    update = jax.jit(lambda x: -x, donate_argnums=0)
    host = np.arange(1 << 20, dtype=np.float32)
    device = jnp.array(host)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"host": {"x": host}, "device": {"x": device}})
        host *= -1
        for _ in range(3):
            device = update(device)
        _, items, _ = checkpoints.restore(["host", "device"])
    expected = {"x": np.arange(1 << 20, dtype=np.float32)}
    assert_trees_equal(items, {"host": expected, "device": expected})


def test_saved_on_four_devices(tmp_path):
    script = """
    import sys
    import jax
    from pconv_jax.runs.checkpoint import Checkpoints

    assert jax.device_count() == 4
    add = jax.pmap(lambda w, x: w + jax.lax.psum(x, "batch"), axis_name="batch",
                   in_axes=(None, 0), out_axes=None)
    w = add(jax.numpy.arange(6.0).reshape(2, 3), jax.numpy.ones(4))
    assert len(w.sharding.device_set) == 4
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {"params": {"w": w}})
    """
    done = run(script, tmp_path, JAX_NUM_CPU_DEVICES="4")
    assert (done.returncode, done.stderr) == (0, "")
    with Checkpoints(tmp_path) as checkpoints:
        _, items, _ = checkpoints.restore(["params"])
    expected = {"w": np.arange(6, dtype=np.float32).reshape(2, 3) + 4}
    assert_trees_equal(items["params"], expected)


def test_a_run_killed_while_saving_goes_on_from_the_step_before(tmp_path):
    script = """
    import glob, os, signal, sys
    import numpy as np
    from pconv_jax.runs.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"params": {"w": np.arange(4.0)}})
    checkpoints.restore(["params"])
    w = np.random.default_rng(0).normal(size=1 << 23)
    checkpoints.save(2, {"params": {"w": w}})
    while not glob.glob(sys.argv[1] + "/2*"):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run(script, tmp_path)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0] == "1" and left[1].startswith("2.orbax-checkpoint-tmp")

    script = """
    import sys
    from pconv_jax.runs.checkpoint import Checkpoints

    with Checkpoints(sys.argv[1]) as checkpoints:
        step, items, _ = checkpoints.restore(["params"])
        print(step, items["params"]["w"].tolist())
        checkpoints.save(2, items)
    """
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 [0.0, 1.0, 2.0, 3.0]\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def largest_file(directory):
    paths = glob.glob(f"{directory}/params/**/d/*", recursive=True)
    return pathlib.Path(max(paths, key=os.path.getsize))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def flip_16_bytes(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - b for b in data[middle : middle + 16])
    path.write_bytes(data)


def edit_meta(step, old, new):
    path = step / "meta" / "metadata"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CORRUPTIONS = {
    "data cut in half": lambda step: truncate(largest_file(step), 0.5),
    "data emptied": lambda step: truncate(largest_file(step), 0),
    "16 bytes of data flipped": lambda step: flip_16_bytes(largest_file(step)),
    "manifest emptied": lambda step: truncate(step / "params/manifest.ocdbt", 0),
    "manifest gone": lambda step: (step / "params/manifest.ocdbt").unlink(),
    "tree cut in half": lambda step: truncate(step / "params/_METADATA", 0.5),
    "meta cut in half": lambda step: truncate(step / "meta/metadata", 0.5),
    "meta flipped": lambda step: flip_16_bytes(step / "meta/metadata"),
    "meta another": lambda step: edit_meta(step, '"step": 2', '"step": 3'),
    "an item gone": lambda step: shutil.rmtree(step / "params"),
    "meta gone": lambda step: shutil.rmtree(step / "meta"),
    "all gone": lambda step: [shutil.rmtree(step), step.mkdir()],
}


def own_records(caplog):
    """Of several arrays that cannot be read, asyncio may log all but the first."""
    return [r for r in caplog.records if r.name.startswith("pconv_jax")]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_newest_step_falls_back_to_the_older(tmp_path, caplog, corruption):
    save_steps(tmp_path, [1, 2])
    CORRUPTIONS[corruption](tmp_path / "2")
    with Checkpoints(tmp_path, best_metric="psnr") as checkpoints:
        step, items, meta = checkpoints.restore(make_items(0))
        assert (step, meta) == (1, {"step": 1})
        assert_trees_equal(items, make_items(1))
        (record,) = own_records(caplog)
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(
            "Skipped an unreadable checkpoint, step 2"
        )
        # The run goes on and comes past the broken step.
        caplog.clear()
        assert checkpoints.save(2, items, meta=meta)
        (record,) = own_records(caplog)
        text = f"The damaged checkpoint of step 2 is now {tmp_path / '2.unreadable'}"
        assert record.getMessage().startswith(text)
        assert checkpoints.restore(make_items(0))[0] == 2
        assert checkpoints.steps() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "2.unreadable"]


def test_flipped_bytes_are_found_by_the_checksum_and_by_nothing_else(tmp_path, caplog):
    save_steps(tmp_path, [1])
    flip_16_bytes(largest_file(tmp_path / "1"))
    expected = make_items(1)["params"]
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(params=ocp.args.StandardRestore(expected))
        read = manager.restore(1, args=args)["params"]
    assert not np.array_equal(read["pconv1"]["kernel"], expected["pconv1"]["kernel"])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(["params"])
    assert "step 1: wrong checksum of params/pconv1/ker" in str(error.value)


def test_if_all_are_corrupt_the_error_lists_them(tmp_path):
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "1" / "meta")
    truncate(tmp_path / "2" / "meta" / "metadata", 0.5)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step 2: JSONDecodeError.*step 1: KeyErr"):
            checkpoints.restore(["params"])
        with pytest.raises(ValueError, match="step 1: KeyError") as error:
            checkpoints.restore(["params"], step=1)
        assert "step 2" not in str(error.value)


@pytest.mark.parametrize(
    "targets, problem",
    [
        (
            {"params": {"w": np.ones((3, 4)), "b": np.ones(2)}},
            "params/w it has shape (3, 2), but wanted is shape (3, 4)",
        ),
        (
            {"params": {"w": np.ones((3, 2)), "b": np.ones(2), "c": np.ones(1)}},
            "params/c it has nothing, but wanted is shape (1,)",
        ),
        (
            {"params": {"w": np.ones((3, 2))}},
            "params/b it has shape (2,), but wanted is nothing",
        ),
        ({"opt_state": {}}, "it has no item 'opt_state'"),
        (["opt_state"], "it has no item 'opt_state'"),
    ],
)
def test_another_configuration_is_not_taken_for_corruption(tmp_path, targets, problem):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            params = {"w": np.ones((3, 2)), "b": np.ones(2)}
            checkpoints.save(step, {"params": params})
        with pytest.raises(ValueError, match="step 2 .* another config") as error:
            checkpoints.restore(targets)
    assert problem in str(error.value)


def test_the_newest_and_the_best_are_kept(tmp_path):
    options = dict(keep=2, best_metric="psnr")
    psnr = {3: 30.0, 5: float("nan"), 6: 28.0, 9: 12.0, 12: 29.0}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step in range(1, 14):
            metrics = {"psnr": jnp.asarray(psnr[step])} if step in psnr else None
            checkpoints.save(step, {"params": {"w": np.ones(2)}}, metrics=metrics)
        assert checkpoints.steps() == [3, 12, 13]
        assert checkpoints.best_step() == 3
    with Checkpoints(tmp_path, **options) as checkpoints:  # Remembered on disk.
        assert checkpoints.best_step() == 3
        checkpoints.restore(["params"])
        checkpoints.save(14, {"params": {"w": np.ones(2)}}, metrics={"psnr": 31.0})
        assert checkpoints.best_step() == 14
    folders = [path for path in tmp_path.iterdir()]
    assert sorted(int(path.name) for path in folders) == [13, 14]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None


def test_saving_where_the_run_stands_does_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(4, {"params": {"w": np.ones(2)}})
        assert not checkpoints.save(4, {"params": {"w": np.zeros(2)}})
    with Checkpoints(tmp_path) as checkpoints:
        _, items, _ = checkpoints.restore(["params"])
        assert not checkpoints.save(4, {"params": {"w": np.zeros(2)}})
        assert_trees_equal(items["params"], {"w": np.ones(2)})
        with pytest.raises(ValueError, match="smaller than 4.* got 3"):
            checkpoints.save(3, items)


def test_metrics_may_come_after_the_rest(tmp_path):
    options = dict(keep=1, best_metric="psnr")
    items, meta = {"params": {"w": np.ones(2)}}, {"a": 1}
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(1, items, meta=meta)
        assert checkpoints.metrics(1) == {}
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.restore(["params"])
        assert not checkpoints.save(1, items, metrics={"psnr": jnp.asarray(30.0)})
        assert checkpoints.best_step() == 1
        assert not checkpoints.save(1, items)  # Which takes nothing away.
    assert not list(tmp_path.rglob("*.partial"))
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.metrics(1) == {"psnr": 30.0}
        step, restored, restored_meta = checkpoints.restore(["params"])
        assert (step, restored_meta) == (1, meta)
        assert_trees_equal(restored, items)
        checkpoints.save(2, items)
        assert not checkpoints.save(2, items, metrics={"psnr": 29.0})
        checkpoints.save(3, items)
        assert checkpoints.steps() == [1, 3]


def test_a_run_taken_up_from_an_older_step_replaces_the_newer_ones(tmp_path, caplog):
    save_steps(tmp_path, [1, 2, 3])
    with Checkpoints(tmp_path) as checkpoints:
        _, items, _ = checkpoints.restore(["params"], step=1)
        assert checkpoints.steps() == [1, 2, 3]  # Reading alone deletes nothing.
        checkpoints.save(2, {"params": {"w": np.ones(2)}})
        assert checkpoints.steps() == [1, 2]
        step, items, _ = checkpoints.restore(["params"])
    assert step == 2
    assert_trees_equal(items["params"], {"w": np.ones(2)})
    assert [r.args for r in caplog.records] == [(2, 1), (3, 1)]


def test_a_new_run_does_not_overwrite_another(tmp_path):
    save_steps(tmp_path, [2, 3])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"steps \[2, 3\]. Restore from it first"):
            checkpoints.save(1, {"params": {"w": np.ones(2)}})
        assert checkpoints.steps() == [2, 3]


def test_meta_is_what_json_makes_of_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        meta = {"size": (512, 512), 1: "one"}
        checkpoints.save(1, {"params": {"w": np.ones(2)}}, meta=meta)
        assert checkpoints.restore([])[2] == json.loads(json.dumps(meta))
        with pytest.raises(ValueError, match="meta must be JSON-able.*ndarray"):
            checkpoints.save(2, {"params": {"w": np.ones(2)}}, meta={"x": np.ones(2)})
        assert checkpoints.steps() == [1]


def test_options_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_reserved_item_names(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"named \['meta'\]"):
            checkpoints.save(1, {"meta": {"w": np.ones(2)}})


def test_orbax_is_quiet_under_verbose_absl(tmp_path):
    script = """
    import sys
    from absl import logging
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    import numpy as np
    from pconv_jax.runs.checkpoint import Checkpoints

    with Checkpoints(sys.argv[1], best_metric="psnr") as checkpoints:
        checkpoints.save(1, {"params": {"w": np.ones(2)}})
        checkpoints.restore(["params"])
    logging.info("ours")
    """
    done = run(script, tmp_path)
    assert done.returncode == 0
    assert "ours" in done.stderr
    assert "checkpoint" not in done.stderr  # As in checkpoint_manager.py:1234.


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        ValueError("INTERNAL: Error reading 2/d: Input/output [os_error_code='5']"),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        MemoryError(),
    ],
)
def test_what_is_no_damage_is_raised_and_costs_no_step(tmp_path, monkeypatch, error):
    save_steps(tmp_path, [1, 2])
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(
                ocp.CheckpointManager, "restore", mock.Mock(side_effect=error)
            )
            with pytest.raises((OSError, MemoryError, RunError)) as caught:
                checkpoints.restore(["params"])
        assert str(error) in str(caught.value)
        step, items, _ = checkpoints.restore(["params"])
        assert step == 2
        checkpoints.save(3, items)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]


def test_damaged_checkpoints_of_the_same_step_are_all_kept(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "2.unreadable-1").mkdir()
    for _ in range(3):
        with Checkpoints(tmp_path) as checkpoints:
            _, items, _ = checkpoints.restore(["params"])
            checkpoints.save(2, items)
        truncate(largest_file(tmp_path / "2"), 0)
    with Checkpoints(tmp_path) as checkpoints:
        _, items, _ = checkpoints.restore(["params"])
        checkpoints.save(2, items)
    aside = ["2.unreadable", *(f"2.unreadable-{n}" for n in (1, 2, 3))]
    assert sorted(os.listdir(tmp_path)) == ["1", "2", *aside]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("metrics", -1), ("item_handlers", 1.5), ("custom_metadata", [])),
        *(("performance_metrics", "x"), ("commit_timestamp_nsecs", {})),
        ("commit_timestamp_nsecs", 10**30),
    ],
)
def test_damaged_notes_of_orbax_fall_back_to_the_older_step(
    tmp_path, caplog, field, value
):
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "2" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for _ in range(2):  # What was put aside is left alone.
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(["params"])[0] == 1
    assert f"{path}: its {field} is {value!r}" in caplog.text
    assert sorted(os.listdir(tmp_path)) == ["1", "2.unreadable"]


def damage_notes(step):
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": -1}))


@pytest.mark.parametrize("damage", [damage_notes, CORRUPTIONS["meta another"]])
def test_processes_meet_once_whether_they_see_damage_or_not(
    tmp_path, monkeypatch, damage
):
    """One of them may look when another has renamed the folder."""
    meetings, gather = [], parallel.gather

    def meet(tree):
        meetings[-1] += 1
        return gather(tree)

    save_steps(tmp_path, [1, 2])
    damage(tmp_path / "2")
    monkeypatch.setattr(parallel, "gather", meet)
    for _ in range(2):  # The second time, nothing is damaged any more.
        meetings.append(0)
        with Checkpoints(tmp_path) as checkpoints:
            step, items, _ = checkpoints.restore(["params"])
            checkpoints.save(step + 1, items)
    assert (tmp_path / "2.unreadable").exists()
    assert meetings[0] == meetings[1] == 2


def test_the_first_process_alone_renames(tmp_path, monkeypatch, caplog):
    save_steps(tmp_path, [1, 2])
    damage_notes(tmp_path / "2")

    def meet(tree):
        """What the first process has done by then."""
        assert (tmp_path / "2").exists()
        os.rename(tmp_path / "2", tmp_path / "2.unreadable")
        return tree

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "process_index", lambda: 1)
        patch.setattr(parallel, "gather", meet)
        checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(["params"])[0] == 1
    checkpoints.close()
    assert not own_records(caplog)
