"""Files of weights where their authors published them."""

import os
import shutil
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pconv_jax import _files
from pconv_jax._errors import RunError
from pconv_jax.weights.formats.arrays import check_hash


class Published(NamedTuple):
    """A file of weights that its authors published.

    Attributes:
      url: of the file.
      name: in the cache. If it ends in ``-`` and eight digits, as in
        ``vgg16-397923af.pth``, the file's SHA-256 must begin with them.
      variable: of the environment, that may name the file, or one of like content.
    """

    url: str
    name: str
    variable: str


def find_published(*files: Published) -> list[Path]:
    """Finds files of weights, or downloads them.

    Each is looked for where the environment says, then in the cache (``PCONV_CACHE``,
    by default ``~/.cache/pconv_jax``), and at last fetched into the cache.

    Args:
      *files: small ones first, which saves the download of the others if one fails.

    Returns:
      A path for each.

    Raises:
      ValueError: if one cannot be had, in a line that says of all where to put them.
    """
    cache = Path(os.environ.get("PCONV_CACHE") or "~/.cache/pconv_jax").expanduser()
    paths, missing = [], []
    for file in files:
        named = os.environ.get(file.variable)
        paths.append(Path(named).expanduser() if named else cache / file.name)
        if not named and not paths[-1].exists():
            missing.append(file)
    for i, file in enumerate(missing):
        try:
            _download(file.url, cache / file.name)
        except (OSError, ValueError, RunError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # It holds the connection.
            todo = ", and ".join(
                f"{url} and put it here as {cache / name}, or name it in {variable}"
                for url, name, variable in missing[i:]
            )
            raise ValueError(
                f"There is no {file.name}, and it cannot be downloaded ({error}). On a "
                f"machine with a network, fetch {todo}."
            ) from error
    return paths


def _download(url: str, path: Path) -> None:
    """Writes a file, complete or not at all."""
    with (
        urllib.request.urlopen(url, timeout=30) as response,
        _files.atomic_path(path) as partial,
    ):
        size = int(response.headers["Content-Length"] or 0) or None
        progress = tqdm.wrapattr(response, "read", total=size, desc=path.name)
        with progress as source, open(partial, "wb") as file:
            shutil.copyfileobj(source, file)
        check_hash(path, written_to=partial)
