"""Records of examples, kept in files so that an evaluation can be resumed.

A record is a dict with ``method``, ``hole``, ``border``, ``index``, ``picture`` (the
image's index) and ``seconds``. It also has the metrics or, if the method failed,
``error``. Each example may also have a row of features.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pconv_jax import _files
from pconv_jax._errors import RunError
from pconv_jax.runs.lock import lock_folder

Record = dict[str, Any]

_logger = logging.getLogger(__name__)

Key = tuple[str, bool | None, int]
"""The hole and the border of a `MaskClass`, and the number of an example."""


class Store:
    """Records of methods, in one file of JSON lines for each method.

    The name of a file has a digest of everything that its records depend on. So an
    interrupted evaluation continues where it stopped, and a different one does not
    reuse its records. Every record and every row of features has a checksum; what does
    not fit it is computed again. `locked` keeps other processes out of the directory.
    """

    def __init__(self, directory: Path | None):
        """Create an empty store; `open` reads the files.

        Args:
          directory: Directory of the files. None keeps the records in memory only.
        """
        self._directory = directory
        self._paths: dict[str, Path] = {}
        self._records: dict[str, dict[Key, Record]] = {}
        self._features: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against other processes.

        Two evaluations that append to the same files would mix their records.

        Raises:
          UserError: If another evaluation holds the lock.
          RunError: If the directory cannot be written to.
        """
        if self._directory is None:
            yield
            return
        with lock_folder(self._directory, name="directory"):
            yield

    def open(self, method: str, fingerprint: str) -> None:
        """Read the existing records of a method.

        Args:
          method: Name of the method.
          fingerprint: Text that identifies everything its records depend on.

        Raises:
          RunError: If the file cannot be read or written.
        """
        self._records[method] = {}
        if self._directory is None:
            return
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        path = self._paths[method] = self._directory / f"{method}-{digest}.jsonl"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                data = file.read()
                end = data.rfind(b"\n") + 1
                if end < len(data):  # A kill cut the last line short.
                    file.truncate(end)
        except OSError as error:
            raise _cannot_write(path, error) from error
        lines = data[:end].splitlines()
        read = [_unseal(line) for line in lines]
        records = [record for record in read if record is not None]
        if len(records) < len(lines):  # They are damaged, or of an older version.
            _logger.warning(
                "%d of %d records in %s have no right checksum, and are made again.",
                len(lines) - len(records),
                len(lines),
                path,
            )
        self._records[method] = {key_of(record): record for record in records}

    def add(self, method: str, records: Iterable[Record]) -> None:
        """Add records, in memory and in the file.

        Raises:
          RunError: If the file cannot be written.
        """
        records = list(records)
        self._records[method] |= {key_of(record): record for record in records}
        if self._directory is None:
            return
        try:
            with self._paths[method].open("ab") as file:
                file.write(b"".join(map(_seal, records)))
        except OSError as error:
            raise _cannot_write(self._paths[method], error) from error

    def add_features(
        self, method: str, rows: np.ndarray, features: np.ndarray, *, capacity: int
    ) -> None:
        """Add features of examples. Call it before `add`, which marks them as done.

        Args:
          method: Name of the method.
          rows: Row numbers of the examples, ``[N]``.
          features: float32 ``[N, F]``.
          capacity: Number of rows in total.

        Raises:
          RunError: If the file cannot be written.
        """
        kept = self._features.get(method)
        if kept is None:
            kept = self._open_features(method, (capacity, features.shape[1] + 1))
            self._features[method] = kept
        features = np.ascontiguousarray(features, np.float32)
        kept[rows, :-1] = features.view(np.uint32)
        kept[rows, -1] = [zlib.crc32(row) for row in features]
        if isinstance(kept, np.memmap):
            kept.flush()

    def get_features(self, method: str, rows: np.ndarray) -> np.ndarray | None:
        """Get the features of examples, or None if the method has none.

        Args:
          method: Name of the method.
          rows: Row numbers of the examples, ``[N]``.

        Raises:
          RunError: If the file of features is damaged.
        """
        path = None
        if self._directory is not None:
            path = self._paths[method].with_suffix(".npy")
            if method not in self._features and path.exists():
                self._features[method] = self._load_features(path)
        kept = self._features.get(method)
        if kept is None:
            return None
        features, checksums = np.ascontiguousarray(kept[rows, :-1]), kept[rows, -1]
        if any(zlib.crc32(row) != n for row, n in zip(features, checksums)):
            raise _damaged(path)
        return features.view(np.float32)

    def has(self, method: str, keys: Iterable[Key]) -> bool:
        """Return whether the store has the records of all these examples."""
        return all(key in self._records[method] for key in keys)

    def get(self, method: str, keys: Iterable[Key]) -> list[Record]:
        """Get the records of examples."""
        return [self._records[method][key] for key in keys]

    def _open_features(self, method: str, shape: tuple[int, int]) -> np.ndarray:
        if self._directory is None:
            return np.zeros(shape, np.uint32)
        path = self._paths[method].with_suffix(".npy")
        try:
            if path.exists():
                kept = self._load_features(path)
                if kept.shape == shape and kept.dtype == np.uint32:
                    return kept
            return _create_features(path, shape)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _load_features(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r+")
        except ValueError as error:
            raise _damaged(path) from error


def _create_features(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Create a file of zeros and map it into memory.

    Raises:
      OSError: If it cannot be written; there is no file then.
    """
    try:
        kept = np.lib.format.open_memmap(path, "w+", np.dtype(np.uint32), shape)
        _reserve(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return kept


def _reserve(path: Path) -> None:
    """Reserve the space of a file on the disk.

    A full disk would end the process with a signal, if it filled up while the file was
    written through memory.

    Raises:
      OSError: If there is not enough space.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            # Some file systems cannot reserve space.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def _seal(record: Record) -> bytes:
    """Write a record as a line with a checksum."""
    text = json.dumps(record, allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _unseal(line: bytes) -> Record | None:
    """Read a line of `_seal`, or return None if it was cut short or changed."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    right = checksum == f"{zlib.crc32(text):08x}".encode()
    return json.loads(text) if right else None


def _damaged(path: Path | None) -> RunError:
    return RunError(
        f"{path} is damaged: delete it and the .jsonl file beside it, which are made "
        "again."
    )


def key_of(record: Record) -> Key:
    """Get the key of an example's record."""
    return record["hole"], record["border"], record["index"]


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write to {path}: {_files.describe_error(error)}.")
