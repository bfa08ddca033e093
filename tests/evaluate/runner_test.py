import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest
import skimage.metrics
from flax import traverse_util
from safetensors.numpy import save_file

from pconv_jax import masks, vgg
from pconv_jax._errors import UserError
from pconv_jax.data import pipeline
from pconv_jax.evaluate import methods, runner
from pconv_jax.evaluate.eval_set import (
    BIN_CLASSES,
    BINS,
    EvalSet,
    draw_masks,
)
from pconv_jax.evaluate.runner import EvalData
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.metrics import lpips
from pconv_jax.runs import opening
from pconv_jax.runs.checkpoint import Checkpoints
from pconv_jax.runs.config import default_config, read_settings
from pconv_jax.unet import PConvUNet
from pconv_jax.weights import pretrained
from tests.helpers import ROOT
from tests.helpers.commands import training_environment
from tests.helpers.evaluation import (
    SIZE,
    bundled,
    make_eval_set,
    write_mask_folder,
)
from tests.helpers.networks import make_network

pytestmark = pytest.mark.usefixtures("fast_compilation")


MODEL = PConvUNet(depth=2, width=4)


def test_every_class_of_masks_has_its_examples(evaluation):
    classes = [(e["hole"], e["border"], e["index"]) for e in evaluation.examples]
    assert classes == [(b, border, i) for b, border in BIN_CLASSES for i in range(5)]
    for example in evaluation.examples:
        low, high = masks.HOLE_BINS[BINS.index(example["hole"])]
        assert low - 0.002 < example["hole_ratio"] <= high + 1e-6
        assert example["picture"] == example["index"] % 2  # There are two.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["bins", "narrow"]}, "some of bins, thin, wide, got narrow"),
        ({"classes": []}, "some of bins, thin, wide, got none"),
        ({"classes": ["thin"], "masks": "m"}, "masks names a folder"),
    ],
)
def test_mistakes_in_classes(run, options, message):
    with pytest.raises(ValueError, match=message):
        runner.evaluate_run(run, data=EvalData(**options), learned=False)


def test_metrics_equal_those_computed_by_hand(evaluation, variables):
    """One example, done again by hand."""
    (example,) = evaluation.select(hole=BINS[3], border=True, index=1)
    image = next(pipeline.eval_batches(bundled(), batch_size=2, image_size=SIZE))[
        "image"
    ]
    image = image[1:]
    mask = draw_masks(np.array([1]), BINS[3], True, SIZE)
    truth = (image / 127.5 - 1).astype(np.float32)
    output, _ = jax.jit(MODEL.apply)(variables, truth, mask)
    output = np.rint((np.clip(output, -1, 1) + 1) * 127.5) / 255
    comp, truth = np.where(mask == 1, image / 255, output), image / 255
    for prefix, filled in {"": comp, "output_": output}.items():
        error = np.abs(filled - truth)
        ssim = skimage.metrics.structural_similarity(
            filled[0],
            truth[0],
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        psnr = skimage.metrics.peak_signal_noise_ratio(truth, filled, data_range=1)
        assert example[f"{prefix}l1"] == pytest.approx(100 * error.mean(), rel=1e-4)
        assert example[f"{prefix}psnr"] == pytest.approx(psnr, rel=1e-4)
        assert example[f"{prefix}ssim"] == pytest.approx(ssim, abs=1e-4)
    hole = np.abs(comp - truth)[mask[..., 0] == 0].mean()
    assert example["l1_hole"] == pytest.approx(100 * hole, rel=1e-4)


def test_output_that_is_not_finite_is_a_failure(variables):
    broken = jax.tree.map(np.copy, variables)
    broken["params"]["pconv4"]["bias"][0] = np.nan
    evaluation = runner.evaluate_network(
        MODEL, broken, bundled(), image_size=SIZE, examples=1, progress=False
    )
    assert not evaluation.examples and len(evaluation.failures) == 12
    assert evaluation.mean() == {}
    assert "not finite" in str(evaluation)


def test_unsuitable_sizes_are_refused(variables):
    with pytest.raises(ValueError, match="image_size = 34 .* use 32 or 36"):
        runner.evaluate_network(MODEL, variables, bundled(), image_size=34, examples=1)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        make_eval_set(image_size=8)
    with pytest.raises(ValueError, match="examples must be positive, got 0"):
        make_eval_set(examples=0)


def tiny_config():
    config = default_config()
    config.update_from_flattened_dict(
        {"image_size": SIZE, "batch_size": 4, "model.depth": 2, "model.width": 4}
        | {"evaluation_examples": 2}
    )
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, variables):
    workdir = tmp_path_factory.mktemp("run")
    meta = {"config": tiny_config().to_dict(), "warnings": ["a warning"]}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, dict(variables) | {"average": {}}, meta=meta)
    return workdir


def test_a_run_is_evaluated_as_it_was_trained(run):
    evaluation = runner.evaluate_run(run, learned=False)
    out = run / "evaluation"
    results = json.loads((out / "results.json").read_text())
    assert results["step"] == 7 and results["warnings"] == ["a warning"]
    assert results["table"] == evaluation.table()
    assert evaluation.methods == ["pconv", "mean", "telea", "navier_stokes"]
    assert len(results["examples"]) == 4 * 28
    assert set(results["metrics"]["l1"]) == {"definition", "unit", "better"}
    assert "difference" in results["summary"][-1]
    page = (out / "report.html").read_text()
    assert "<td>–</td>" in page and '<td class="best">–' not in page
    timing = json.loads((out / "timing.json").read_text())
    assert timing["methods"]["telea"]["examples"] == 28
    assert "seconds" not in (out / "results.json").read_text()
    files = {path.name for path in out.iterdir()}
    assert files == {
        "results.json", "timing.json", "results.md", "examples.csv", "report.html",
        "pictures.png", "worst.png", "records",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        runner.evaluate_run(run, step=3)


def test_equal_networks_from_a_run_and_from_weights_agree(run, variables, tmp_path):
    weights = tmp_path / "net.safetensors"
    pretrained.save_pretrained(weights, MODEL, variables)
    evaluation = runner.evaluate_run(
        weights=str(weights),
        config=tiny_config(),
        methods=["pconv", f"again={run}", f"third={weights}"],
        data=EvalData(examples=1, classes=["thin", "bins"]),
        learned=False,
        out=tmp_path / "out",
    )
    assert len(evaluation.examples) == 3 * 13 and evaluation.shapes == ["thin"]
    assert evaluation.methods == ["pconv", "again", "third"]
    numbers = [evaluation.mean(method=m) for m in evaluation.methods]
    assert numbers[0] == numbers[1] == numbers[2]


def test_images_may_be_computed_together(run, tmp_path):
    options = dict(methods=["pconv"], learned=False)
    options["data"] = EvalData(examples=3, classes=["thin", "wide"])
    alone = runner.evaluate_run(run, **options, out=tmp_path / "out")
    together = runner.evaluate_run(
        run, **options, device_batch=2, out=tmp_path / "together"
    )
    for a, b in zip(alone.examples, together.examples, strict=True):
        assert (a["hole"], a["index"]) == (b["hole"], b["index"])
        assert a["psnr"] == pytest.approx(b["psnr"], abs=1e-3)
    with pytest.raises(ValueError, match="device_batch must be positive, got 0"):
        runner.evaluate_run(run, **options, device_batch=0)
    # What was computed otherwise is computed again.
    records = tmp_path / "out" / "records"
    before = {p: p.read_bytes() for p in records.iterdir() if p.is_file()}
    runner.evaluate_run(run, **options, device_batch=2, out=tmp_path / "out")
    after = {p: p.read_bytes() for p in records.iterdir() if p.is_file()}
    assert before and before != after


def test_weights_are_evaluated_on_the_bundled_images(variables, tmp_path):
    config = tiny_config()
    config.data.source, config.data.path = "folder", ("photos/of/whoever/trained/it",)
    weights = tmp_path / "net.safetensors"
    info = {"experiment": config.to_dict()}
    pretrained.save_pretrained(weights, MODEL, variables, info=info)
    options = dict(weights=str(weights), methods=["pconv"], learned=False)
    options["data"] = EvalData(examples=1)
    runner.evaluate_run(**options, out=tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["protocol"]["pictures"]["names"] == ["coffee.png"]
    with pytest.raises(ValueError, match="photos/of/whoever"):
        runner.evaluate_run(**options, config=config)


def save_networks(folder, variables):
    """Write two networks that differ in one bias, with files of the same name."""
    for name, shift in (("a", 0), ("b", 1)):
        other = jax.tree.map(np.copy, variables)
        other["params"]["pconv4"]["bias"] += shift
        (folder / name).mkdir()
        pretrained.save_pretrained(folder / name / "net.safetensors", MODEL, other)
    return [str(folder / name / "net.safetensors") for name in ("a", "b")]


def test_results_of_other_weights_are_not_replaced(variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = save_networks(tmp_path, variables)
    options = dict(methods=["mean"], config=tiny_config(), learned=False)
    options["data"] = EvalData(examples=1, classes=["wide"])
    runner.evaluate_run(weights=a, **options)
    results = tmp_path / "runs/net-evaluation/results.json"
    before = results.read_bytes()
    with pytest.raises(
        UserError, match=r"net-evaluation has the results of .* than .*b/net.*\(--out\)"
    ):
        runner.evaluate_run(weights=b, **options)
    assert results.read_bytes() == before
    shutil.copy(a, tmp_path / "b")  # The same weights may be anywhere.
    runner.evaluate_run(weights=b, **options)
    assert results.read_bytes() == before
    runner.evaluate_run(weights=b, **options, out=tmp_path / "out")
    # Results of older versions do not tell their weights; nor does half a file.
    for text in ('{"step": null}', '{"weights_digest": "0', "[]"):
        results.write_text(text)
        runner.evaluate_run(weights=a, **options)
        assert results.read_bytes() == before


def test_records_of_other_weights_are_not_reused(variables, tmp_path):
    options = dict(methods=["network"], config=tiny_config(), learned=False)
    options["data"] = EvalData(examples=2, classes=["wide"])
    one, other = save_networks(tmp_path, variables)
    first = runner.evaluate_run(weights=one, **options, out=tmp_path / "out")
    second = runner.evaluate_run(weights=other, **options, out=tmp_path / "out")
    alone = runner.evaluate_run(weights=other, **options, out=tmp_path / "alone")
    assert second.examples == alone.examples != first.examples
    assert len(list((tmp_path / "out/records").glob("*.jsonl"))) == 2
    digests = {
        json.loads((tmp_path / name / "results.json").read_text())["weights_digest"]
        for name in ("out", "alone")
    }
    assert len(digests) == 1


@pytest.mark.slow
def test_vgg_distance_uses_the_given_weights(run, tmp_path):
    params = jax.tree.map(np.asarray, vgg.random_params(jax.random.key(1)))
    weights = tmp_path / "vgg.safetensors"
    save_file(traverse_util.flatten_dict(params, sep="/"), weights)
    evaluation = runner.evaluate_run(
        run,
        methods=["network", "mean"],
        data=EvalData(examples=1),
        learned=False,
        vgg=str(weights),
        out=tmp_path / "out",
    )
    assert evaluation.metrics[:5] == ["l1", "l1_hole", "psnr", "ssim", "vgg_distance"]
    assert evaluation.left_out == []
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["vgg"] == "vgg.safetensors"
    source = opening.get_source(read_settings(tiny_config()).data, "validation")
    protocol = EvalSet(source, image_size=SIZE, examples=1)
    ((index, truth),) = protocol.batches(1)
    mask = protocol.masks(index, BINS[4], True)
    (fill,) = methods.get_methods(["mean"], None, time_budget=9.0)
    with contextlib.closing(fill):
        comp = np.where(mask == 0, fill.fill(truth, mask).images, truth)
    expected = lpips.vgg_distance(
        params, comp / np.float32(255), truth / np.float32(255)
    )
    (found,) = evaluation.select(method="mean", hole=BINS[4], border=True)
    assert found["vgg_distance"] == pytest.approx(float(expected[0]), rel=1e-4)
    with pytest.raises(ValueError, match="none.npz"):
        runner.evaluate_run(run, learned=False, vgg="none.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workdir": "nowhere"}, "workdir: there is no checkpoint in"),
        ({}, "give either workdir or weights"),
        ({"weights": "none.safetensors"}, "there is no file none.safetensors"),
        (
            {"workdir": None, "methods": ["tela"]},
            "methods: 'tela' is unknown; use",
        ),
        (
            {"workdir": None, "methods": ["mean", "mean"]},
            "unique, got mean, mean",
        ),
        ({"workdir": None, "methods": []}, "non-empty and unique, got none"),
        ({"workdir": None, "methods": ["a/b=c"]}, "the name in 'a/b=c' may contain"),
        ({"data": EvalData(images="nowhere.tar")}, "no file or folder 'nowhere.tar'"),
        ({"data": EvalData(masks="nowhere")}, "there is no such folder"),
        ({"data": EvalData(image_size=33)}, "use 32 or 36"),
    ],
)
def test_mistakes_are_user_errors(run, options, message):
    if "workdir" in options or "data" in options:
        options = options | {"workdir": options.get("workdir") or run}
    with pytest.raises(ValueError, match=message):
        runner.evaluate_run(**options, learned=False)


def test_repair_is_what_the_inpainter_does():
    network = methods.Network("tiny", *make_network())
    repair, sharp = methods.get_methods(["repair", "sharp"], network, time_budget=60.0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
    mask = np.ones((2, 48, 48, 1), np.uint8)
    mask[0, 10:36, 10:36] = 0
    mask[1] = 0
    inpainter = Inpainter(*make_network())
    results = [method.fill(images, mask) for method in (repair, sharp)]
    for result, is_sharp in zip(results, (False, True)):
        expected = inpainter(images[0], mask[0, ..., 0] == 0, sharp=is_sharp)
        np.testing.assert_array_equal(result.images[0], expected)
        assert result.errors[0] == "" and "no valid pixel" in result.errors[1]
    # What a weights file says of its depth counts, and is part of the results' key.
    deep = make_network(depth=3)
    told = methods.Network("deep", *deep, info={"trusted_depth": 1})
    assert told.to_inpainter().trusted_depth == 1
    repairs = [methods.Repair(n) for n in (methods.Network("deep", *deep), told)]
    assert len({r.fingerprint for r in repairs}) == 2
    network = methods.Network("deep", *deep)
    for name in ("network", "deep"):
        assert methods.get_methods([name], network, time_budget=60.0) == [network]
    with pytest.raises(ValueError, match="'repair' is unknown"):
        methods.get_methods(["repair"], None, time_budget=60.0)


def test_the_time_of_repair_is_without_compilation(monkeypatch):
    repair = methods.Repair(methods.Network("tiny", *make_network()))
    shapes = []

    @jax.jit
    def double(image):
        time.sleep(0.5)  # While it is traced.
        return image * 2

    def inpaint(image, hole, sharp):
        shapes.append(image.shape)
        return np.asarray(double(image[: 5 + hole.sum()]))

    monkeypatch.setattr(repair, "_inpainter", inpaint)
    images = np.ones((3, 8, 8, 3), np.uint8)
    mask = np.ones((3, 8, 8, 1), np.uint8)
    result = repair.fill(images, mask)
    assert (result.images == 2).all() and result.errors == [""] * 3
    assert len(shapes) == 4 and (result.seconds < 0.4).all()
    mask[1, 0, 0] = 0  # Other holes of equal images may need other programs.
    result = repair.fill(images[1:2], mask[1:2])
    assert len(shapes) == 6 and (result.seconds < 0.4).all()


def write_images(folder, count=3, size=48):
    folder.mkdir()
    for i in range(count):
        image = bundled()[i % 2][: 4 * size, i * 40 : i * 40 + 4 * size]
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])


def command(*arguments):
    return [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]


def start(devices, *arguments):
    return subprocess.Popen(
        command(*arguments),
        env=training_environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.slow
def test_devices_and_kills_do_not_change_results_and_opencv_agrees(run, tmp_path):
    """On one device, on four, and on four after a kill; and on other people's code."""
    write_images(tmp_path / "photos")
    written = write_mask_folder(tmp_path / "masks", BIN_CLASSES, size=48, per_class=2)
    arguments = [f"--workdir={run}", "--image-size=48", "--examples=3"]
    arguments += [f"--images={tmp_path / 'photos'}", f"--masks={tmp_path / 'masks'}"]
    arguments += ["--nolearned", "--methods=pconv,telea,navier_stokes"]
    one = start(1, *arguments, f"--out={tmp_path / 'one'}")
    killed = start(4, *arguments, f"--out={tmp_path / 'four'}")
    records = tmp_path / "four" / "records"
    deadline = time.monotonic() + 200
    while sum(p.stat().st_size > 0 for p in records.glob("*")) < 3:
        assert killed.poll() is None, killed.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "four" / "results.json").exists()
    done = {p.name: p.read_text() for p in records.glob("*")}
    assert 0 < sum(text.count("\n") for text in done.values()) < 3 * 36
    four = start(4, *arguments, f"--out={tmp_path / 'four'}")
    printed = finish(one)
    finish(four)
    for name, text in done.items():  # It went on, and did not begin again.
        whole = text[: text.rfind("\n") + 1]
        assert (records / name).read_text().startswith(whole)
    results = [(tmp_path / n / "results.json").read_bytes() for n in ("one", "four")]
    assert results[0] == results[1]
    tables = [(tmp_path / n / "examples.csv").read_bytes() for n in ("one", "four")]
    assert tables[0] == tables[1]
    assert "navier_stokes" in printed and "s/image" in printed

    examples = json.loads(results[0])["examples"]
    assert len(examples) == 3 * 36
    opencv = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}
    for e in examples:
        if e["method"] not in opencv:
            continue
        photo = cv2.imread(str(tmp_path / "photos" / f"{e['index']}.png"))
        hole = 1 - written[e["hole"], e["border"], e["index"] % 2]
        filled = cv2.inpaint(photo * (1 - hole), hole, 3, opencv[e["method"]])
        a, b = photo / 255, filled / 255
        assert e["l1"] == pytest.approx(100 * np.abs(a - b).mean(), rel=1e-4)
        psnr = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
        assert e["psnr"] == pytest.approx(psnr, rel=1e-5)
        ssim = skimage.metrics.structural_similarity(
            a, b, data_range=1, channel_axis=-1, gaussian_weights=True,
            use_sample_covariance=False,
        )  # fmt: skip
        assert e["ssim"] == pytest.approx(ssim, abs=1e-5)


def test_a_mistake_on_the_command_line_ends_without_a_traceback(tmp_path):
    process = start(1, f"--workdir={tmp_path}")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    line = output.decode().strip().splitlines()[-1]
    assert line.startswith("eval.py: workdir: there is no checkpoint in")
    assert b"Traceback" not in output
