import json
import math
import os
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, check, inputs, jax_programs, run, timing
from pconv_jax import losses, unet, vgg
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command writes for all suites at tiny sizes, and what it prints."""
    folder = tmp_path_factory.mktemp("benchmarks")
    out = folder / "report.json"
    suites = "layer,inference,train,large,data,growth,profile,decoder,start"
    # Of the profile and of the hole ratios one each will do.
    command = f"--smoke --suite {suites} --rounds 2 --seconds 0.02 --out {out}"
    command += " --jobs 2"
    variants = "Conv|jax|threads|90%|pconv4"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *command.split()]
        + ["--variants", variants],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # All processes import the same.
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout, out.with_suffix(".svg")


@pytest.mark.slow
def test_the_command_measures_every_suite(report):
    report, printed, _ = report
    assert {case["suite"] for case in report["cases"]} == {"machine", *cases.SUITES}
    for case in report["cases"]:
        assert f"{case['suite']}: {case['case']}" in printed
        assert case["results"].keys() == case["settings"].keys()
        for name, result in case["results"].items():
            assert "error" not in result, (name, result)
            walls = [t for turn in result["rounds"] for t in turn["wall_s"]]
            assert len(result["rounds"]) == 2 and result["calls"] == len(walls) >= 2
            assert result["median_s"] == pytest.approx(np.median(walls))
            low, high = result["quartiles_s"]
            assert min(walls) <= low <= result["median_s"] <= high <= max(walls)
            count, kind = case["items"]
            assert result[f"{kind}_per_s"] == pytest.approx(count / result["median_s"])
            if case["flops"]:
                rate = case["flops"] / result["median_s"]
                assert result["flops_per_s"] == pytest.approx(rate)
            assert result["imported_bytes"] <= result["peak_bytes"] < 10**10
            assert 10**7 < result["running_bytes"] < 10**10


@pytest.mark.slow
def test_the_report_says_under_which_conditions(report):
    report, _, _ = report
    assert report["versions"]["jax"] == jax.__version__
    assert report["machine"]["platform"] == "cpu" and report["machine"]["cores"] >= 1
    assert report["settings"]["seconds"] == 0.02
    assert report["matrix_product_flops_per_s"]["float32"] > 0
    layer = next(c for c in report["cases"] if c["suite"] == "layer")
    assert layer["settings"]["PartialConv"]["conv"] == "partial"
    assert layer["results"]["nn.Conv"]["relative"]["median"] == 1


def test_every_stage_and_part_runs(fast_compilation_once):
    profile = cases.make("profile", platform="cpu", torch=False, smoke=True)
    variants = [variant for case in profile for variant in case.variants.values()]
    ran = []
    for variant in variants:
        settings = {k: v for k, v in variant.items() if k != "framework"}
        if settings["program"] in ("stage", "part"):
            jax_programs.build(**settings).call()
            ran.append(settings.get("stage", settings.get("part")))
    assert ran[:4] == [0, 1, 2, 3] and len(set(ran)) == 4 + 6


@pytest.mark.slow
def test_growth_is_drawn(report):
    report, _, plot = report
    texts = [t.text for t in ElementTree.parse(plot).iter() if t.text]
    assert "hole, % of the pixels" in texts and "ms" in texts
    holes = [c for c in report["cases"] if c["case"].startswith("hole ratio")]
    assert [list(c["results"]) for c in holes] == [["90%"]]


def test_a_variant_that_fails_is_named_and_the_others_are_measured():
    good = {"framework": "jax", "program": "matmul", "n": 8, "dtype": "float32"}
    bad = {"framework": "none"}
    case = cases.Case("machine", "some", {"bad": bad, "good": good})
    results = {}
    timing.compare(
        case,
        results,
        pythons={"jax": sys.executable, "none": sys.executable},
        rounds=2,
        seconds=0.01,
        timeout=100,
    )
    timing.summarize(case, results, {})
    assert "No module named 'benchmarks.none_programs'" in results["bad"]["error"]
    assert results["good"]["median_s"] > 0 and "relative" not in results["good"]


def test_a_stop_does_not_wait_for_processes_that_start(tmp_path):
    python = tmp_path / "python"  # It never answers.
    python.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/started\nexec sleep 60\n")
    python.chmod(0o755)
    variants = {name: {"framework": "slow"} for name in "abc"}
    case = cases.Case("machine", "some", variants)
    stop = "import signal; signal.signal(signal.SIGALRM, lambda *_: exit('stopped'))"
    command = f"""{stop}; signal.setitimer(signal.ITIMER_REAL, 1)
from benchmarks import cases, timing
timing.compare(cases.{case}, {{}}, pythons={{"slow": {str(python)!r}}}, jobs=2,
               rounds=1, seconds=1, timeout=30)"""
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        timeout=20,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr == "stopped\n"
    started = (tmp_path / "started").read_text().split()
    assert len(started) == 2
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started)


def made_up(*turns, name="UNet", error=None):
    """A report with one variant, of which a call took some seconds in each turn."""
    times = [t for turn in turns for t in turn]
    result = (
        {"error": error}
        if error
        else {
            "rounds": [{"wall_s": turn} for turn in turns],
            "median_s": float(np.median(times)),
            "quartiles_s": [float(np.quantile(times, q)) for q in (0.25, 0.75)],
        }
    )
    results = {"jax": result}
    case = {"suite": "inference", "case": name, "results": results}
    machine = {"cpu": "some", "cores": 2}
    return {"machine": machine, "cases": [case, {"suite": "train", "case": "skipped"}]}


@pytest.mark.parametrize(
    ("turns", "slower"),
    [
        ([[1.0, 1.1, 1.2]], False),
        ([[0.1, 0.1, 0.1]], False),
        ([[1.2, 1.21, 1.22], [1.3, 1.3, 1.3]], True),
        ([[1.2, 1.21, 1.22], [1.1, 1.1, 1.1]], False),  # A turn was as fast.
        ([[1.1, 1.3, 1.3, 1.3, 1.3]], True),  # Only a call was.
    ],
)
def test_slower_is_what_is_slower_by_more_than_the_spread(turns, slower):
    stored = made_up([1.0, 1.0, 1.0], [1.15, 1.15, 1.15])
    lines, compared = check.find_slower(made_up(*turns), stored)
    assert compared == 1 and len(lines) == slower
    if slower:
        assert lines[0].startswith("inference: UNet: jax: 1.")


def test_a_check_exits_with_one_and_names_what_is_slower(tmp_path, capsys):
    fast, slow = made_up([1.0, 1.0]), made_up([2.0, 2.0])
    run._check(fast, slow)
    run._check(fast, fast)
    assert "None of 1 is slower" in capsys.readouterr().out
    line = "UNet: jax: 2.00 times as long, 2000 ms instead of 1000 ms"
    with pytest.raises(SystemExit, match=line):
        run._check(slow, fast)
    with pytest.raises(SystemExit, match="UNet: jax: not measured: killed"):
        run._check(made_up(error="killed"), fast)
    with pytest.raises(SystemExit, match="nothing to compare"):
        run._check(made_up([1.0], name="other"), fast)
    run._check(fast | {"machine": {"cpu": "other", "cores": 2}}, fast)
    assert "cpu some instead of other" in capsys.readouterr().out
    path = tmp_path / "report.json"
    for text in ("", "[]", "{}", '{"cases": [1]}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="report.json is no report"):
            run._read_report(path)
    path.write_text(json.dumps(slow))
    assert run._read_report(path) == slow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--check nowhere.json", "nowhere.json is no report"),
        ("--suite speed", "unknown suite 'speed'; the suites are layer, inference"),
        ("--only (", "is not a valid pattern"),
        ("--rounds 0", "--rounds must be positive, got 0"),
        ("--against torch --torch-python nowhere", "nowhere has no PyTorch"),
    ],
)
def test_mistakes_on_the_command_line_get_a_sentence(options, message):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *options.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode and message in done.stderr
    assert "Traceback" not in done.stderr


def kernel_flops(params, size, strides):
    """Counts by the kernels that there are, instead of by the table."""
    flops = 0
    for kernel, stride in zip(params, strides):
        flops += 2 * math.prod(kernel.shape) * (size // stride) ** 2
    return flops


def test_nominal_flops_are_those_of_the_kernels():
    model = unet.PConvUNet()
    variables = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 512, 512, 3)),
        jnp.ones((1, 512, 512, 1)),
    )
    kernels = [variables["params"][f"pconv{i}"]["kernel"] for i in range(1, 17)]
    strides = [2**i for i in (*range(1, 9), *reversed(range(8)))]
    assert cases.unet_flops(512) == kernel_flops(kernels, 512, strides)
    assert cases.unet_flops(512) / 2e9 == pytest.approx(38.0, abs=0.05)
    params = jax.eval_shape(vgg.random_params, jax.random.key(0))
    kernels = [params[name]["kernel"] for name in sorted(params)]
    assert cases.vgg_flops(256) == kernel_flops(kernels, 256, [1, 1, 2, 2, 4, 4, 4])


def test_masks_have_the_hole_ratio_asked_for():
    for ratio in (0.1, 0.5, 0.9):
        mask = inputs.mask(2, 64, ratio)
        assert mask.shape == (2, 64, 64, 1) and set(np.unique(mask)) == {0, 1}
        assert np.allclose(1 - mask.mean((1, 2, 3)), ratio, atol=1e-3)


def test_torch_computes_the_same_numbers(fast_compilation):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_network

    depth, width, size = 3, 8, 32
    images, mask = inputs.images(2, size), inputs.mask(2, size)
    model = unet.PConvUNet(depth=depth, width=width)
    variables = model.init(jax.random.key(0), images, mask)
    vgg_params = vgg.random_params(jax.random.key(1))
    network = torch_network.PConvUNet(depth, width)
    convs = [stage[0] for stage in (*network.encoder, *network.decoder)]
    vgg_network = torch_network.VGG16()
    vgg_convs = [m for m in vgg_network.modules() if isinstance(m, torch.nn.Conv2d)]
    pairs = [
        (conv, variables["params"][f"pconv{i}"]) for i, conv in enumerate(convs, 1)
    ]
    pairs += [(conv, vgg_params[n]) for conv, n in zip(vgg_convs, sorted(vgg_params))]

    def nchw(array):
        return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())

    with torch.no_grad():
        for conv, params in pairs:
            kernel = np.transpose(np.array(params["kernel"]), (3, 2, 0, 1))
            conv.weight.copy_(torch.from_numpy(kernel.copy()))
            if "bias" in params:
                conv.bias.copy_(torch.from_numpy(np.array(params["bias"])))

    def loss_fn(params):
        (output, _), _ = model.apply(
            variables | {"params": params},
            images,
            mask,
            train=True,
            mutable=["batch_stats"],
        )
        terms = losses.inpainting_loss(
            output,
            images,
            mask,
            features_fn=lambda x: vgg.vgg16_features(vgg_params, x),
        )
        return terms["total"].mean(), output

    (loss, output), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        variables["params"]
    )
    torch_output = network(nchw(images), nchw(mask))
    torch_loss = torch_network.inpainting_loss(
        vgg_network, torch_output, nchw(images), nchw(mask)
    )
    torch_loss.backward()
    actual = torch_output.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(actual - output).max() < 1e-5 * np.abs(output).max()
    assert torch_loss.item() == pytest.approx(float(loss), rel=1e-5)
    for i, conv in enumerate(convs, 1):
        expected = np.array(grads[f"pconv{i}"]["kernel"])
        actual = conv.weight.grad.numpy().transpose(2, 3, 1, 0)
        assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max(), i
