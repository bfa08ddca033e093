"""The methods that an evaluation compares: networks and classical baselines.

A method fills images, uint8 ``[N, H, W, 3]``, with masks, uint8 ``[N, H, W, 1]``,
1 = valid and 0 = hole. In the composite, the truth replaces its valid pixels.
"""

import functools
import hashlib
import json
import re
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np

from pconv_jax._errors import UserError
from pconv_jax.evaluate.baselines import classical
from pconv_jax.evaluate.baselines.worker import Worker
from pconv_jax.inpaint import inpainter
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.runs import parallel
from pconv_jax.runs.inference import fill_step
from pconv_jax.runs.opening import load_network
from pconv_jax.unet import PConvUNet
from pconv_jax.weights.network_config import model_config


class InpaintResult(NamedTuple):
    """Images that a method filled.

    Attributes:
      images: uint8 ``[N, H, W, 3]``.
      seconds: Wall time of each image, ``[N]``.
      errors: Why the method failed on an image, or ''; N of them.
    """

    images: np.ndarray
    seconds: np.ndarray
    errors: list[str]


class Method(Protocol):
    """A method to compare."""

    @property
    def name(self) -> str:
        """Name in tables and file names."""
        ...

    @property
    def description(self) -> str:
        """A sentence about the method."""
        ...

    @property
    def model(self) -> PConvUNet | None:
        """The network, or None for a baseline.

        Of a network, the raw output is scored too, valid pixels included.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Text that identifies everything the results depend on."""
        ...

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """Fill holes; report an image that cannot be filled in ``errors``."""
        ...

    def close(self) -> None:
        """Release resources."""
        ...


class Network:
    """A network that fills one image at a time on each device, by default.

    Attributes:
      name: See `Method`, like the next two.
      description: See there.
      model: See there.
      device_batch: Number of images that a device fills at a time.
    """

    def __init__(
        self,
        name: str,
        model: PConvUNet,
        variables: Mapping[str, Any],
        *,
        description: str = "",
        info: Mapping[str, Any] | None = None,
        device_batch: int = 1,
    ):
        """Put the network on the devices.

        Args:
          name: Name in tables and file names.
          model: The network.
          variables: Its ``params`` and ``batch_stats``.
          description: A sentence about it; by default one that names its convolutions.
          info: Facts of its weights file, for `Inpainter`. By default there are none.
          device_batch: Number of images that a device fills at a time. The default is
            1, with which results do not depend on the other images.
        """
        self.name = name
        self.description = description or f"A network ({model.conv} convolutions)."
        self.model = model
        self.device_batch = device_batch
        self._info = info
        self._variables = parallel.replicate(variables)
        self._shapes: set[tuple[int, ...]] = set()

    @property
    def fingerprint(self) -> str:
        """See `Method`."""
        if self.device_batch > 1:  # It changes the last bits.
            return f"{self.digest} {self.device_batch} at a time"
        return self.digest

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the network and its weights."""
        digest = hashlib.blake2b(digest_size=16)
        config = [model_config(self.model), str(self.model.dtype)]
        digest.update(json.dumps(config).encode())
        for path, leaf in jax.tree.leaves_with_path(self._variables):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """See `Method`."""
        step = compile_fill_step(self.model)
        fill = functools.partial(step, self._variables, at_a_time=self.device_batch)
        if images.shape[1:] not in self._shapes:  # The time is without compilation.
            fill({"image": images[:1], "mask": mask[:1]})
            self._shapes.add(images.shape[1:])
        start = time.perf_counter()
        filled = fill({"image": images, "mask": mask})
        seconds = (time.perf_counter() - start) / len(images)
        errors = ["" if ok else "its output is not finite" for ok in filled["finite"]]
        return InpaintResult(filled["output"], np.full(len(images), seconds), errors)

    def to_inpainter(self) -> Inpainter:
        """Make an inpainter of the network."""
        return Inpainter(self.model, self._variables, info=self._info)

    def close(self) -> None:
        """See `Method`."""


_REPAIRS = {
    "repair": "The network from coarse to fine, with detail: pconv_jax.Inpainter.",
    "sharp": "The same, with pieces of the image in wide holes: pconv inpaint.",
}


class Repair:
    """A network as `Inpainter` uses it, from coarse to fine and with detail."""

    model = None  # Its valid pixels are those of the image.

    def __init__(self, network: Network, *, sharp: bool = False):
        """Prepare to repair with a network.

        Args:
          network: The network.
          sharp: See `Inpainter`. The default is False.
        """
        self.name = "sharp" if sharp else "repair"
        self.description = _REPAIRS[self.name]
        self._sharp = sharp
        self._inpainter = network.to_inpainter()
        # Its results also depend on code that changes: on part of this package.
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(Path(inpainter.__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
        depth = f"trusted depth {self._inpainter.trusted_depth}"
        self.fingerprint = f"{network.fingerprint} {depth} {digest.hexdigest()}"

    def fill(self, images: np.ndarray, mask: np.ndarray) -> InpaintResult:
        """See `Method`."""
        compiled = _compilations()
        results = []
        for image, hole in zip(images, mask[..., 0] == 0):
            before = len(compiled)
            result = self._fill_one(image, hole)
            if len(compiled) > before:  # The time is without compilation.
                result = self._fill_one(image, hole)
            results.append(result)
        filled, seconds, errors = zip(*results)
        return InpaintResult(np.stack(filled), np.array(seconds), list(errors))

    def close(self) -> None:
        """See `Method`."""

    def _fill_one(
        self, image: np.ndarray, hole: np.ndarray
    ) -> tuple[np.ndarray, float, str]:
        """Fill an image; return it, the seconds and why it failed, or ''."""
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():  # Of large holes, which are meant here.
                warnings.simplefilter("ignore", UserWarning)
                filled, error = self._inpainter(image, hole, sharp=self._sharp), ""
        except UserError as failure:  # For example, no pixel is valid.
            filled, error = np.zeros_like(image), str(failure)
        return filled, time.perf_counter() - start, error


class Baseline:
    """A classical method of ``baselines.classical``, on one core in its own process."""

    model = None

    def __init__(self, name: str, *, time_budget: float = 60.0):
        """Describe the baseline; its process starts with the first image.

        Args:
          name: One of `classical.BASELINES`.
          time_budget: Seconds that an image may take. The default is 60. A longer time
            counts as a failure.
        """
        self.name = name
        self.description = classical.DESCRIPTIONS[name]
        # An image that fails within a small budget may succeed within a larger one.
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
        """End the process."""
        self._worker.close()


def get_methods(
    specs: Sequence[str], network: Network | None, *, time_budget: float
) -> list[Method]:
    """Create methods from their specifications.

    Args:
      specs: Names of baselines; ``network`` or its name; ``repair`` and ``sharp`` for
        `Repair` with it; ``NAME=PATH`` for other networks, where PATH is a run's
        directory or weights; ``all`` for ``network`` and all baselines.
      network: The evaluated network, if there is one.
      time_budget: Seconds that a baseline may take for an image.

    Raises:
      UserError: If a method is unknown or repeated, or if there is none.
    """
    every = (["network"] if network else []) + list(classical.BASELINES)
    names = [n for spec in specs for n in (every if spec == "all" else [spec])]
    methods = [_get_method(name, network, time_budget) for name in names]
    names = [method.name for method in methods]
    if len(set(names)) < len(names) or not names:
        raise UserError(
            f"methods must be non-empty and unique, got {', '.join(specs) or 'none'}."
        )
    return methods


def network_name(model: PConvUNet) -> str:
    """Get the default name of a network in tables, ``'pconv'`` or ``'conv'``."""
    return "pconv" if model.conv == "partial" else "conv"


def compile_fill_step(model: PConvUNet) -> parallel.EvalStep:
    """Compile ``inference.fill_step`` of a network for all devices, once."""
    # Flax modules are hashable, but Flax's annotations hide it.
    return _compile_fill_step(cast(Hashable, model))


@functools.lru_cache(maxsize=8)
def _compile_fill_step(model: Any) -> parallel.EvalStep:
    return parallel.compile_eval_step(functools.partial(fill_step, model=model))


@functools.cache
def _compilations() -> list[str]:
    """Get a list that grows with every compilation by JAX, from the first call on.

    The shapes that `Inpainter` compiles for depend on the hole. So only JAX knows
    whether it compiled.
    """
    events: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return events


def _get_method(spec: str, network: Network | None, time_budget: float) -> Method:
    name, is_other, path = spec.partition("=")
    if is_other:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(
                f"methods: the name in {spec!r} may contain only letters, digits, '.', "
                "'_' and '-'."
            )
        other = load_network(path)
        about = f"A network ({other.model.conv} convolutions) from {path}."
        return Network(
            name,
            other.model,
            other.variables,
            description=about,
            info=other.info,
            device_batch=network.device_batch if network else 1,
        )
    if network and name in ("network", network.name):
        return network
    if network and name in _REPAIRS:
        return Repair(network, sharp=name == "sharp")
    if name in classical.BASELINES:
        return Baseline(name, time_budget=time_budget)
    of_network = ["network", *_REPAIRS] if network else []
    raise UserError(
        f"methods: {name!r} is unknown; use "
        f"{', '.join([*of_network, *classical.BASELINES])}, all, or NAME=PATH for "
        "another network."
    )
