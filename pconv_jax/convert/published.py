"""Files of weights where their authors published them."""

import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pconv_jax.convert.arrays import check_hash


class Published(NamedTuple):
    """A file of weights that its authors published.

    Attributes:
      url: of the file.
      name: in the cache. Ends it in ``-`` and the first eight digits of the file's
        SHA-256, then that is checked.
      variable: of the environment, that may name the file, or one of like content.
    """

    url: str
    name: str
    variable: str

    def find(self) -> Path:
        """Finds the file.

        It is looked for where the environment says, then in the cache (``PCONV_CACHE``,
        by default ``~/.cache/pconv_jax``), and at last fetched into the cache.

        Raises:
          ValueError: if there is none, in one line that says where to put it.
        """
        if path := os.environ.get(self.variable):
            return Path(path).expanduser()
        cache = Path(os.environ.get("PCONV_CACHE", "~/.cache/pconv_jax")).expanduser()
        path = cache / self.name
        if path.exists():
            return path
        try:
            _download(self.url, path)
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # It holds the connection.
            raise ValueError(
                f"There is no {self.name}: {self.url} cannot be downloaded ({error}). "
                f"On a machine with a network, fetch that file, put it here as {path}, "
                f"or name it in {self.variable}."
            ) from error
        return path


def _download(url: str, path: Path) -> None:
    """Writes a file, complete or not at all."""
    with urllib.request.urlopen(url, timeout=30) as response:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = Path(folder) / path.name
            size = int(response.headers["Content-Length"] or 0) or None
            progress = tqdm.wrapattr(response, "read", total=size, desc=path.name)
            with progress as source, open(partial, "wb") as file:
                shutil.copyfileobj(source, file)
            check_hash(partial)
            partial.replace(path)
