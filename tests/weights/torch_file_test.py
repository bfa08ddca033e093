import io
import os
import random
import struct
import time
import tracemalloc
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pconv_jax.weights.formats import torch_file
from pconv_jax.weights.formats.arrays import read_arrays
from tests.helpers import TESTDATA
from tests.helpers import torch_writer as writer
from tests.helpers.torch_writer import Op, call, encode, pickled

DATA = TESTDATA / "torch"

DUMPS = {
    "zip": writer.dump_zip,
    "legacy": writer.dump_legacy,
    "tar": writer.dump_tar,
}

ARRAY = np.arange(24, dtype=np.float32)

TREE = {
    "epoch": 3,
    "state_dict": {"conv.weight": ARRAY.reshape(2, 3, 4), "n": np.array(7, np.int64)},
    "meta": {"name": "é", "rate": 1e-4, "on": True, "none": None, "list": [1, (2, 3)]},
}


@pytest.fixture
def read(tmp_path):
    """A function that reads bytes as the content of a file."""

    def read(data, name="weights.pth"):
        (tmp_path / name).write_bytes(data)
        return read_arrays(tmp_path / name)

    return read


# What PyTorch itself has written, and what it reads.


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol4"])
def test_files_of_torch(form):
    arrays = read_arrays(DATA / f"{form}.pth")
    expected = np.load(DATA / "expected.npz")
    assert sorted(arrays) == sorted(expected.files)
    for name, array in arrays.items():
        dtype = name.split("/")[1] if name.startswith("dtypes") else array.dtype.name
        assert array.dtype.name == dtype
        # NumPy's own files know no bfloat16, and have it as float32.
        np.testing.assert_array_equal(
            array.astype(expected[name].dtype),
            expected[name],
            err_msg=name,
            strict=True,
        )
    views = [arrays[f"views/{n}"] for n in ("whole", "slice", "transposed", "scalar")]
    assert all(np.shares_memory(views[0], view) for view in views)


@pytest.mark.parametrize("form", DUMPS)
def test_torch_reads_what_these_tests_write(form, tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "weights.pth").write_bytes(DUMPS[form](TREE))
    tree = torch.load(tmp_path / "weights.pth", weights_only=False)
    assert tree["meta"] == TREE["meta"]
    for name, array in TREE["state_dict"].items():
        np.testing.assert_array_equal(tree["state_dict"][name].numpy(), array)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_torch_writes_now(legacy, tmp_path):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    half = torch.arange(6.0).reshape(2, 3).T.to(torch.bfloat16)
    path = tmp_path / "weights.pt"
    torch.save(
        {"network": network.state_dict(), "half": half},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    arrays = read_arrays(path)
    np.testing.assert_array_equal(arrays["half"], half.float().numpy())
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(arrays[f"network/{name}"], tensor.numpy())


# The three forms.


@pytest.mark.parametrize("form", DUMPS)
def test_forms(form, read):
    arrays = read(DUMPS[form](TREE))
    assert sorted(arrays) == ["state_dict/conv.weight", "state_dict/n"]
    for name, expected in TREE["state_dict"].items():
        array = arrays[f"state_dict/{name}"]
        np.testing.assert_array_equal(array, expected, strict=True)
        assert not array.flags.writeable


@pytest.mark.parametrize("dtype", writer.STORAGES)
@pytest.mark.parametrize("form", DUMPS)
def test_dtypes(form, dtype, read):
    array = np.array([0, 1, 5, 100]).astype(dtype)
    np.testing.assert_array_equal(read(DUMPS[form]({"a": array}))["a"], array)


def test_big_endian_storages(read):
    saved_id = writer.storage_id(ARRAY, "0")
    data = writer.zip_bytes(
        pickled({"a": writer.tensor(saved_id, (24,))}),
        {"0": ARRAY.astype(">f4").tobytes()},
        byteorder=b"big",
    )
    np.testing.assert_array_equal(read(data)["a"], ARRAY)


def test_views_of_one_storage(read):
    saved_id = writer.storage_id(ARRAY, "0")
    views = {
        "rows": writer.tensor(saved_id, (4, 6)),
        "transposed": writer.tensor(saved_id, (6, 4), (1, 6)),
        "column": writer.tensor(saved_id, (4,), (6,), 2),
        "last": writer.tensor(saved_id, (), (), 23),
        "none": writer.tensor(saved_id, (0, 3)),
    }
    arrays = read(writer.zip_bytes(pickled(views), {"0": ARRAY.tobytes()}))
    np.testing.assert_array_equal(arrays["rows"], ARRAY.reshape(4, 6))
    np.testing.assert_array_equal(arrays["transposed"], ARRAY.reshape(4, 6).T)
    np.testing.assert_array_equal(arrays["column"], [2, 8, 14, 20])
    assert arrays["last"] == 23 and arrays["none"].shape == (0, 3)
    assert np.shares_memory(arrays["rows"], arrays["last"])


def test_a_view_of_a_storage_in_the_older_form(read):
    saved_id = writer.storage_id(ARRAY[:6], "0", (("1", 6, 6),))
    saved_id = Op(saved_id.replace(encode(6), encode(24), 1))
    data = writer.legacy_bytes(
        pickled({"a": writer.tensor(saved_id, (2, 3))}), {"0": (ARRAY.tobytes(), 24)}
    )
    np.testing.assert_array_equal(read(data)["a"], ARRAY[6:12].reshape(2, 3))


def test_parameters_and_plain_containers(read):
    tensor = writer.tensor(writer.storage_id(ARRAY, "0"), (24,))
    pairs = [["b", tensor]]
    tree = {
        "a": call("torch._utils", "_rebuild_parameter", tensor, True, None),
        "ordered": call("collections", "OrderedDict", pairs),
        "size": call("torch", "Size", (2, 3)),
        "dtype": Op(b"ctorch\nfloat16\n"),
        "device": call("torch", "device", "cuda", 0),
        "milestones": call("collections", "Counter", {3: 1, 5: 1}),
        "set": call("__builtin__", "set", [1, 2]),
        # Attributes, as state_dict() has the versions of its modules.
        "state": Op(encode({"c": tensor}) + encode({"_metadata": {}}) + b"b"),
    }
    arrays = read(writer.zip_bytes(pickled(tree), {"0": ARRAY.tobytes()}))
    assert list(arrays) == ["a", "ordered/b", "state/c"]


# Hostile pickles.


def hostile(*operations):
    return b"\x80\x04" + b"".join(operations) + b"."


MARKER = "pconv_was_here"

COMMAND = f"touch {MARKER}"

HOSTILE = {
    "os.system": pickled(call("os", "system", COMMAND)),
    "posix.system": pickled(call("posix", "system", COMMAND)),
    "subprocess.Popen": pickled([call("subprocess", "Popen", COMMAND)]),
    "builtins.eval": pickled(call("builtins", "eval", f"open('{MARKER}', 'w')")),
    "__builtin__.exec": pickled(call("__builtin__", "exec", f"open('{MARKER}', 'w')")),
    "builtins.getattr": pickled(
        call("builtins", "getattr", Op(b"ccollections\nOrderedDict\n"), "__class__")
    ),
    "torch.load": pickled(call("torch", "load", "other.pth")),
    "torch.hub.load": pickled(call("torch.hub", "load", "a", "b")),
    "torch.storage._load_from_bytes": pickled(
        call("torch.storage", "_load_from_bytes", "x")
    ),
    "torch._utils._rebuild_tensor_v2.__globals__": hostile(
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"
    ),
    "collections.OrderedDict.fromkeys": hostile(
        b"ccollections\nOrderedDict.fromkeys\n"
    ),
    "numpy.core.multiarray._reconstruct": hostile(
        b"cnumpy.core.multiarray\n_reconstruct\n"
    ),
    "mymodel.Net": hostile(b"cmymodel\nNet\n"),
    # The same by other operations.
    "os.popen": hostile(
        encode("os"), encode("popen"), b"\x93", encode((COMMAND,)), b"R"
    ),
    "os.execv": b"(S'" + COMMAND.encode() + b"'\nios\nexecv\n.",
    "INST": hostile(b"(icollections\nOrderedDict\n"),
    "OBJ": hostile(b"(ccollections\nOrderedDict\no"),
    "NEWOBJ": hostile(b"ccollections\nOrderedDict\n)\x81"),
    "NEWOBJ_EX": hostile(b"ccollections\nOrderedDict\n)}\x92"),
    "EXT1": hostile(b"\x82\x01"),
    "EXT2": hostile(b"\x83\x01\x00"),
    "EXT4": hostile(b"\x84\x01\x00\x00\x00"),
    "NEXT_BUFFER": hostile(b"\x97"),
    "REDUCE": hostile(encode(()), encode(()), b"R"),
    "takes a _Global for a dict": hostile(
        b"ccollections\nOrderedDict\n", encode({"__class__": 1}), b"b"
    ),
    "takes a _Storage for a dict": hostile(
        writer.storage_id(ARRAY, "0"), encode({"key": "../../etc/passwd"}), b"b"
    ),
    "takes a _Tensor for a dict": hostile(
        writer.tensor(writer.storage_id(ARRAY, "0"), (1,)), b"}", b"b"
    ),
    "takes a _Tensor for a list": hostile(
        writer.tensor(writer.storage_id(ARRAY, "0"), (1,)), encode(1), b"a"
    ),
    "neither strings nor numbers": hostile(b"}", encode((1, 2)), encode(3), b"s"),
    "no storage '../0'": pickled(writer.tensor(writer.storage_id(ARRAY, "../0"), (1,))),
    "no storage '1'": pickled(writer.tensor(writer.storage_id(ARRAY, "1"), (1,))),
}

REASONS = {"REDUCE": "it calls a tuple"}


@pytest.mark.parametrize("reason", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_hostile_pickles_are_refused(form, reason, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if form == "zip":
        data = writer.zip_bytes(HOSTILE[reason], {"0": ARRAY.tobytes()})
    else:
        data = writer.legacy_bytes(HOSTILE[reason], {"0": (ARRAY.tobytes(), 24)})
    with pytest.raises(ValueError, match="weights.pth cannot be read") as error:
        read(data)
    if form == "zip":
        assert REASONS.get(reason, reason) in str(error.value)
    assert sorted(os.listdir()) == ["weights.pth"]


def test_other_parts_of_the_older_form_are_no_way_in(read):
    evil = pickled(call("os", "system", COMMAND))
    good = writer.dump_legacy({"a": ARRAY})
    ends = [
        i + len(pickle) for pickle in pickles_of(good) for i in [good.index(pickle)]
    ]
    for start, end in zip([0, *ends], ends):
        with pytest.raises(ValueError, match="'os.system'"):
            read(good[:start] + evil + good[end:])


def pickles_of(data):
    """Build the pickles at the beginning of a file of the older form."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled(info)]
    start = sum(map(len, head))
    end = data.index(pickled(["0"]))
    return [*head, data[start:end], pickled(["0"])]


def nested(count, opening, closing):
    return b"".join([opening] * count + [closing] * count)


def doubling(count, collect):
    """Build a container of 2**count empty ones, by the memo."""
    return b")" + (b"q\x00h\x00" + collect) * count


TUPLES = doubling(200, b"\x86")
LARGE = b"\x8b" + struct.pack("<i", 4_000_000) + b"\x7f" * 4_000_000

IMPOSSIBLE = {
    "a cycle": hostile(b"]q\x00h\x00a"),
    "a cycle of dicts": hostile(b"}q\x00", encode("a"), b"h\x00s"),
    "nesting": hostile(nested(100_000, b"](", b"e")),
    "nested tuples": hostile(b")" + b"\x85" * 100_000),
    "doubling": hostile(TUPLES),
    "a doubled key": hostile(b"}", TUPLES, b"Ns"),
    "a doubled name": hostile(TUPLES, encode("system"), b"\x93"),
    "a doubled persistent id": hostile(TUPLES, b"Q"),
    "a doubled storage key": hostile(
        encode(("storage", Op(b"ctorch\nFloatStorage\n"))[:1])[:-1],
        b"ctorch\nFloatStorage\n",
        TUPLES,
        encode("cpu"),
        encode(1),
        b"tQ",
    ),
    "many operations": hostile(b"N0" * 600_000),
    "many marks": hostile(b"(" * 1_200_000),
    "a list that is copied again and again": hostile(
        b"(](" + encode(["k", 1]) * 50_000 + b"eq\x00",
        b"ccollections\nOrderedDict\nq\x01",
        b"h\x01h\x00\x85R" * 50_000,
        b"t",
    ),
    "a shape that is checked again and again": hostile(
        b"((" + encode(1) * 50_000 + b"tq\x00",
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x01",
        b"h\x01(" + writer.storage_id(ARRAY, "0") + b"K\x00h\x00h\x00tR" * 50_000,
        b"t",
    ),
    "arguments without end": hostile(
        b"((" + encode(1) * 50_000 + b"tq\x00",
        b"ctorch\ndevice\nq\x01",
        b"h\x01h\x00R" * 50_000,
        b"t",
    ),
    "a large dict that is seen again and again": hostile(
        b"(}(", *(encode(i) + b"N" for i in range(50_000)), b"uq\x00", b"h\x00" * 50_000
    )[:-1]
    + b"t.",
    "a long string": hostile(b"X\xff\xff\xff\xff", b"a"),
    "a very long string": hostile(b"\x8d" + struct.pack("<Q", 2**62), b"a"),
    "a large number": hostile(b"\x8b\xff\xff\xff\x7f", b"1"),
    "a shape of large numbers": hostile(
        b"((" + LARGE + b"q\x00" + b"h\x00" * 5 + b"tq\x01",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"(" + writer.storage_id(ARRAY, "0") + b"K\x00h\x01h\x01tR",
        b"t",
    ),
    "a large number as a key, again and again": hostile(
        b"}" + LARGE + b"q\x00N" + b"sh\x00N" * 100_000 + b"s"
    ),
    "digits": hostile(b"I" + b"9" * 100_000 + b"\n"),
    "long keys": hostile(b"}", encode("k" * 2000), b"]", b"s"),
    "text that is none": hostile(b"X\x02\x00\x00\x00\xff\xff"),
    "nothing on the stack": hostile(b"\x85"),
    "a mark that is missing": hostile(b"t"),
    "a memo that is empty": hostile(b"h\x05"),
    "an odd number of items": hostile(b"}(", encode("a"), b"u"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_is_too_much_ends_soon(case, read):
    data = writer.zip_bytes(IMPOSSIBLE[case], {"0": ARRAY.tobytes()})
    start = time.monotonic()
    try:
        assert read(data) == {}
    except ValueError as error:
        assert "weights.pth cannot be read" in str(error)
        assert len(str(error)) < 1000
    assert time.monotonic() - start < 30


def test_memory_is_bounded_by_the_size_of_the_file(read):
    saved_id = writer.storage_id(ARRAY, "0")
    tensors = {str(i): writer.tensor(saved_id, (4, 6)) for i in range(1000)}
    data = writer.zip_bytes(pickled(tensors), {"0": ARRAY.tobytes()})
    tracemalloc.start()
    arrays = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(arrays) == 1000
    assert peak < 20 * len(data)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((25,), None, 0),
        ((24,), None, 1),
        ((2, 12), (13, 1), 0),
        ((4, 6), (6,), 0),
        ((-1, 6), None, 0),
        ((4, 6), (-6, 1), 0),
        ((4,), None, -1),
        ((10**9,), (0,), 0),
        ((2**40, 2**40), (0, 0), 0),
        ((1,) * 65, None, 0),
        ((2.0,), (1,), 0),
        ((2**70,), (1,), 0),
    ],
)
def test_tensors_that_do_not_fit_their_storage(shape, strides, offset, read):
    saved_id = writer.storage_id(ARRAY, "0")
    pickle = pickled({"a": writer.tensor(saved_id, shape, strides, offset)})
    with pytest.raises(ValueError, match="it has a tensor (of|that)"):
        read(writer.zip_bytes(pickle, {"0": ARRAY.tobytes()}))


@pytest.mark.parametrize("size", [23, 25, 2**40])
def test_storages_of_another_size(size, read):
    fake = np.broadcast_to(np.float32(0), size)
    pickle = pickled({"a": writer.tensor(writer.storage_id(fake, "0"), (1,))})
    with pytest.raises(ValueError, match=f"storage '0' has 24 values, not {size}"):
        read(writer.zip_bytes(pickle, {"0": ARRAY.tobytes()}))
    with pytest.raises(ValueError, match=f"storage '0' has 24 values, not {size}"):
        read(writer.legacy_bytes(pickle, {"0": (ARRAY.tobytes(), 24)}))


@pytest.mark.parametrize("size", [-1, 25, 2**40, 2**62])
def test_storages_that_the_older_form_has_not(size, read):
    pickle = pickled({"a": writer.tensor(writer.storage_id(ARRAY, "0"), (1,))})
    with pytest.raises(ValueError, match="truncated"):
        read(writer.legacy_bytes(pickle, {"0": (ARRAY.tobytes(), size)}))


def test_bugs_are_not_reported_as_damaged_files(read, monkeypatch):
    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(torch_file, "_flatten", fail)
    with pytest.raises(TypeError, match="a bug"):
        read(writer.dump_zip({"a": ARRAY}))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2**62), (0, 2**40, 2**40)])
def test_tensors_without_values(shape, read):
    saved_id = writer.storage_id(ARRAY, "0")
    pickle = pickled({"a": writer.tensor(saved_id, shape, (1,) * len(shape))})
    data = writer.zip_bytes(pickle, {"0": ARRAY.tobytes()})
    if max(shape) > 3:
        with pytest.raises(ValueError, match="a tensor of an impossible shape"):
            read(data)
    else:
        assert read(data)["a"].shape == shape


def test_strides_of_one_value_do_not_matter(read):
    saved_id = writer.storage_id(ARRAY, "0")
    pickle = pickled({"a": writer.tensor(saved_id, (1, 2), (2**70, 1))})
    array = read(writer.zip_bytes(pickle, {"0": ARRAY.tobytes()}))["a"]
    np.testing.assert_array_equal(array, ARRAY.reshape(-1)[None, :2])


# Damaged files and bombs.


def test_compressed_archives_are_refused(read):
    zeros = np.zeros(1_000_000, np.float32)
    data = writer.dump_zip({"a": zeros}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 10_000
    with pytest.raises(ValueError, match="compressed archive"):
        read(data)


def test_overlapping_members_are_refused(read):
    data = writer.dump_zip({"a": np.zeros(10_000, np.float32)})
    archive = zipfile.ZipFile(io.BytesIO(data))
    directory = data[archive.start_dir :]
    end = directory.rindex(b"PK\x05\x06")
    entries = directory[:end] * 100
    tail = bytearray(directory[end:])
    struct.pack_into("<HH", tail, 8, 400, 400)
    struct.pack_into("<I", tail, 12, len(entries))
    with pytest.raises(ValueError, match="shorter than the sizes of its members"):
        read(data[: archive.start_dir] + entries + tail)


@pytest.mark.parametrize("root", ["..", "/etc", "a/../.."])
def test_names_of_members_are_no_paths(root, read, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    try:
        arrays = read(writer.dump_zip({"a": ARRAY}, root=root))
        np.testing.assert_array_equal(arrays["a"], ARRAY)
    except ValueError as error:
        assert "without data.pkl" in str(error)
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "weights.pth"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"\x89HDF\r\n\x1a\n" + bytes(600),
        b"\x80\x02}.",
        bytes(2000),
        b"<html>" * 200,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_files_of_other_kinds(data, read):
    with pytest.raises(ValueError, match="weights.pth cannot be read"):
        read(data)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for name in ("none.pth", "folder.pth"):
        with pytest.raises(ValueError, match=f"there is no file .*{name}"):
            read_arrays(tmp_path / name)


SMALL = {"a": {"b": ARRAY[:6].reshape(2, 3)}, "c": np.array([1, 2], np.int64)}


def read_or_error(path, data):
    """Read a file, or raise an error that names it; then return None."""
    path.write_bytes(data)
    try:
        return read_arrays(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


@pytest.mark.parametrize("form", DUMPS)
def test_truncated_anywhere(form, tmp_path):
    data = DUMPS[form](SMALL)
    needed = len(data) if form != "tar" else data.index(b"sys_info")
    needed = len(data[:needed].rstrip(b"\0"))
    for length in range(0, needed, 1 if form != "tar" else 7):
        assert read_or_error(tmp_path / "weights.pth", data[:length]) is None, length


@pytest.mark.parametrize("form", DUMPS)
def test_every_bit_flipped(form, tmp_path):
    data = DUMPS[form](SMALL)
    rng = random.Random(0)
    positions = range(len(data))
    if form == "tar":
        positions = [i for i in positions if data[i]]
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        read_or_error(tmp_path / "weights.pth", bytes(flipped))


@pytest.mark.slow
@hypothesis.given(data=st.data(), form=st.sampled_from(sorted(DUMPS)))
@hypothesis.settings(max_examples=300, deadline=None)
def test_damaged_in_several_places(data, form, tmp_path_factory):
    content = bytearray(DUMPS[form](SMALL))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.integers(0, 20))
        content[start:stop] = data.draw(st.binary(max_size=20))
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    read_or_error(path, bytes(content))


@pytest.mark.slow
@hypothesis.given(operations=st.lists(st.integers(0, 255), max_size=60))
@hypothesis.settings(max_examples=500, deadline=None)
def test_random_pickles(operations, tmp_path_factory):
    pickle = b"\x80\x04" + bytes(operations) + b"."
    path = tmp_path_factory.getbasetemp() / "random.pth"
    read_or_error(path, writer.zip_bytes(pickle, {"0": ARRAY.tobytes()}))


# The operations that pickles of tensors are made of, in any order.
PIECES = st.sampled_from(
    [
        *(b"(", b"t", b"]", b"}", b")", b"a", b"e", b"s", b"u", b"R", b"b", b"Q", b"0"),
        *(b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"l", b"d", b"\x93", b"\x94"),
        *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", encode(0), encode(24), encode(1.5)),
        *(encode("storage"), encode("0"), encode((2, 3)), encode((3, 1)), encode(-1)),
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        writer.storage_id(ARRAY, "0"),
        writer.tensor(writer.storage_id(ARRAY, "0"), (4, 6)),
    ]
)


@pytest.mark.slow
@hypothesis.given(pieces=st.lists(PIECES, max_size=40))
@hypothesis.settings(max_examples=500, deadline=None)
def test_operations_in_any_order(pieces, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "pieces.pth"
    data = writer.zip_bytes(hostile(*pieces), {"0": ARRAY.tobytes()})
    for array in (read_or_error(path, data) or {}).values():
        assert array.size <= 24
