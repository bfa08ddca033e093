"""Log records of training and evaluation."""

import logging


def log_to_stderr() -> None:
    """Send log records of this package to the standard error, from INFO on.

    It drops JAX's records that say that this machine lacks a GPU or TPU.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("pconv_jax").setLevel(logging.INFO)
    logging.getLogger("jax._src.xla_bridge").addFilter(_tells_of_a_device)


def _tells_of_a_device(record: logging.LogRecord) -> bool:
    """Return whether a record is more than the news that there is no such device."""
    if record.getMessage().startswith("Unable to initialize backend"):
        return record.levelno > logging.INFO
    # What jax[cuda] raises where there is no GPU. A wrong driver has other messages.
    error = record.exc_info and record.exc_info[1]
    return "CUDA_ERROR_NO_DEVICE" not in str(error)
