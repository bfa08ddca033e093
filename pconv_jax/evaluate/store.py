"""What is known of each example, kept in files as it comes.

A record is a dict with ``method``, ``hole_bin``, ``border``, ``index`` and ``picture``,
with the metrics or, where the method failed, with ``error``; and with ``seconds``.
Besides there may be a row of features for each example.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

Record = dict[str, Any]
Key = tuple[int, bool, int]


class Store:
    """Records of methods, one file of JSON lines each.

    A file's name has a digest of all that its records depend on. So an evaluation that
    was killed goes on where it stopped, and another one does not mistake its records
    for its own.
    """

    def __init__(self, directory: pathlib.Path | None):
        """Does nothing yet.

        Args:
          directory: of the files; None keeps records in memory alone.
        """
        self._directory = directory
        self._paths: dict[str, pathlib.Path] = {}
        self._records: dict[str, dict[Key, Record]] = {}
        self._features: dict[str, np.ndarray] = {}

    def open(self, method: str, fingerprint: str) -> None:
        """Reads what there is of a method.

        Args:
          method: its name.
          fingerprint: a digest, or other words, of what its records depend on.
        """
        self._records[method] = {}
        if self._directory is None:
            return
        digest = hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()
        self._paths[method] = self._directory / f"{method}-{digest}.jsonl"
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._paths[method].open("ab+") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                file.write(b"\n")  # Torn by a kill.
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self._records[method][key_of(record)] = record

    def add(self, method: str, records: Iterable[Record]) -> None:
        """Keeps records, in the file too."""
        records = list(records)
        self._records[method] |= {key_of(record): record for record in records}
        if self._directory is None:
            return
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        with self._paths[method].open("a") as file:
            file.write("".join(lines))

    def add_features(
        self, method: str, rows: np.ndarray, features: np.ndarray, *, capacity: int
    ) -> None:
        """Keeps features of some examples; to be called before their `add`.

        Args:
          method: the method's name.
          rows: numbers of the examples, ``[N]``.
          features: ``[N, F]``, float32.
          capacity: how many rows there can be.
        """
        kept = self._features.get(method)
        if kept is None:
            kept = self._open_features(method, (capacity, features.shape[1]))
            self._features[method] = kept
        kept[rows] = features
        if isinstance(kept, np.memmap):
            kept.flush()

    def get_features(self, method: str, rows: np.ndarray) -> np.ndarray | None:
        """Returns the features of examples, or None if there are none."""
        if method not in self._features and self._directory is not None:
            path = self._paths[method].with_suffix(".npy")
            if path.exists():
                self._features[method] = np.load(path, mmap_mode="r+")
        kept = self._features.get(method)
        return None if kept is None else np.asarray(kept[rows])

    def _open_features(self, method, shape):
        if self._directory is None:
            return np.zeros(shape, np.float32)
        path = self._paths[method].with_suffix(".npy")
        if path.exists():
            kept = np.load(path, mmap_mode="r+")
            if kept.shape == shape:
                return kept
        return np.lib.format.open_memmap(path, "w+", np.float32, shape)

    def has(self, method: str, keys: Iterable[Key]) -> bool:
        """Returns whether all of some examples are done."""
        return all(key in self._records[method] for key in keys)

    def get(self, method: str, keys: Iterable[Key]) -> list[Record]:
        """Returns the records of examples."""
        return [self._records[method][key] for key in keys]


def key_of(record: Record) -> Key:
    """Returns the hole bin, the border and the number of an example."""
    return record["hole_bin"], record["border"], record["index"]
