"""Devices and processes: the only module that uses ``jax.pmap`` and JAX's hosts.

A process holds a state once, without a leading device axis, and a call divides its
batch among the devices. So code outside this module never handles a device axis.
"""

import contextlib
import functools
import operator
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pconv_jax._errors import UserError

AXIS = "batch"


def initialize(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join this process to a run on several hosts.

    Every process calls this once, before anything touches a device. On most clusters
    `jax.distributed.initialize` finds the arguments itself.

    Args:
      coordinator_address: Host and port of process number 0.
      num_processes: Number of processes.
      process_id: Index of this process.

    Raises:
      UserError: If the other processes cannot be found or reached.
    """
    options: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if coordinator_address is not None and process_id == 0:
        # Otherwise JAX listens on all addresses of this machine.
        options["coordinator_bind_address"] = coordinator_address
    try:
        _wait_for(functools.partial(jax.distributed.initialize, **options))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"coordinator_address = {coordinator_address!r}, num_processes = "
            f"{num_processes}, process_id = {process_id}: {error}"
        ) from error


def _wait_for(function: Callable[[], None]) -> None:
    """Call a function that waits without listening to Ctrl-C."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]


def process_index() -> int:
    """Return the index of this process among `process_count`."""
    return jax.process_index()


def process_count() -> int:
    """Return the number of processes that share the run."""
    return jax.process_count()


def device_count() -> int:
    """Return the number of devices of all processes."""
    return jax.device_count()


def check_batch_size(batch_size: int, *, parts: int = 1) -> None:
    """Check that a batch can be divided among the devices.

    Args:
      batch_size: Size of the batch on all devices together.
      parts: Number of parts that each device divides its share into. The default is
        one.

    Raises:
      UserError: If it cannot; the message suggests the nearest sizes that can.
    """
    devices = device_count()
    shares = devices * parts
    if batch_size < 1 or batch_size % shares:
        below, above = batch_size // shares * shares, -(-batch_size // shares) * shares
        sizes = " or ".join(str(n) for n in (below, above) if n > 0) or str(shares)
        each = f" of {parts} parts each" if parts > 1 else ""
        raise UserError(
            f"batch_size = {batch_size} cannot be divided among {devices} devices"
            f"{each}: use {sizes}, or fewer devices."
        )


def replicate(tree: Any) -> Any:
    """Put a tree of host or device arrays on every device of this process."""
    # Through the host: a copy to several devices may share the buffers of its source,
    # and donating the copy would then delete the source.
    tree = jax.tree.map(np.asarray, tree)
    return jax.device_put(tree, _replicated())


def compile_train_step(
    step: Callable[..., Any], *, batch_axis: int = 0
) -> Callable[..., Any]:
    """Compile ``step(state, batch, extra, *, axis_name)`` for all devices.

    The state is donated: the one passed in is gone after the call.

    Args:
      step: The function of one device. ``axis_name`` is the axis that divides the
        batch, or None on a single device.
      batch_axis: Devices divide a batch along this axis. The default is 0.

    Returns:
      A function ``(state, batch, extra) -> (state, scalars)``. The batch is this
      process's share; the scalars are means over the batch of all processes.
    """
    if device_count() == 1:
        return jax.jit(step, donate_argnums=0)
    mapped = jax.pmap(
        functools.partial(step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, batch_axis, None),
        out_axes=(None, None),
        donate_argnums=0,
    )
    return lambda state, batch, extra: mapped(state, _divide(batch, batch_axis), extra)


class EvalStep(Protocol):
    """A step of evaluation, compiled by `compile_eval_step`."""

    def __call__(
        self, variables: Any, batch: Mapping[str, Any], *, at_a_time: int = 1
    ) -> Any:
        """Apply the step to this process's share of a batch.

        Args:
          variables: The first argument of the step.
          batch: Arrays. The first axis is the batch, and may have any length.
          at_a_time: Number of examples that a device computes at a time. The default
            is 1.

        Returns:
          The results for all examples, as NumPy arrays.
        """
        ...


def compile_eval_step(step: Callable[[Any, Any], Any]) -> EvalStep:
    """Compile ``step(variables, batch)``, whose results have a leading batch axis.

    By default each device computes one example at a time. So the result for an example
    depends neither on the other examples nor on the number of devices; on CPUs, not
    even in the last bit. Accelerators are faster with more at a time.

    Args:
      step: The function of one device.

    Returns:
      A function of the same arguments, and of ``at_a_time``.
    """
    local = jax.local_device_count()
    if local == 1:
        run = jax.jit(step)
    else:
        mapped = jax.pmap(step, in_axes=(None, 0), devices=jax.local_devices())

        def run(variables: Any, batch: Mapping[str, Any]) -> Any:
            return mapped(variables, _divide(batch))

    def run_all(variables: Any, batch: Mapping[str, Any], *, at_a_time: int = 1) -> Any:
        size, together = len(jax.tree.leaves(batch)[0]), local * at_a_time
        # The last round repeats the last example.
        rounds = np.minimum(np.arange(size + -size % together), size - 1)
        examples = (
            jax.tree.map(operator.itemgetter(numbers), batch)
            for numbers in rounds.reshape(-1, together)
        )
        # All rounds are started before the first is awaited, so that devices do not
        # wait for the host.
        results = jax.device_get([run(variables, x) for x in examples])
        if local > 1:  # Join what the devices computed.
            results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
        return jax.tree.map(lambda *x: np.concatenate(x)[:size], *results)

    return run_all


def gather(tree: Any) -> Any:
    """Join the arrays of all processes along the leading axis, as NumPy arrays."""
    tree = jax.tree.map(np.asarray, tree)
    if process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def own_share(array: np.ndarray) -> np.ndarray:
    """Cut this process's part out of an array that all processes hold.

    `gather` joins the parts again.
    """
    return np.split(array, process_count())[process_index()]


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Listen for requests to stop.

    SIGTERM or Ctrl-C asks the run to stop after the step at hand; a second Ctrl-C
    interrupts it at once. With several processes only SIGTERM asks, and one of them is
    enough: all stop after the same step.

    Yields:
      A function of the step that tells whether the run should stop. It must be called
      after every step.
    """
    if process_count() > 1:
        # JAX handles SIGTERM, to agree with the other processes on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Only the main thread may handle signals.
        return
    asked = threading.Event()

    def ask(number, frame):
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _divide(batch: Any, axis: int = 0) -> Any:
    local = jax.local_device_count()
    return jax.tree.map(
        lambda x: x.reshape(*x.shape[:axis], local, -1, *x.shape[axis + 1 :]), batch
    )


def _replicated() -> NamedSharding:
    # With another axis name than pmap's, pmap would compile a second time.
    return NamedSharding(Mesh(jax.local_devices(), (AXIS,)), PartitionSpec())
