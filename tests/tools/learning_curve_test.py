import json

import pytest

from tools import learning_curve


def write_run(workdir, batch_size, psnr):
    workdir.mkdir()
    config = {"batch_size": batch_size, "image_size": 64}
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [{"step": 5, "train/total": 1.0}]
    lines += [{"step": s, "validation/psnr": p} for s, p in psnr.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text)
    return workdir


def test_a_run_goes_on_where_the_one_before_it_ended(tmp_path):
    first = write_run(tmp_path / "first", 8, {10: 20.0, 20: 21.0})
    second = write_run(tmp_path / "second", 4, {100: 22.5})
    figure = learning_curve.draw([first, second], "psnr")
    lines = figure.axes[0].get_lines()
    curves = [list(zip(*line.get_data())) for line in lines]
    assert curves == [[(0.08, 20.0), (0.16, 21.0)], [(0.56, 22.5)]]
    figure.savefig(tmp_path / "curve.svg")
    assert "second, 64 x 64" in [line.get_label() for line in lines]
    with pytest.raises(ValueError, match="no validation/ssim"):
        learning_curve.draw([first], "ssim")
