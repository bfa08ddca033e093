"""Files: written atomically, found in folders, opened only if they are files.

Libraries raise errors of many kinds for the content of a file. `content_errors` turns
them into one kind, which the caller that knows the path turns into a `UserError`.
"""

import contextlib
import errno
import json
import os
import stat
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pconv_jax._errors import RunError, UserError

MAX_PIXELS = 100_000_000
"""Default limit of an image's number of pixels, for all that read image files."""


class FileContentError(ValueError):
    """A file is damaged, or has content that cannot be used.

    The message is a clause about the file, without a period: ``it is truncated``.
    """


@contextlib.contextmanager
def content_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what a library raises for the content of a file into `FileContentError`.

    The kinds may be many. So the body should contain calls of the library only, and no
    code of this package, whose bugs would look like damaged files.

    Args:
      *kinds: What the library raises.

    Raises:
      FileContentError: If the library raises one of them.
    """
    try:
        yield
    except kinds as error:
        raise FileContentError(describe_error(error)) from error


def describe_error(error: Exception) -> str:
    """Describe an error of the system or of a library, without a period."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rstrip(".") or type(error).__name__


def cache_folder() -> Path:
    """Find the folder of downloaded weights and compiled programs.

    It is ``PCONV_CACHE``, by default ``pconv_jax`` where programs of the user keep
    their caches: in ``XDG_CACHE_HOME`` or ``~/.cache``, on macOS in
    ``~/Library/Caches``, and on Windows in ``LOCALAPPDATA``.

    Raises:
      UserError: If ``PCONV_CACHE`` is not set, and the user has no home.
    """
    if folder := os.environ.get("PCONV_CACHE"):
        return as_path(folder)
    try:
        return _cache_home(sys.platform, os.environ) / "pconv_jax"
    except RuntimeError as error:
        raise UserError(
            "PCONV_CACHE must name a folder for caches, since the user has no home."
        ) from error


def _cache_home(system: str, environment: Mapping[str, str]) -> Path:
    """Find the folder in which programs of the user keep caches.

    Args:
      system: As `sys.platform`.
      environment: As `os.environ`.

    Raises:
      RuntimeError: If the user has no home.
    """
    if system == "win32":
        local = environment.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if system == "darwin":
        return Path.home() / "Library" / "Caches"
    folder = environment.get("XDG_CACHE_HOME", "")
    # The specification ignores relative paths.
    return Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"


def as_path(path: str | os.PathLike[str]) -> Path:
    """Convert to a path. In a string, a leading ``~`` is the home folder."""
    return Path(os.path.expanduser(path) if isinstance(path, str) else path)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path leads to a file, and not to something that may wait forever.

    Raises:
      OSError: If there is nothing, or it is a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("it is not a file, but a pipe, a socket or a device")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Read a file, but never open a pipe, a socket or a device.

    Raises:
      OSError: If it cannot be read.
    """
    check_regular(path)
    return Path(path).read_bytes()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file that appears complete or not at all, even if the power fails.

    Missing folders above it are made. A file that is already there stays until the new
    one is complete, which gets its permissions. A link stays a link: the file that it
    leads to is written. Pipes, sockets and devices are not replaced.

    Args:
      path: Path of the file.

    Yields:
      The path to write to, in the folder of the file.

    Raises:
      RunError: If the folder or the file cannot be written. Exceptions of the body are
        raised unchanged.
    """
    # The name is short, since the file's own may have the maximum length. `tempfile` is
    # not used because its files are readable by their owner only.
    with write_errors(path):
        target = Path(os.path.realpath(path))
        if os.path.lexists(target):  # Else, links that go round would be replaced.
            check_regular(target)
        partial = target.parent / f".{uuid.uuid4().hex}.partial"
        _make_folder(target.parent)
    try:
        yield partial
        with write_errors(path):
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            _sync(partial, os.O_RDWR)
            partial.replace(target)
        sync_folder(target.parent)
    finally:
        # An error here, such as a file above the folder, would hide the one before it.
        with contextlib.suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as `atomic_path` does.

    Raises:
      RunError: If the file cannot be written.
    """
    with write_errors(path), atomic_path(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all.

    Raises:
      RunError: If the file cannot be written.
    """
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system in the body into one that names the file.

    Raises:
      RunError: If the body raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {describe_error(error)}.") from error


def check_free(path: Path, *, force: bool) -> None:
    """Check that no file is at a path, unless it may be replaced.

    Raises:
      UserError: If there is one.
    """
    if os.path.exists(path) and not force:
        raise UserError(f"there is a file {path} already; --force replaces it.")


def remove_partials(folder: Path, *, below: bool = False) -> None:
    """Remove what `atomic_path` has left in a folder when it was killed.

    No other process may be writing there.

    Args:
      folder: The folder.
      below: Whether to remove it in all folders below, too. The default is False.
    """
    pattern = f".{'[0-9a-f]' * 32}.partial"
    for path in folder.rglob(pattern) if below else folder.glob(pattern):
        with contextlib.suppress(OSError):
            path.unlink()


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    nearest = missing[-1].parent if missing else folder
    if not nearest.is_dir():  # The system says only that a file exists.
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on disk."""
    # What is in it is already there. Some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def iter_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Find the files of a folder and of all folders below it, including linked ones.

    Hidden files and folders (``.name``) are skipped. Each folder is read once, at its
    first place in alphabetical order, even if links lead to it again. Otherwise one
    image could count as several, some of them for training and others for evaluation.

    Args:
      folder: Folder to search. It may be hidden itself.

    Yields:
      Paths that start with ``folder``. Nothing if the folder does not exist.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk visits the folders in the order of this list.
        folders[:] = sorted(filter(_is_visible, folders))
        yield from (Path(place, name) for name in filter(_is_visible, names))


def _is_visible(name: str) -> bool:
    return not name.startswith(".")
