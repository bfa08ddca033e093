import hashlib
import os
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pconv_jax._errors import RunError, UserError
from pconv_jax.weights import formats
from pconv_jax.weights.formats.arrays import read_arrays, to_tree, write_arrays
from tests.helpers import torch_writer


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".pt", ".h5"])
def test_damaged_files_are_named(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".h5":
        pytest.importorskip("h5py")
    for data in (b"", b"PK\x03\x04" + bytes(50), b"\x89HDF\r\n\x1a\n" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"weights{suffix} cannot be read"):
            read_arrays(path)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "weights.onnx").touch()
    with pytest.raises(
        ValueError, match=r"must be a .safetensors, .npz, .pth, .* .h5 file, got"
    ):
        read_arrays(tmp_path / "weights.onnx")
    with pytest.raises(ValueError, match="there is no file .*none.pth"):
        read_arrays(tmp_path / "none.pth")


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_arrays(tmp_path / "a.safetensors", {"a": np.ones(3)}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_known_hash_of_keras_files(tmp_path):
    path = tmp_path / "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    path.write_bytes(b"abc")
    with pytest.raises(
        ValueError, match="its MD5 begins with 90015098, not with 6d6bba"
    ):
        read_arrays(path)


def test_the_hash_in_a_name(tmp_path):
    data = torch_writer.dump_zip({"a": np.ones(3, np.float32)})
    digest = hashlib.sha256(data).hexdigest()
    path = tmp_path / f"pconv_places_20200619-{digest[:8]}.pth"
    path.write_bytes(data)
    assert list(read_arrays(path)) == ["a"]
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=f"begins with {digest[:8]}, not with 397923af"
    ):
        read_arrays(path)


def test_data_outside_a_keras_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    (tmp_path / "secret").write_bytes(bytes(range(40)))
    with h5py.File(path, "w") as file:
        external = [(str(tmp_path / "secret"), 0, 40)]
        file.create_dataset("outside", (10,), np.float32, external=external)
    with pytest.raises(ValueError, match="outside is compressed, or not stored in"):
        read_arrays(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("huge", (10**12,), np.float32, chunks=(1000,))
    with pytest.raises(ValueError, match="huge is compressed, or not stored in"):
        read_arrays(path)
    with h5py.File(path, "w") as file:
        file["here"] = np.ones(3)
        file["link"] = h5py.ExternalLink("other.h5", "/a")
        file["text"] = "abc"
    assert list(read_arrays(path)) == ["here"]


def test_to_tree_leaves_out_other_arrays_unless_it_is_strict():
    arrays = {"a/b": np.ones(2, np.float64), "c": np.ones(3)}
    shapes = {"a": {"b": jax.ShapeDtypeStruct((2,), np.float32)}}
    tree = to_tree(arrays, shapes, "FILE")
    assert list(tree) == ["a"] and tree["a"]["b"].dtype == np.float32
    with pytest.raises(ValueError, match="c is not known"):
        to_tree(arrays, shapes, "FILE", strict=True)


def test_keras_files_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "weights.h5").write_bytes(b"abc")
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, f"{formats.__name__}.keras_file", raising=False)
    monkeypatch.delattr(formats, "keras_file", raising=False)
    with pytest.raises(UserError, match="weights.h5 .*: pip install h5py"):
        read_arrays(tmp_path / "weights.h5")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a.safetensors"):
        write_arrays(tmp_path / "file" / "a.safetensors", {"a": np.ones(3)}, {})


def test_files_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, a=np.zeros(10**7, np.float32))
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="arrays of 40000128 bytes in all are too many"):
        read_arrays(path)
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.ones(1000, np.float32)
        for i in range(100):
            file[f"b{i}"] = file["a"]  # All of them are the same bytes.
    with pytest.raises(UserError, match="its arrays overlap, or are too many"):
        read_arrays(path)


def test_files_that_would_take_forever(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(2000):
            group = group.create_group("g")
    with pytest.raises(UserError, match="nested too deeply"):
        read_arrays(path)
    with h5py.File(path, "w") as file:
        file.create_group("a")["b"] = file["/"]
    with pytest.raises(UserError, match="nested too deeply"):
        read_arrays(path)


def test_names_that_are_no_text(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file[b"caf\xe9"] = np.ones(3)
    with pytest.raises(UserError, match="cannot be read: .* can't decode"):
        read_arrays(path)


def test_groups_that_link_to_themselves(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("g")
        for i in range(1000):  # Each path down has 50 groups of 1000 links.
            group[f"g{i}"] = group
    with pytest.raises(UserError, match="nested too deeply, or have no end"):
        read_arrays(path)


def test_members_that_are_no_arrays(tmp_path):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1_1_kernel", b"hello")
    with pytest.raises(UserError, match="conv1_1_kernel is not an array"):
        read_arrays(path)
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file["nothing"] = h5py.Empty("f4")
        file["one"] = 1.5
    assert read_arrays(path) == {"one": 1.5}


@pytest.mark.parametrize("kind", ["c8", "M8[s]", "m8[s]", "U1", "S1", "f4,i2"])
def test_types_that_are_no_real_numbers(kind):
    arrays = {"a": np.zeros(2, kind)}
    with pytest.raises(UserError, match="a has type .*, not one of real"):
        to_tree(arrays, {"a": jax.ShapeDtypeStruct((2,), np.float32)}, "x")


@pytest.mark.parametrize("kind", ["?", "i1", "u8", "f2", "f8", jnp.bfloat16])
def test_types_that_become_float32(kind):
    shapes = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    tree = to_tree({"a": np.ones(2, kind)}, shapes, "x")
    assert tree["a"].dtype == np.float32 and tree["a"].tolist() == [1, 1]
