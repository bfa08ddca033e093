import errno
import os

import numpy as np
import pytest

from pconv_jax._errors import RunError, UserError
from pconv_jax.evaluate.store import Store

pytestmark = pytest.mark.usefixtures("fast_compilation")


def test_a_store_resumes_after_a_kill(tmp_path):
    place = {"method": "a", "hole": "1%-10%", "border": True}
    store = Store(tmp_path)
    store.open("a", "x")
    store.add("a", [place | {"index": 0, "l1": 0.1}, place | {"index": 1, "l1": 0.2}])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    again = Store(tmp_path)
    again.open("a", "x")
    assert again.has("a", [("1%-10%", True, 0)]) and not again.has(
        "a", [("1%-10%", True, 1)]
    )
    again.add("a", [place | {"index": 1, "l1": 0.3}])
    third = Store(tmp_path)
    third.open("a", "x")
    keys = [("1%-10%", True, 0), ("1%-10%", True, 1)]
    assert [r["l1"] for r in third.get("a", keys)] == [0.1, 0.3]
    third.open("a", "other images")
    assert not third.has("a", keys[:1])


def test_a_line_cut_short_leaves_no_trace(tmp_path, caplog):
    place = {"method": "a", "hole": "1%-10%", "border": True}
    for i in range(3):  # Each start is killed while it writes its second record.
        store = Store(tmp_path)
        store.open("a", "x")
        whole = b"".join(p.read_bytes() for p in tmp_path.iterdir())
        assert whole.count(b"\n") == i and (not whole or whole.endswith(b"\n"))
        store.add("a", [place | {"index": i}, place | {"index": 9}])
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-9])
    store.open("a", "x")
    assert store.has("a", [("1%-10%", True, i) for i in range(3)])
    assert not caplog.records


def test_two_evaluations_cannot_share_a_directory(tmp_path):
    with Store(tmp_path).locked():
        with pytest.raises(UserError, match=f"directory {tmp_path} is in use by"):
            with Store(tmp_path).locked():
                pass
    with Store(tmp_path).locked():  # The lock ends with the block.
        pass


def test_a_changed_record_is_made_again(tmp_path, caplog):
    place = {"method": "a", "hole": "1%-10%", "border": True}
    store = Store(tmp_path)
    store.open("a", "x")
    store.add("a", [place | {"index": i, "psnr": 25.5} for i in range(4)])
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"25.5", b"35.5")
    lines[2] = lines[2][9:]  # Without a checksum, as older versions wrote it.
    path.write_bytes(b"".join(lines))
    again = Store(tmp_path)
    again.open("a", "x")
    assert [again.has("a", [("1%-10%", True, i)]) for i in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    assert "2 of 4 records" in caplog.text and str(path) in caplog.text


def test_changed_features_are_an_error(tmp_path):
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    features[1, 1] = np.nan
    store = Store(tmp_path)
    store.open("a", "x")
    store.add_features("a", np.array([0, 2, 3]), features, capacity=4)
    again = Store(tmp_path)
    again.open("a", "x")
    np.testing.assert_array_equal(
        again.get_features("a", np.array([0, 2, 3])), features
    )
    (path,) = tmp_path.glob("*.npy")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    for cut in (len(data), 50):
        path.write_bytes(data[:cut])
        damaged = Store(tmp_path)
        damaged.open("a", "x")
        with pytest.raises(RunError, match=f"{path} is damaged: delete it"):
            damaged.get_features("a", np.array([0, 2, 3]))


def test_a_full_disk_is_noticed_before_features_are_written(tmp_path, monkeypatch):
    def add(store):
        store.open("a", "x")
        features = np.ones((2, 5), np.float32)
        store.add_features("a", np.arange(2), features, capacity=100)

    def fail_with(number):
        def reserve(descriptor, offset, size):
            reserved.append((os.fstat(descriptor).st_size, offset, size))
            raise OSError(number, os.strerror(number))

        return reserve

    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.ENOSPC), raising=False)
    with pytest.raises(RunError, match=r"write to .*npy: No space left on device\."):
        add(Store(tmp_path))
    assert not list(tmp_path.glob("*.npy"))
    # File systems that cannot reserve space are used as they are.
    monkeypatch.setattr(
        os, "posix_fallocate", fail_with(errno.EOPNOTSUPP), raising=False
    )
    add(Store(tmp_path))
    (path,) = tmp_path.glob("*.npy")
    size = path.stat().st_size
    assert reserved == [(size, 0, size)] * 2 and size > 100 * 6 * 4
