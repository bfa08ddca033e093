"""Files in PyTorch's three forms, byte by byte and without PyTorch."""

import io
import struct
import tarfile
import zipfile

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Op(bytes):
    """A piece of a pickle, which `encode` does not change."""


def call(module, name, *arguments):
    return Op(f"c{module}\n{name}\n".encode() + encode(arguments) + b"R")


def pickled(value):
    return b"\x80\x02" + encode(value) + b"."


def encode(value):
    """Encode the operations with which a pickle builds a value."""
    match value:
        case Op():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(10, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            items = (encode(k) + encode(v) for k, v in value.items())
            return b"}(" + b"".join(items) + b"u"
    raise TypeError(type(value))


def storage_id(array, key, view=()):
    kind = Op(f"ctorch\n{STORAGES[array.dtype.name]}\n".encode())
    return Op(encode(("storage", kind, key, "cpu", array.size, *view)) + b"Q")


def tensor(saved_id, shape, strides=None, offset=0):
    """Pickle a tensor. Strides are in elements, by default those of C order."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return call(
        *("torch._utils", "_rebuild_tensor_v2"),
        *(saved_id, offset, tuple(shape), tuple(strides), False),
        call("collections", "OrderedDict"),
    )


def map_arrays(tree, function):
    if isinstance(tree, dict):
        return {key: map_arrays(value, function) for key, value in tree.items()}
    return function(tree) if isinstance(tree, np.ndarray) else tree


def zip_bytes(pickle, storages, root="archive", byteorder=b"little", **options):
    """Encode the newest form, from a pickle and the bytes of storages by key."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")
    return buffer.getvalue()


def legacy_bytes(pickle, storages, magic=0x1950A86A20F9469CFC6C):
    """Encode the older form, from a pickle and storages, ``(data, size)`` by key."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    head = pickled(magic) + pickled(1001) + pickled(info) + pickle
    return head + pickled(list(storages)) + storage_bytes(storages.values())


def storage_bytes(storages):
    return b"".join(struct.pack("<q", size) + data for data, size in storages)


def dump_zip(tree, **options):
    storages = {}

    def save(array):
        key = str(len(storages))
        storages[key] = array.tobytes()
        return tensor(storage_id(array, key), array.shape)

    return zip_bytes(pickled(map_arrays(tree, save)), storages, **options)


def dump_legacy(tree):
    storages = {}

    def save(array):
        key = str(len(storages))
        storages[key] = array.tobytes(), array.size
        return tensor(storage_id(array, key, (None,)), array.shape)

    return legacy_bytes(pickled(map_arrays(tree, save)), storages)


def dump_tar(tree):
    """Encode the form of PyTorch before 0.1.10."""
    arrays = []

    def save(array):
        arrays.append(array)
        return Op(encode(str(100 + len(arrays))) + b"Q")

    pickle = pickled(map_arrays(tree, save))
    storages, tensors = pickled(len(arrays)), pickled(len(arrays))
    for number, array in enumerate(arrays, 1):
        kind = Op(f"ctorch\n{STORAGES[array.dtype.name]}\n".encode())
        storages += pickled((number, "cpu", kind))
        storages += storage_bytes([(array.tobytes(), array.size)])
        strides = [s // array.itemsize for s in array.strides]
        tensors += pickled((100 + number, number, None))
        tensors += struct.pack("<i4x", array.ndim)
        tensors += struct.pack(f"<{2 * array.ndim + 1}q", *array.shape, *strides, 0)
    members = {
        "storages": storages + pickled([]),
        "tensors": tensors,
        "pickle": pickle,
        "sys_info": pickled({}),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
