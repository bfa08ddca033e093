"""PyTorch's weights files, ``.pth`` and ``.pt``, read without PyTorch.

Such a file holds raw arrays and a pickle. A pickle is a program for a small stack
machine, and Python's own machine lets it call any function. This module has a machine
that can only build plain containers, and tensors of the file's arrays. If a file asks
for anything else, reading fails with an error that names it. Memory use is at most a
small multiple of the file's size.

PyTorch has written three forms of files: a zip archive (since 1.6), a sequence of
pickles followed by the arrays (0.1.10 to 1.5), and a tar archive (before).
"""

import dataclasses
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pconv_jax._errors import UserError

_DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_STORAGES = {
    f"{module}.{name}Storage": np.dtype(dtype)
    for name, dtype in _DTYPES.items()
    for module in ("torch", "torch.cuda")
}
# Some checkpoints hold these besides tensors. They are accepted and ignored.
_NAMES = {f"torch.{d}" for d in ("float64", "float32", "float16", "bfloat16", "int64")}

# Limits of time and memory. A tensor takes about 25 operations.
_MAX_OPERATIONS = 1_000_000
_MAX_NODES = 200_000
_MAX_PATH = 1000
_MAX_RANK = 32
_MAX_BITS = 128

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# What reading raises if a file is damaged. A damaged pickle may do any operation to any
# value, so the errors of Python's own values are among them. A damaged length may ask
# for more memory than there is. pickletools warns about escape sequences, which is an
# error under -W error.
_DAMAGED = (
    *(zipfile.BadZipFile, struct.error, EOFError, MemoryError, OSError, RuntimeError),
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError, Warning),
)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of a PyTorch file.

    Args:
      path: Path of the file.

    Returns:
      Read-only arrays by name. A name joins the keys from the outermost container to
      the innermost by ``/``: ``'state_dict/conv1.weight'``. Tensors that share memory
      give arrays that share memory.

    Raises:
      UserError: If the file is damaged, is no PyTorch file, or asks for anything but
        tensors and plain containers. The message names the file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            tree, storages = _load(file)
        return {name: _to_array(t, storages) for name, t in _flatten(tree).items()}
    except _DAMAGED as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise UserError(
            f"{path} cannot be read as a file of PyTorch: {reason[:300]}"
        ) from error


@dataclasses.dataclass(eq=False)
class _Global:
    """A function or class that a pickle names."""

    name: str


@dataclasses.dataclass(eq=False)
class _Storage:
    """A one-dimensional array that tensors are views of."""

    key: Any
    dtype: np.dtype
    size: int | None = None  # In elements, as the pickle has it.
    offset: int = 0  # In elements: only the oldest files have views of storages.


@dataclasses.dataclass(eq=False)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Gives the bytes of a storage, at most as many as the file has.
_Storages = Callable[[_Storage], bytes]


def _load(file: BinaryIO) -> tuple[Any, _Storages]:
    """Run the file's pickle; return its result, and a function that reads storages."""
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _load_zip(file)
    if start[257:262] == b"ustar":
        return _load_tar(file)
    return _load_legacy(file)


def _load_zip(file: BinaryIO) -> tuple[Any, _Storages]:
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    # PyTorch does not compress. Without compression and overlaps, a small file cannot
    # become large.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise ValueError("it is a compressed archive, which PyTorch does not write")
    if sum(m.file_size for m in members) > _size(file):
        raise ValueError("it is shorter than the sizes of its members say")
    contents = {m.filename: archive.read(m) for m in members}
    pickles = [name for name in contents if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError("it is an archive without data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    big_endian = contents.get(f"{root}byteorder") == b"big"
    tree = _unpickle(contents[pickles[0]], _storage_of_id)

    def get(storage: _Storage) -> bytes:
        data = contents.get(f"{root}data/{storage.key}")
        if data is None:
            raise ValueError(f"it has no storage {storage.key!r}")
        if big_endian:
            data = np.frombuffer(data, storage.dtype).byteswap().tobytes()
        return data

    return tree, get


def _load_legacy(file: BinaryIO) -> tuple[Any, _Storages]:
    if _unpickle(file) != _LEGACY_MAGIC:
        raise ValueError("it does not have the magic number of PyTorch's files")
    _unpickle(file)  # Version of the protocol.
    _unpickle(file)  # Facts about the writer's machine.
    storages = {}

    def load_persistent(saved_id: Any) -> Any:
        if saved_id[0] == "module":  # A class and its source. Using it is an error.
            return saved_id[1]
        storage = _storage_of_id(saved_id)
        storages[storage.key] = storage
        return storage

    tree = _unpickle(file, load_persistent)
    contents = {}
    for key in _unpickle(file):
        _check_key(key)
        contents[key] = _read_storage(file, storages[key].dtype)
    return tree, lambda storage: contents[storage.key]


def _load_tar(file: BinaryIO) -> tuple[Any, _Storages]:
    members = _tar_members(file)
    storages, contents = {}, {}
    file.seek(members["storages"])
    for _ in range(_unpickle(file)):
        key, _, kind = _unpickle(file)
        _check_key(key)
        storages[key] = _Storage(key, _STORAGES[kind.name])
        contents[key] = _read_storage(file, storages[key].dtype)
    for key, root, offset, _ in _unpickle(file):
        _check_key(key, root, offset)
        storages[key] = _Storage(root, storages[root].dtype, None, offset)
    tensors = {}
    file.seek(members["tensors"])
    for _ in range(_unpickle(file)):
        key, storage_key, _ = _unpickle(file)
        _check_key(key, storage_key)
        (ndim,) = struct.unpack("<i4x", _read_exactly(file, 8))
        shape = struct.unpack(f"<{ndim}q", _read_exactly(file, 8 * ndim))
        strides = struct.unpack(f"<{ndim}q", _read_exactly(file, 8 * ndim))
        (offset,) = struct.unpack("<q", _read_exactly(file, 8))
        tensors[key] = _Tensor(storages[storage_key], offset, shape, strides)

    def load_persistent(saved_id: Any) -> Any:
        if isinstance(saved_id, tuple):
            return saved_id[0]
        return tensors[int(saved_id)]

    file.seek(members["pickle"])
    tree = _unpickle(file, load_persistent)
    return tree, lambda storage: contents[storage.key]


def _tar_members(file: BinaryIO) -> dict[str, int]:
    """Find where the members of a tar archive begin."""
    members = {}  # Without Python's tarfile, which a damaged file can make hang.
    while len(header := file.read(512)) == 512 and header.strip(b"\0"):
        name = header[:100].split(b"\0")[0].decode()
        size = int(header[124:136].strip(b" \0"), 8)
        if size < 0:
            raise ValueError(f"its member {name!r} has a negative size")
        members[name] = file.tell()
        file.seek(size + -size % 512, os.SEEK_CUR)
    return members


def _storage_of_id(saved_id: Any) -> _Storage:
    fields: tuple[Any, ...] = (*saved_id[:6], None)
    kind, storage_type, key, _, size, view = fields[:6]
    if kind != "storage" or storage_type.name not in _STORAGES:
        raise ValueError("it has an unknown kind of storage")
    offset = 0 if view is None else view[1]
    _check_key(key, size, offset)
    return _Storage(key, _STORAGES[storage_type.name], size, offset)


def _check_key(*keys: Any) -> None:
    """Check that keys are strings or numbers; hashing other values may never end."""
    if any(type(k) not in (str, int, float, bool, type(None)) for k in keys):
        raise ValueError("it has keys that are neither strings nor numbers")


def _read_storage(file: BinaryIO, dtype: np.dtype) -> bytes:
    (size,) = struct.unpack("<q", _read_exactly(file, 8))
    return _read_exactly(file, size * dtype.itemsize)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= _size(file) - file.tell():
        raise ValueError("it is truncated")
    return file.read(size)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _to_array(tensor: _Tensor, storages: _Storages) -> np.ndarray:
    storage = tensor.storage
    array = np.frombuffer(storages(storage), storage.dtype.newbyteorder("<"))
    if storage.size is not None and storage.size != len(array):
        raise ValueError(
            f"its storage {storage.key!r} has {len(array)} values, not {storage.size}"
        )
    array = array[max(storage.offset, 0) :]
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if len(shape) != len(strides) or min(0, offset, *shape, *strides) < 0:
        raise ValueError("it has a tensor of an impossible shape")
    if math.prod(shape) > len(array):
        raise ValueError("it has a tensor that is larger than its storage")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) and last >= len(array):
        raise ValueError("it has a tensor that reaches past the end of its storage")
    if not math.prod(shape):
        return np.empty(shape, array.dtype)
    return np.lib.stride_tricks.as_strided(
        array[offset:],
        shape,
        [s * array.itemsize for s in strides],
        writeable=False,
    )


def _flatten(tree: Any) -> dict[str, _Tensor]:
    """Collect tensors by path. Containers may hold each other, or themselves."""
    flat, nodes = {}, [("", tree)]
    for _ in range(_MAX_NODES):
        if not nodes:
            return flat
        path, node = nodes.pop()
        if len(path) > _MAX_PATH:
            raise ValueError("it has containers that are nested too deeply")
        if isinstance(node, _Tensor):
            flat[path] = node
        elif isinstance(node, dict | list | tuple):
            if len(nodes) + len(node) > _MAX_NODES:
                break
            items = node.items() if isinstance(node, dict) else enumerate(node)
            prefix = f"{path}/" if path else ""
            nodes += [(f"{prefix}{key}", value) for key, value in reversed(list(items))]
    raise ValueError("it holds too many things")


def _unpickle(
    pickle: bytes | BinaryIO, load_persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Run a pickle on a machine that can only build containers and tensors.

    Args:
      pickle: The pickle. In a file, it begins at the current position.
      load_persistent: Makes an object of what a pickle calls a persistent id. None (the
        default) refuses such ids.

    Raises:
      ValueError: If the pickle asks for anything else.
      One of `_DAMAGED`: If it is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    argument: Any  # Its type depends on the operation.
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if number > _MAX_OPERATIONS:
            raise ValueError("its pickle is too long")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in _LITERALS:
                if isinstance(argument, int) and argument.bit_length() > _MAX_BITS:
                    raise ValueError("it has a number that is too large")
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                stack.append(pop_to_mark())
            case "DICT":
                values = pop_to_mark()
                stack.append(_pairs(zip(values[::2], values[1::2], strict=True)))
            case "APPEND":
                value = stack.pop()
                _container(stack[-1], list).append(value)
            case "APPENDS":
                values = pop_to_mark()
                _container(stack[-1], list).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _container(stack[-1], dict).update(_pairs([(key, value)]))
            case "SETITEMS":
                values = pop_to_mark()
                pairs = _pairs(zip(values[::2], values[1::2], strict=True))
                _container(stack[-1], dict).update(pairs)
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GLOBAL":
                stack.append(_admit(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_admit(".".join([module, name])))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_CALLS[function.name](*arguments[:8]))
            case "BUILD":  # Attributes of a dict, such as the versions of modules.
                stack.pop()
                _container(stack[-1], dict)
            case "BINPERSID" if load_persistent:
                stack.append(load_persistent(stack.pop()))
            case "PERSID" if load_persistent:
                stack.append(load_persistent(argument))
            case "INST":
                _admit(argument.replace(" ", "."))
                raise ValueError("it asks for the operation INST")
            case other:
                raise ValueError(f"it asks for the operation {other}")
    raise ValueError("its pickle has no end")


_LITERALS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"),
    *("FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _container(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it takes a {type(value).__name__} for a {kind.__name__}")
    return value


def _pairs(pairs: Any) -> dict[Any, Any]:
    pairs = [(key, value) for key, value in pairs]
    _check_key(*(key for key, _ in pairs))
    return dict(pairs)


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    result = _pairs(pairs)
    if result:
        pairs.clear()  # Otherwise, a pickle could copy one list over and over.
    return result


def _admit(name: str) -> _Global:
    if name not in _CALLS and name not in _STORAGES and name not in _NAMES:
        raise ValueError(
            f"it asks for {name[:100]!r}, but only tensors and plain containers are "
            "read. No part of it was run. If you trust the file, load it with PyTorch "
            "and save only its state_dict()."
        )
    return _Global(name)


def _make_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> _Tensor:
    if (
        type(storage) is not _Storage
        or max(len(shape), len(strides)) > _MAX_RANK
        or any(type(n) is not int for n in (offset, *shape, *strides))
    ):
        raise ValueError("it has a tensor of an impossible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


# The functions that a pickle may call, and what runs instead of each.
_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    # A scheduler's milestones. Not copied, because copies would take memory.
    "collections.Counter": lambda counts=None: counts,
    "__builtin__.set": lambda items=None: items,
    "builtins.set": lambda items=None: items,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes=(): tuple(sizes[:_MAX_RANK]),
    "torch.device": lambda *_: None,
}
