"""What several test modules share."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TESTDATA = ROOT / "tests" / "testdata"
