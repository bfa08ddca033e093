"""The interface of image sources."""

import abc
import hashlib
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pconv_jax import _files
from pconv_jax.data.decode import UnreadableImageError, decode_image


class ImageSource(abc.ABC):
    """A random-access collection of images that can be pickled for worker processes.

    ``source[i]`` is image i, uint8 ``[H, W, 3]`` in RGB. If the image cannot be read,
    it raises `UnreadableImageError`, which names the image.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Get the number of images, readable or not."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Read the encoded bytes of an image."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Get the name of an image, for messages."""

    def key(self, index: int) -> str:
        """Get a name of an image that does not change when its source is moved."""
        return self.name(index)

    def digest(self) -> str:
        """Compute a digest of the keys of all images, in their order."""
        return digest_names(map(self.key, range(len(self))))

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            data = self.read(index)
        except OSError as error:
            message = f"cannot read {self.name(index)}: {_files.describe_error(error)}."
            raise UnreadableImageError(message) from error
        return decode_image(data, self.name(index))


def digest_names(names: Iterable[str]) -> str:
    """Compute a digest of names, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


class Span(NamedTuple):
    """A part of a file. No file stays open, so a span can be pickled and forked."""

    path: str
    offset: int
    size: int


def read_span(span: Span) -> bytes:
    """Read a part of a file; it is shorter than the span if the file ends early."""
    with open(span.path, "rb") as file:
        room = os.fstat(file.fileno()).st_size - span.offset
        file.seek(span.offset)
        return file.read(max(min(span.size, room), 0))
