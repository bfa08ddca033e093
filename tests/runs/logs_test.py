import logging

import pytest

from pconv_jax.runs.logs import log_to_stderr

NO_DEVICE = RuntimeError("operation cuInit(0) failed: CUDA_ERROR_NO_DEVICE")
OLD_DRIVER = RuntimeError("operation cuInit(0) failed: CUDA_ERROR_SYSTEM_NOT_READY")


@pytest.mark.parametrize(
    ("level", "message", "error", "shown"),
    [
        ("INFO", "Unable to initialize backend 'tpu': no libtpu.so", None, False),
        ("ERROR", "Unable to initialize backend 'cuda': a bug", None, True),
        ("ERROR", "Jax plugin configuration error", NO_DEVICE, False),
        ("ERROR", "Jax plugin configuration error", OLD_DRIVER, True),
        ("WARNING", "An NVIDIA GPU may be present on this machine", None, True),
    ],
)
def test_missing_devices_are_no_news(level, message, error, shown, caplog):
    logger = logging.getLogger("jax._src.xla_bridge")
    filters, ours = list(logger.filters), logging.getLogger("pconv_jax")
    before = ours.level
    try:
        log_to_stderr()
        with caplog.at_level("INFO", logger.name):
            logger.log(getattr(logging, level), message, exc_info=error)
    finally:
        logger.filters[:] = filters
        ours.setLevel(before)
    assert [record.getMessage() for record in caplog.records] == [message] * shown
