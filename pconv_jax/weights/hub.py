"""Downloads of weights, and the cache that keeps them.

No other module uses the network or knows where the cache is.
"""

import hashlib
import http.client
import json
import math
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pconv_jax import _files
from pconv_jax._errors import RunError, UserError
from pconv_jax._files import FileContentError
from pconv_jax.weights.formats.arrays import check_hash, checksum

_REMEMBERED = "downloads.json"
_MAX_HEADER = 10_000_000  # Bytes; a file with a longer one is not a safetensors file.


class DownloadError(RunError):
    """A file cannot be downloaded."""


class Published(NamedTuple):
    """A weights file that its authors published.

    Attributes:
      url: Address of the file.
      name: Name of the file in the cache. If it ends in ``-``, eight hexadecimal digits
        and ``.pth``, as in ``vgg16-397923af.pth``, the file's SHA-256 must begin with
        these digits.
      variable: Environment variable that may name the file, or one with the same
        content.
    """

    url: str
    name: str
    variable: str


def cache_path(name: str) -> Path:
    """Get the path of a file in the cache, whether it exists or not."""
    return _files.cache_folder() / name


def named_path(variable: str) -> Path | None:
    """Get the path that an environment variable names, or None if it is not set."""
    value = os.environ.get(variable)
    return _files.as_path(value) if value else None


def find_published(*files: Published) -> list[Path]:
    """Find published weights files, and download those that are missing.

    Each is looked for where its environment variable says, then in the cache, and is
    otherwise downloaded into the cache.

    Args:
      *files: Files, small ones first: if one download fails, the larger ones after it
        are not tried.

    Returns:
      One path for each file.

    Raises:
      UserError: If a file cannot be downloaded. One line says where to put every
        missing file.
    """
    paths, missing = [], []
    for file in files:
        named, cached = named_path(file.variable), cache_path(file.name)
        paths.append(named or cached)
        if named is None and not cached.exists():
            missing.append(file)
    for i, file in enumerate(missing):
        try:
            _download(file.url, cache_path(file.name))
        except (OSError, http.client.HTTPException, RunError, UserError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # It holds the connection.
            todo = ", and ".join(
                f"{url} and put it here as {cache_path(name)}, or name it in {variable}"
                for url, name, variable in missing[i:]
            )
            raise UserError(
                f"There is no {file.name}, and it cannot be downloaded "
                f"({str(error).rstrip('.')}). On a machine with a network, fetch "
                f"{todo}."
            ) from error
    return paths


def _download(url: str, path: Path) -> None:
    with (
        urllib.request.urlopen(url, timeout=30) as response,
        _files.atomic_path(path) as partial,
    ):
        size = int(response.headers["Content-Length"] or 0) or None
        progress = tqdm.wrapattr(response, "read", total=size, desc=path.name)
        with progress as source, open(partial, "wb") as file:
            shutil.copyfileobj(source, file)
        check_hash(path, written_to=partial)


def repository_url(repository: str, filename: str, *, revision: str = "main") -> str:
    """Get the address of a file on the Hugging Face Hub, for people."""
    return f"https://huggingface.co/{repository}/resolve/{revision}/{filename}"


def download_repository_file(repository: str, filename: str) -> Path:
    """Download a file from the Hugging Face Hub, once.

    Args:
      repository: Repository, ``user/name``.
      filename: File in the repository.

    Returns:
      The path of the file in the Hub's own cache, which keeps the revision that was
      the newest at the first download.

    Raises:
      DownloadError: If the file is not in the cache and cannot be downloaded, or if
        what was downloaded has another hash than the Hub says.
    """
    hub = _import_hub()
    try:
        cached = hub.try_to_load_from_cache(repository, filename)
        if isinstance(cached, str):
            return Path(cached)
        # Check that the file is there: without a network, a download retries for long.
        url = hub.hf_hub_url(repository, filename)
        metadata = hub.get_hf_file_metadata(url, timeout=10)
        revision = metadata.commit_hash
        path = Path(hub.hf_hub_download(repository, filename, revision=revision))
    except _hub_errors(hub) as error:
        raise DownloadError(type(error).__name__) from error
    _check_etag(path, metadata.etag)
    return path


def _check_etag(path: Path, etag: str | None) -> None:
    """Compare a file with its ETag, which the Hub makes the SHA-256 of large files."""
    if etag and re.fullmatch("[0-9a-f]{64}", etag):
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != etag:
            path.resolve().unlink()  # Not to be found in the cache the next time.
            raise DownloadError(f"its SHA-256 is {actual}, and the Hub has {etag}")


def read_repository_arrays(
    repository: str, filename: str, names: Collection[str], *, revision: str
) -> dict[str, np.ndarray]:
    """Read some arrays of a safetensors file on the Hugging Face Hub.

    Only the file's header and these arrays are downloaded, if the server supports range
    requests. Nothing is cached.

    Args:
      repository: Repository, ``user/name``.
      filename: File in the repository.
      names: Names of float32 arrays. Those that the file does not have are left out.
      revision: The repository's revision, a commit.

    Returns:
      Arrays by name.

    Raises:
      DownloadError: If the file cannot be downloaded, is not a safetensors file, is of
        another revision, or is not the one of the first download; see
        `remember_arrays`.
    """
    hub = _import_hub()
    known = _read_remembered().get(f"{repository}/{filename}", {})
    url = hub.hf_hub_url(repository, filename, revision=revision)
    session = hub.get_session()
    read = _RangeReader(lambda headers: session.get(url, timeout=30, headers=headers))
    try:
        arrays = _read_safetensors(read, names)
    except (*_hub_errors(hub), FileContentError) as error:
        raise DownloadError(f"{type(error).__name__}: {error}") from error
    hashes = _hash_arrays(arrays)
    expected = known.get("sha256", hashes)
    changed = [name for name in hashes if hashes[name] != expected.get(name)]
    if changed:
        raise DownloadError(
            f"{', '.join(changed)} differ from the first download. If that is right, "
            f"delete {cache_path(_REMEMBERED)}"
        )
    if others := read.revisions - {revision}:
        raise DownloadError(f"the Hub gave revision {others.pop()}, not {revision}")
    return arrays


def remember_arrays(
    repository: str, filename: str, arrays: Mapping[str, np.ndarray], *, revision: str
) -> None:
    """Remember the hashes of arrays, to compare later downloads with them.

    They are stored in the file ``downloads.json`` of the cache, with the revision.

    Args:
      repository: As for `read_repository_arrays`.
      filename: As for `read_repository_arrays`.
      arrays: What it returned.
      revision: The revision that they were read from.

    Raises:
      RunError: If the file cannot be written.
    """
    remembered = _read_remembered()
    remembered[f"{repository}/{filename}"] = {
        "revision": revision,
        "sha256": _hash_arrays(arrays),
    }
    _files.write_json(cache_path(_REMEMBERED), remembered)


def _read_remembered() -> dict[str, Any]:
    path = cache_path(_REMEMBERED)
    try:
        remembered = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, ValueError) as error:
        raise DownloadError(f"{path} cannot be read ({error}): delete it") from error
    if not isinstance(remembered, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), dict)
        for entry in remembered.values()
    ):
        raise DownloadError(f"{path} is damaged: delete it")
    return remembered


def _hash_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: checksum({name: array}) for name, array in arrays.items()}


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub.errors  # Only downloads need it, and it is an extra.
    except ModuleNotFoundError as error:
        raise DownloadError(
            f"it needs {error.name}: pip install 'pconv-jax[hub]'"
        ) from error
    return huggingface_hub


def _hub_errors(hub: ModuleType) -> tuple[type[Exception], ...]:
    # Versions of the library differ in their HTTP client. The bases of this error are
    # the client's, which are not always OSErrors.
    client_errors = hub.errors.HfHubHTTPError.__bases__
    return (OSError, hub.errors.HFValidationError, *client_errors)


class _RangeReader:
    """Reads parts of a remote file, or all of it once if the server has no ranges."""

    def __init__(self, get: Callable[[dict[str, str]], Any]):
        self._get = get
        self.revisions: set[str] = set()
        self._whole: bytes | None = None

    def __call__(self, start: int, stop: int) -> bytes:
        data = self._read(start, stop)
        if len(data) != stop - start:
            raise FileContentError(f"got {len(data)} bytes of {stop - start}")
        return data

    def _read(self, start: int, stop: int) -> bytes:
        if self._whole is None:
            response = self._get({"Range": f"bytes={start}-{stop - 1}"})
            response.raise_for_status()
            if revision := response.headers.get("X-Repo-Commit"):
                self.revisions.add(revision)
            if response.status_code == http.HTTPStatus.PARTIAL_CONTENT:
                return response.content
            self._whole = bytes(response.content)
        return self._whole[start:stop]


def _read_safetensors(
    read: Callable[[int, int], bytes], names: Collection[str]
) -> dict[str, np.ndarray]:
    size = int.from_bytes(read(0, 8), "little")
    if size > _MAX_HEADER:
        raise FileContentError("it is not a safetensors file")
    try:
        header = json.loads(read(8, 8 + size))
    except (RecursionError, ValueError) as error:
        raise FileContentError("it is not a safetensors file") from error
    if not isinstance(header, dict):
        raise FileContentError("it is not a safetensors file")
    arrays = {}
    for name in sorted(set(names) & set(header)):
        start, stop, shape = _parse_entry(name, header[name])
        data = read(8 + size + start, 8 + size + stop)
        arrays[name] = np.frombuffer(data, "<f4").reshape(shape)
    return arrays


def _parse_entry(name: str, entry: Any) -> tuple[int, int, list[int]]:
    """Get where an array begins and ends after the header, and its shape."""
    match entry:
        case {
            "dtype": "F32",
            "shape": [*shape],
            "data_offsets": [int(start), int(stop)],
        } if all(isinstance(n, int) and n >= 0 for n in shape):
            if start >= 0 and stop - start == 4 * math.prod(shape):
                return start, stop, shape
    raise FileContentError(f"{name} is not an array of F32, but {entry!r:.100}")
