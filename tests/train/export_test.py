import jax
import numpy as np
import pytest

from pconv_jax import UserError
from pconv_jax.runs.settings import ExportSettings
from pconv_jax.train import export
from pconv_jax.train.export import Export
from pconv_jax.train.optim import make_optimizer
from pconv_jax.train.step import create_state
from pconv_jax.unet import PConvUNet
from pconv_jax.weights.pretrained import from_pretrained

pytestmark = pytest.mark.usefixtures("fast_compilation")

MODEL = PConvUNet(depth=1, width=4)


@pytest.fixture(scope="module")
def state():
    return create_state(
        jax.random.key(0),
        model=MODEL,
        optimizer=make_optimizer(1e-3),
        image_size=8,
        average=True,
    )


def make_export(workdir, *, enabled=True, **settings):
    settings = ExportSettings(**{"minutes": 1.0} | settings)
    info = {"notes": ["test"]}
    return Export(workdir, settings, model=MODEL, info=info, enabled=enabled)


def test_the_average_is_written_in_parts_that_make_the_whole(
    tmp_path, state, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    ones = jax.tree.map(lambda x: x + 1, state.average)
    write = make_export(tmp_path / "run", folder="~/out", part_mib=0.001)
    write(state.replace(average=ones, step=state.step + 7), phase="pixels")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["weights-pixels.safetensors", "weights.safetensors"]
    parts = sorted((tmp_path / "out").iterdir())
    assert len(parts) > 1 and parts[0].name == "weights.safetensors.1"
    assert max(part.stat().st_size for part in parts) == 1048
    whole = (tmp_path / "run" / export.NAME).read_bytes()
    export.join(tmp_path / "out" / export.NAME)
    assert (tmp_path / "out" / export.NAME).read_bytes() == whole
    assert b"".join(part.read_bytes() for part in parts) == whole
    weights = from_pretrained(tmp_path / "out" / export.NAME)
    assert weights.info == {"notes": ["test"], "step": 7}
    for a, b in zip(jax.tree.leaves(weights.variables), jax.tree.leaves(ones)):
        np.testing.assert_allclose(a, b, rtol=2**-11)


def test_parts_of_two_files_are_told_apart(tmp_path, state):
    write = make_export(tmp_path, part_mib=0.001)
    write(state)
    first = (tmp_path / "weights.safetensors.1").read_bytes()
    write(state.replace(average=jax.tree.map(lambda x: 2 * x, state.average)))
    last = max(tmp_path.glob("*.safetensors.*"))
    (tmp_path / "weights.safetensors.1").write_bytes(first)
    export.join(tmp_path / export.NAME)
    with pytest.raises(UserError, match="damaged"):
        from_pretrained(tmp_path / export.NAME)
    assert last.exists()
    with pytest.raises(UserError, match="there is no part other.safetensors.1"):
        export.join(tmp_path / "other.safetensors")


def test_larger_parts_leave_none_of_the_smaller_ones(tmp_path, state):
    make_export(tmp_path, part_mib=0.001)(state)
    count = len(list(tmp_path.glob("*.safetensors.*")))
    make_export(tmp_path, part_mib=0.002)(state)
    numbers = sorted(int(path.suffix[1:]) for path in tmp_path.glob("*.safetensors.*"))
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) < count
    whole = (tmp_path / export.NAME).read_bytes()
    export.join(tmp_path / export.NAME)
    assert (tmp_path / export.NAME).read_bytes() == whole


def test_it_is_due_when_the_minutes_have_passed(tmp_path, state, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(export.time, "monotonic", lambda: clock[0])
    write = make_export(tmp_path, folder=str(tmp_path / "copy"))
    assert not write.is_due()
    clock[0] += 61
    assert write.is_due()
    write(state)
    copy = tmp_path / "copy" / export.NAME
    assert not write.is_due()
    assert copy.read_bytes() == (tmp_path / export.NAME).read_bytes()
    clock[0] += 59
    assert not write.is_due()


@pytest.mark.parametrize("options", [{"enabled": False}, {"minutes": 0.0}])
def test_nothing_is_written_where_it_is_not_asked_for(tmp_path, state, options):
    write = make_export(tmp_path / "run", **options)
    write(state)
    assert not write.is_due() and not list(tmp_path.iterdir())
