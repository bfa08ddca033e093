"""What is known of each example, kept in files as it comes.

A record is a dict with ``method``, ``hole_bin``, ``border``, ``index`` and ``picture``,
with the metrics or, where the method failed, with ``error``; and with ``seconds``.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

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
            self._records[method][_key(record)] = record

    def add(self, method: str, records: Iterable[Record]) -> None:
        """Keeps records, in the file too."""
        records = list(records)
        self._records[method] |= {_key(record): record for record in records}
        if self._directory is None:
            return
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        with self._paths[method].open("a") as file:
            file.write("".join(lines))

    def has(self, method: str, keys: Iterable[Key]) -> bool:
        """Returns whether all of some examples are done."""
        return all(key in self._records[method] for key in keys)

    def get(self, method: str, keys: Iterable[Key]) -> list[Record]:
        """Returns the records of examples."""
        return [self._records[method][key] for key in keys]


def _key(record: Record) -> Key:
    return record["hole_bin"], record["border"], record["index"]
