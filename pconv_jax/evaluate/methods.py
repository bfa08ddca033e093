"""What is compared: networks, and what one would use without any.

A method fills pictures, uint8 ``[N, H, W, 3]``, with masks, uint8 ``[N, H, W, 1]``,
1 = valid, 0 = hole. What it gives for valid pixels is replaced by the truth in the
composite.
"""

import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from pconv_jax import unet
from pconv_jax.evaluate.baselines import classical
from pconv_jax.evaluate.baselines.worker import Worker
from pconv_jax.runs import parallel
from pconv_jax.runs.inference import fill_step
from pconv_jax.runs.opening import load_network
from pconv_jax.unet import PConvUNet


class InpaintResult(NamedTuple):
    """What a method made of pictures.

    Attributes:
      pictures: uint8 ``[N, H, W, 3]``.
      seconds: wall time of each, ``[N]``.
      errors: why the method failed on a picture, or ''; N of them.
    """

    pictures: np.ndarray
    seconds: np.ndarray
    errors: list[str]


class Method(Protocol):
    """A method to compare.

    Attributes:
      name: in tables and files.
      description: a sentence about it.
      is_network: whether valid pixels of what it gives are its own, too.
      fingerprint: a digest of all that determines what it gives.
    """

    name: str
    description: str
    is_network: bool
    fingerprint: str

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """Fills holes. A picture that cannot be filled is told of in `errors`."""

    def close(self) -> None:
        """Lets go of what the method holds on to."""


class Network:
    """A network, run on one picture at a time on each device."""

    is_network = True

    def __init__(
        self,
        name: str,
        model: PConvUNet,
        variables: Mapping[str, Any],
        *,
        description: str = "",
    ):
        """Puts the network on the devices.

        Args:
          name: see `Method`.
          model: the network.
          variables: its ``params`` and ``batch_stats``.
          description: see `Method`.
        """
        self.name = name
        self.description = description or f"A network ({model.conv} convolutions)."
        self.model = model
        self.variables = parallel.replicate(variables)
        self._shapes: set[tuple[int, ...]] = set()

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `Method`."""
        digest = hashlib.blake2b(digest_size=16)
        config = unet.model_config(self.model), str(self.model.dtype)
        digest.update(json.dumps(config).encode())
        for path, leaf in jax.tree.leaves_with_path(self.variables):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """See `Method`."""
        step = compile_fill_step(self.model)
        if images.shape[1:] not in self._shapes:  # Compiled before it is timed.
            step(self.variables, {"image": images[:1], "mask": mask[:1]})
            self._shapes.add(images.shape[1:])
        start = time.perf_counter()
        filled = step(self.variables, {"image": images, "mask": mask})
        seconds = (time.perf_counter() - start) / len(images)
        errors = ["" if ok else "its output is not finite" for ok in filled["finite"]]
        return InpaintResult(filled["output"], np.full(len(images), seconds), errors)

    def close(self) -> None:
        """See `Method`."""


class Classical:
    """A method of `baselines.classical`, in a process of its own, on one core."""

    is_network = False

    def __init__(self, name: str, *, time_budget: float = 60.0):
        """Starts nothing yet.

        Args:
          name: one of `classical.METHODS`.
          time_budget: seconds that a picture may take before it counts as a failure.
        """
        self.name = name
        self.description = classical.DESCRIPTIONS[name]
        # Of the budget, too: a failure within a small one is none within a large one.
        parts = (name, self.description, f"{time_budget:g}", classical.versions())
        self.fingerprint = " ".join(parts)
        self._worker = Worker(name, time_budget=time_budget)

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """See `Method`."""
        results = [self._worker.fill(*pair) for pair in zip(images, mask)]
        blank = np.zeros_like(images[0])
        return InpaintResult(
            np.stack([blank if r.image is None else r.image for r in results]),
            np.array([r.seconds for r in results]),
            [r.error for r in results],
        )

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()


def get_methods(
    specs: Sequence[str], network: Network | None, *, time_budget: float
) -> list[Method]:
    """Returns the methods that are asked for.

    Args:
      specs: names of classical methods; the network's name; ``NAME=PATH`` for others,
        PATH a workdir or a release; ``all`` for the network and all classical ones.
      network: the network that is evaluated.
      time_budget: see `Classical`.

    Raises:
      ValueError: if one is unknown or asked for twice, or there is none.
    """
    known = ([network.name] if network else []) + list(classical.METHODS)
    names = [n for spec in specs for n in (known if spec == "all" else [spec])]
    methods: list[Method] = []
    for spec in names:
        name, is_other, path = spec.partition("=")
        if is_other:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"methods: the name in {spec!r} may have letters, digits, '.', '_' "
                    "and '-'."
                )
            other = load_network(path)
            about = f"A network ({other.model.conv} convolutions) from {path}."
            methods.append(
                Network(name, other.model, other.variables, description=about)
            )
        elif network and name == network.name:
            methods.append(network)
        elif name in classical.METHODS:
            methods.append(Classical(name, time_budget=time_budget))
        else:
            raise ValueError(
                f"methods: {name!r} is unknown; there are {', '.join(known)}, 'all', "
                "and NAME=PATH for other networks."
            )
    names = [method.name for method in methods]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"methods must be some, each once, got {', '.join(specs)}.")
    return methods


@functools.lru_cache(maxsize=8)
def compile_fill_step(model: PConvUNet) -> Any:
    """Returns `inference.fill_step` of a network, for all devices."""
    return parallel.compile_eval_step(functools.partial(fill_step, model=model))
