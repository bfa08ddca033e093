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
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import ml_dtypes
import numpy as np

from pconv_jax._files import FileContentError, content_errors

Value = TypeVar("Value")

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
_MAX_EMPTY = 2**40  # NumPy bounds the other axes of an array of no values.

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# What zipfile and pickletools raise if a file is damaged, or says that it is larger
# than memory. Not all is documented. pickletools warns about escape sequences, which is
# an error under -W error.
_LIBRARY_ERRORS = (
    *(zipfile.BadZipFile, struct.error, EOFError, MemoryError, OSError, RuntimeError),
    *(ArithmeticError, LookupError, TypeError, ValueError, Warning),
)


def read(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a PyTorch file.

    Args:
      path: Path of the file.

    Returns:
      Read-only arrays by name. A name joins the keys from the outermost container to
      the innermost by ``/``: ``'state_dict/conv1.weight'``. Tensors that share memory
      give arrays that share memory.

    Raises:
      FileContentError: If the file is damaged, is no PyTorch file, or asks for anything
        but tensors and plain containers.
      OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        tree, storages = _load(file)
    return {name: _to_array(t, storages) for name, t in _flatten(tree).items()}


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
    with content_errors(*_LIBRARY_ERRORS):
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    # PyTorch does not compress. Without compression and overlaps, a small file cannot
    # become large.
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise FileContentError(
            "it is a compressed archive, which PyTorch does not write"
        )
    if sum(m.file_size for m in members) > _size(file):
        raise FileContentError("it is shorter than the sizes of its members say")
    with content_errors(*_LIBRARY_ERRORS):
        contents = {m.filename: archive.read(m) for m in members}
    pickles = [name for name in contents if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise FileContentError("it is an archive without data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    big_endian = contents.get(f"{root}byteorder") == b"big"
    tree = _unpickle(contents[pickles[0]], _storage_of_id)

    def get(storage: _Storage) -> bytes:
        data = contents.get(f"{root}data/{storage.key}")
        if data is None:
            raise FileContentError(f"it has no storage {storage.key!r}")
        if big_endian:
            _check_whole(data, storage.dtype)
            data = np.frombuffer(data, storage.dtype).byteswap().tobytes()
        return data

    return tree, get


def _load_legacy(file: BinaryIO) -> tuple[Any, _Storages]:
    if _unpickle(file) != _LEGACY_MAGIC:
        raise FileContentError("it does not have the magic number of PyTorch's files")
    _unpickle(file)  # Version of the protocol.
    _unpickle(file)  # Facts about the writer's machine.
    storages = {}

    def load_persistent(saved_id: Any) -> Any:
        kind, value, *_ = _items(saved_id, 2)
        if kind == "module":  # A class and its source. Using it is an error.
            return value
        storage = _storage_of_id(saved_id)
        storages[storage.key] = storage
        return storage

    tree = _unpickle(file, load_persistent)
    contents = {}
    for key in _items(_unpickle(file), 0):
        contents[key] = _read_storage(file, _find(storages, key).dtype)
    return tree, lambda storage: _find(contents, storage.key)


def _load_tar(file: BinaryIO) -> tuple[Any, _Storages]:
    members = _tar_members(file)
    file.seek(_find(members, "storages"))
    storages, contents = _read_tar_storages(file)
    file.seek(_find(members, "tensors"))
    tensors = _read_tar_tensors(file, storages)

    def load_persistent(saved_id: Any) -> Any:
        if isinstance(saved_id, tuple):
            return _items(saved_id, 1)[0]
        text = str(saved_id) if isinstance(saved_id, str | int) else ""
        if not re.fullmatch(r"\d{1,20}", text):
            raise FileContentError(f"it has no tensor {saved_id!r:.50}")
        return _find(tensors, int(text))

    file.seek(_find(members, "pickle"))
    tree = _unpickle(file, load_persistent)
    return tree, lambda storage: _find(contents, storage.key)


def _read_tar_storages(
    file: BinaryIO,
) -> tuple[dict[Any, _Storage], dict[Any, bytes]]:
    """Read the storages, also those that are views of others; and their bytes."""
    storages, contents = {}, {}
    for _ in range(_whole_number(_unpickle(file))):
        key, _, kind, *_ = _items(_unpickle(file), 3)
        _check_key(key)
        storages[key] = _Storage(key, _dtype_of(kind))
        contents[key] = _read_storage(file, storages[key].dtype)
    for view in _items(_unpickle(file), 0):
        key, root, offset, *_ = _items(view, 3)
        _check_key(key)
        dtype = _find(storages, root).dtype
        storages[key] = _Storage(root, dtype, None, _whole_number(offset))
    return storages, contents


def _read_tar_tensors(
    file: BinaryIO, storages: Mapping[Any, _Storage]
) -> dict[Any, _Tensor]:
    tensors = {}
    for _ in range(_whole_number(_unpickle(file))):
        key, storage_key, *_ = _items(_unpickle(file), 2)
        _check_key(key)
        (ndim,) = struct.unpack("<i4x", _read_exactly(file, 8))
        if not 0 <= ndim <= _MAX_RANK:
            raise FileContentError("it has a tensor of an impossible shape")
        shape = struct.unpack(f"<{ndim}q", _read_exactly(file, 8 * ndim))
        strides = struct.unpack(f"<{ndim}q", _read_exactly(file, 8 * ndim))
        (offset,) = struct.unpack("<q", _read_exactly(file, 8))
        tensors[key] = _Tensor(_find(storages, storage_key), offset, shape, strides)
    return tensors


def _tar_members(file: BinaryIO) -> dict[str, int]:
    """Find where the members of a tar archive begin."""
    members = {}  # Without Python's tarfile, which a damaged file can make hang.
    while len(header := file.read(512)) == 512 and header.strip(b"\0"):
        name = header[:100].split(b"\0")[0].decode(errors="replace")
        digits = header[124:136].strip(b" \0")
        if not re.fullmatch(rb"[0-7]+", digits):
            raise FileContentError(f"its member {name!r} has no size")
        size = int(digits, 8)
        members[name] = file.tell()
        file.seek(size + -size % 512, os.SEEK_CUR)
    return members


def _storage_of_id(saved_id: Any) -> _Storage:
    kind, storage_type, key, _, size, *view = _items(saved_id, 5)
    if kind != "storage":
        raise FileContentError("it has an unknown kind of storage")
    _check_key(key)
    offset = 0
    if view and view[0] is not None:
        _, offset, *_ = _items(view[0], 2)
    size, offset = _whole_number(size), _whole_number(offset)
    return _Storage(key, _dtype_of(storage_type), size, offset)


def _dtype_of(storage_type: Any) -> np.dtype:
    name = storage_type.name if isinstance(storage_type, _Global) else ""
    if name not in _STORAGES:
        raise FileContentError("it has an unknown kind of storage")
    return _STORAGES[name]


# A damaged pickle gives values of any type, which these functions check.


def _items(value: Any, least: int) -> Sequence[Any]:
    """Check that a value is a tuple or list of at least so many items."""
    if type(value) not in (tuple, list) or len(value) < least:
        raise FileContentError(f"it has a {type(value).__name__} for {least} values")
    return value


def _whole_number(value: Any) -> int:
    if type(value) is not int:
        raise FileContentError(f"it has a {type(value).__name__} for a number")
    return value


def _check_key(*keys: Any) -> None:
    """Check that keys are strings or numbers; hashing other values may never end."""
    if any(type(k) not in (str, int, float, bool, type(None)) for k in keys):
        raise FileContentError("it has keys that are neither strings nor numbers")


def _find(values: Mapping[Any, Value], key: Any) -> Value:
    _check_key(key)
    if key not in values:
        raise FileContentError(f"it has no part {key!r:.50}")
    return values[key]


def _check_whole(data: bytes, dtype: np.dtype) -> None:
    if len(data) % dtype.itemsize:
        raise FileContentError("it has a storage that is cut off within a value")


def _read_storage(file: BinaryIO, dtype: np.dtype) -> bytes:
    (size,) = struct.unpack("<q", _read_exactly(file, 8))
    return _read_exactly(file, size * dtype.itemsize)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= _size(file) - file.tell():
        raise FileContentError("it is truncated")
    return file.read(size)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _to_array(tensor: _Tensor, storages: _Storages) -> np.ndarray:
    storage = tensor.storage
    data = storages(storage)
    _check_whole(data, storage.dtype)
    array = np.frombuffer(data, storage.dtype.newbyteorder("<"))
    if storage.size is not None and storage.size != len(array):
        raise FileContentError(
            f"its storage {storage.key!r} has {len(array)} values, not {storage.size}"
        )
    array = array[max(storage.offset, 0) :]
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if len(shape) != len(strides) or min(0, offset, *shape, *strides) < 0:
        raise FileContentError("it has a tensor of an impossible shape")
    if math.prod(shape) > len(array):
        raise FileContentError("it has a tensor that is larger than its storage")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) and last >= len(array):
        raise FileContentError(
            "it has a tensor that reaches past the end of its storage"
        )
    if not math.prod(shape):
        if math.prod(max(n, 1) for n in shape) > _MAX_EMPTY:
            raise FileContentError("it has a tensor of an impossible shape")
        return np.empty(shape, array.dtype)
    return np.lib.stride_tricks.as_strided(
        array[offset:],
        shape,
        # Where there is one value, the stride is not bounded, and does not matter.
        [s * array.itemsize if n > 1 else 0 for n, s in zip(shape, strides)],
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
            raise FileContentError("it has containers that are nested too deeply")
        if isinstance(node, _Tensor):
            flat[path] = node
        elif isinstance(node, dict | list | tuple):
            if len(nodes) + len(node) > _MAX_NODES:
                break
            items = node.items() if isinstance(node, dict) else enumerate(node)
            prefix = f"{path}/" if path else ""
            nodes += [(f"{prefix}{key}", value) for key, value in reversed(list(items))]
    raise FileContentError("it holds too many things")


def _unpickle(
    pickle: bytes | BinaryIO, load_persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Run a pickle on a machine that can only build containers and tensors.

    Args:
      pickle: The pickle. In a file, it begins at the current position.
      load_persistent: Makes an object of what a pickle calls a persistent id. None (the
        default) refuses such ids.

    Raises:
      FileContentError: If the pickle asks for anything else, or is damaged.
    """
    machine = _Machine(load_persistent)
    for number, (operation, argument) in enumerate(_read_operations(pickle)):
        if number > _MAX_OPERATIONS:
            raise FileContentError("its pickle is too long")
        if operation == "STOP":
            return machine.pop()
        if operation not in _OPERATIONS:
            raise FileContentError(f"it asks for the operation {operation}")
        _OPERATIONS[operation](machine, argument)
    raise FileContentError("its pickle has no end")


def _read_operations(pickle: bytes | BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the names and the arguments of a pickle's operations."""
    # An error of the loop that takes them is not raised here.
    with content_errors(*_LIBRARY_ERRORS):
        for operation, argument, _ in pickletools.genops(pickle):
            yield operation.name, argument


class _Machine:
    """The machine of a pickle: a stack of values with marks, and a memo."""

    def __init__(self, load_persistent: Callable[[Any], Any] | None):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._load_persistent = load_persistent

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_literal(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise FileContentError("it has a number that is too large")
        self.push(value)

    def pop(self) -> Any:
        return self.pop_several(1)[0]

    def pop_several(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise FileContentError("its pickle takes a value where there is none")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise FileContentError("its pickle lacks a mark")
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def top(self, kind: type | None = None) -> Any:
        """Get the last value, without popping it, and check its type."""
        value = self.pop()
        if kind and type(value) is not kind:
            raise FileContentError(
                f"it takes a {type(value).__name__} for a {kind.__name__}"
            )
        self.push(value)
        return value

    def remember(self, place: int | None = None) -> None:
        """Put the last value into the memo, by default at the next place."""
        place = len(self._memo) if place is None else place
        self._memo[place] = self.top()

    def recall(self, place: int) -> None:
        self.push(_find(self._memo, place))

    def set_items(self, keys_and_values: list[Any]) -> None:
        self.top(dict).update(_pair(keys_and_values))

    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise FileContentError("it has a name that is not a string")
        self.push(_admit(f"{module}.{name}"))

    def call(self) -> None:
        function, arguments = self.pop_several(2)
        name = function.name if isinstance(function, _Global) else ""
        if name not in _CALLS:
            raise FileContentError(f"it calls a {type(function).__name__}")
        self.push(_CALLS[name](_items(arguments, 0)[:8]))

    def refuse_instance(self, name: str) -> None:
        _admit(name.replace(" ", "."))
        raise FileContentError("it asks for the operation INST")

    def push_persistent(self, saved_id: Any) -> None:
        if self._load_persistent is None:
            raise FileContentError("it has a persistent id where there is none")
        self.push(self._load_persistent(saved_id))

    def drop_attributes(self) -> None:
        """Drop attributes of a dict, such as the versions of modules."""
        self.pop()
        self.top(dict)


_LITERALS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"),
    *("FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}

# What the machine does for each operation, given the operation's argument.
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(_LITERALS, _Machine.push_literal),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.mark(),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop_several(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_several(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_several(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "APPEND": lambda machine, _: _append(machine, machine.pop_several(1)),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": lambda machine, _: machine.push(_pair(machine.pop_to_mark())),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_several(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda machine, _: machine.remember(),
    "GLOBAL": lambda machine, name: machine.push(_admit(name.replace(" ", "."))),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.pop_several(2)),
    "INST": _Machine.refuse_instance,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.drop_attributes(),
    "BINPERSID": lambda machine, _: machine.push_persistent(machine.pop()),
    "PERSID": _Machine.push_persistent,
}


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


def _pair(keys_and_values: list[Any]) -> dict[Any, Any]:
    """Make a dict of keys and values in turn."""
    if len(keys_and_values) % 2:
        raise FileContentError("it has a key without a value")
    keys, values = keys_and_values[::2], keys_and_values[1::2]
    _check_key(*keys)
    return dict(zip(keys, values))


def _make_ordered_dict(arguments: Sequence[Any]) -> dict[Any, Any]:
    if not arguments:
        return {}
    pairs = arguments[0]
    if type(pairs) is not list:
        raise FileContentError(f"it takes a {type(pairs).__name__} for a list")
    result = _pair([x for pair in pairs for x in _items(pair, 2)[:2]])
    pairs.clear()  # Otherwise, a pickle could copy one list over and over.
    return result


def _admit(name: str) -> _Global:
    if name not in _CALLS and name not in _STORAGES and name not in _NAMES:
        raise FileContentError(
            f"it asks for {name[:100]!r}, but only tensors and plain containers are "
            "read. No part of it was run. If you trust the file, load it with PyTorch "
            "and save only its state_dict()."
        )
    return _Global(name)


def _make_tensor(arguments: Sequence[Any]) -> _Tensor:
    storage, offset, shape, strides, *_ = _items(arguments, 4)
    shape, strides = _items(shape, 0), _items(strides, 0)
    if (
        type(storage) is not _Storage
        or max(len(shape), len(strides)) > _MAX_RANK
        or any(type(n) is not int for n in (offset, *shape, *strides))
    ):
        raise FileContentError("it has a tensor of an impossible shape")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _first(arguments: Sequence[Any]) -> Any:
    return arguments[0] if arguments else None


# The functions that a pickle may call, and what runs instead of each, given at most
# eight arguments.
_CALLS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "collections.OrderedDict": _make_ordered_dict,
    # A scheduler's milestones. Not copied, because copies would take memory.
    "collections.Counter": _first,
    "__builtin__.set": _first,
    "builtins.set": _first,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": lambda arguments: tuple(_items(_first(arguments), 0)[:_MAX_RANK]),
    "torch.device": lambda arguments: None,
}
