import numpy as np

from pconv_jax.runs.tables import format_table

ROWS = [
    {"hole": "0.01-0.1", "psnr": 28.32, "images": 1000},
    {"hole": "all", "psnr": np.float32(7.125), "images": 6, "note": "w/o border"},
    {"hole": "none", "psnr": float("nan"), "images": None},
]


def test_plain_table():
    assert format_table(ROWS, decimals=2) == (
        "hole       psnr  images  note\n"
        "--------  -----  ------  ----------\n"
        "0.01-0.1  28.32    1000\n"
        "all        7.12       6  w/o border\n"
        "none        nan"
    )


def test_markdown_table():
    assert format_table(ROWS, decimals=2, markdown=True) == (
        "| hole     |  psnr | images | note       |\n"
        "| -------- | ----: | -----: | ---------- |\n"
        "| 0.01-0.1 | 28.32 |   1000 |            |\n"
        "| all      |  7.12 |      6 | w/o border |\n"
        "| none     |   nan |        |            |"
    )


def test_empty_table():
    assert format_table([]) == ""
    assert format_table([{"a": None}]).split() == ["a", "---"]
