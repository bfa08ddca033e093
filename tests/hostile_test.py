import functools
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import faults
from tests.helpers import hostile

pytestmark = pytest.mark.usefixtures("fast_compilation")

NAMES = (
    *(f"image{s}" for s in (".png", ".jpg", ".webp", ".bmp", ".gif", ".avif", ".jp2")),
    *("image.tif", "image.npy", "mask", "mask folder", "training image", "tar"),
    *("weights file", "safetensors", "npz", "h5", "pth", "config.json", "records"),
)

# Seeds of files at which a reader once failed otherwise than by a sentence, or took
# more than 1 GB.
FOUND = [("mask folder", 185), ("mask folder", 202)]


@functools.cache
def readers():
    return hostile.readers()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=50,
    deadline=10_000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_hostile_files_end_in_a_sentence(name, seed, tmp_path, monkeypatch):
    logging.disable(logging.CRITICAL)
    try:
        _, error = hostile.attempt(readers()[name], seed, tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    assert error is None


@pytest.mark.parametrize(("name", "seed"), FOUND)
def test_files_that_were_found(name, seed, tmp_path):
    _, error = hostile.attempt(readers()[name], seed, tmp_path)
    assert error is None


def test_every_reader_is_tested():
    assert set(NAMES) == set(readers())


# Orbax gives up at the first damaged array; TensorStore then finds its loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_cost_nothing(tmp_path):
    steps = list(faults.FAULTS["checkpoints"].inject(tmp_path, range(20)))
    assert steps == [(1, [])] * 20


def test_the_program_of_faults_reads_in_a_process_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(faults.sys, "argv", ["faults", "--reader", "npz"])
    monkeypatch.setattr(
        faults.sys, "argv", [*faults.sys.argv, "--first=0", "--count=3"]
    )
    faults.main()
    assert json.loads(capsys.readouterr().out) == []
    logging.disable(logging.NOTSET)


def test_a_recorded_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    seen = []

    def inject(folder, numbers):
        for number in numbers:
            seen.append(number)
            yield 1, ["a weight"] if number == 1 else []

    fault = faults.FAULTS["uploads"]._replace(inject=inject)
    monkeypatch.setitem(faults.FAULTS, "uploads", fault)
    record = tmp_path / "record.json"
    for count in (2, 5):
        flags = ["--only=uploads", f"--count={count}", f"--record={record}"]
        monkeypatch.setattr(faults.sys, "argv", ["faults", *flags])
        with pytest.raises(SystemExit, match="True"):
            faults.main()
    assert seen == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.endswith("| 5 | 1: a weight |\n")
    logging.disable(logging.NOTSET)
