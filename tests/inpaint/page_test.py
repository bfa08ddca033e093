import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from unittest import mock

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import pconv_jax
from pconv_jax import cli
from pconv_jax.cli import demo
from pconv_jax.inpaint import display, guard, image_io, page
from pconv_jax.inpaint.decoder import Decoder
from pconv_jax.inpaint.hole import dilate_hole, hole_from_mask
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.weights import pretrained
from tests.helpers import ROOT
from tests.helpers.networks import make_network

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    pretrained.save_pretrained(path, *make_network(depth=3))
    return path


@pytest.fixture(scope="module")
def inpainter(network):
    return Inpainter.from_pretrained(network)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder where Gradio keeps files."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


def photo(height=60, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def drawing(hole):
    """A painted layer, as Gradio's editor gives it."""
    layer = np.zeros((*hole.shape, 4), np.uint8)
    layer[hole] = (255, 45, 149, 255)
    return {"background": None, "layers": [Image.fromarray(layer)], "composite": None}


def test_the_painted_area_is_filled(inpainter, tmp_path):
    image = photo()
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    hole = np.zeros(image.shape[:2], bool)
    hole[20:40, 30:50] = True
    opened = np.roll(hole, 15, axis=1)
    Image.fromarray(~opened).save(tmp_path / "mask.png")
    # An opened mask is exact, so it does not grow.
    grown = dilate_hole(hole, 2) | opened
    assert np.any(grown != dilate_hole(hole | opened, 2))
    expected, depth = inpainter(image, grown, sharp=True, return_depth=True)
    shown, result = page.repair(
        *(inpainter, str(path), str(tmp_path / "mask.png"), drawing(hole)),
        *(2, True, None, 1, True),
    )
    assert not shown.gallery["visible"]
    np.testing.assert_array_equal(shown.repaired, expected)
    np.testing.assert_array_equal(shown.slider[0], image)
    np.testing.assert_array_equal(shown.slider[1], expected)
    assert shown.download.value["path"] == result
    assert pathlib.Path(result).name == "a-repaired.png"
    np.testing.assert_array_equal(Image.open(result), expected)
    assert "80 x 60 pixels" in shown.report
    assert f"{np.mean(depth > 0):.1%}" in shown.report
    # Gray outside of the hole, and inside a color for each depth.
    overlay = np.asarray(shown.overlay, int)
    assert np.all(overlay[depth == 0].std(axis=-1) == 0)
    assert np.all(overlay[depth > 0].std(axis=-1) > 0)
    assert [f">{d}</span>" in shown.legend for d in (1, 2, 3)] == [
        *(bool(np.any(depth == d)) for d in (1, 2, 3))
    ]


def test_a_variant_is_chosen(inpainter, tmp_path):
    image = photo()
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    hole = np.zeros(image.shape[:2], bool)
    hole[10:50, 20:60] = True
    before = set(tmp_path.iterdir())
    arguments = inpainter, str(path), None, drawing(hole), 0, False
    shown, result = page.repair(*arguments, None, 3, True)
    assert shown.gallery["visible"] and len(shown.gallery["value"]) == 3
    expected = [inpainter(image, hole, seed=seed, sharp=True) for seed in range(3)]
    assert not np.array_equal(expected[0], expected[1])
    np.testing.assert_array_equal(shown.repaired, expected[0])
    names = ("a-repaired.png", "a-repaired-2.png", "a-repaired-3.png")
    for index, name in enumerate(names):
        event = gr.SelectData(None, {"index": index, "value": None})
        after, (first, second), download = page.choose(str(path), result, event)
        np.testing.assert_array_equal(after, expected[index])
        np.testing.assert_array_equal(first, image)
        np.testing.assert_array_equal(second, expected[index])
        assert pathlib.Path(download.value["path"]).name == name
        np.testing.assert_array_equal(
            Image.open(download.value["path"]), expected[index]
        )
    # The next result replaces all of them, and there are four at most.
    shown, second = page.repair(*arguments, result, 99, True)
    assert len(shown.gallery["value"]) == 4
    assert set(tmp_path.iterdir()) - before == {pathlib.Path(second).parent}


def test_what_is_painted_in_blue_is_not_copied(inpainter, tmp_path):
    image = photo()
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    hole, kept_out = np.zeros((2, *image.shape[:2]), bool)
    hole[20:40, 30:50] = True
    kept_out[10:50, 50:75] = True
    painted = drawing(hole)
    layer = np.array(painted["layers"][0])
    layer[kept_out] = (*display.KEEP_OUT, 255)
    layer[20:40, 50] = (90, 110, 215, 200)  # Where strokes meet, colors are mixed.
    painted["layers"] = [Image.fromarray(layer)]
    shown, _ = page.repair(inpainter, str(path), None, painted, 0, False, None, 1, True)
    expected = inpainter(image, hole, exclude=kept_out)
    np.testing.assert_array_equal(shown.repaired, expected)
    assert not np.array_equal(expected, inpainter(image, hole))
    # Blue alone is no hole.
    painted["layers"] = [Image.fromarray(np.where(hole[..., None], 0, layer))]
    with pytest.raises(gr.Error, match="Nothing is painted over yet"):
        page.repair(inpainter, str(path), None, painted, 3, False, None, 1, True)


def test_large_images_are_shown_small_and_repaired_whole(inpainter, tmp_path):
    y, x = np.mgrid[:900, :2048]
    image = np.stack([x // 32, y // 16, (x + y) // 32], axis=-1).astype(np.uint16) * 500
    path = tmp_path / "a.tif"
    image_io.write(path, image_io.ImageFile(image, {}))
    shown = page.show(str(path))
    assert shown.size == (1024, 450)
    small = np.zeros((450, 1024), bool)
    small[100:120, 500:530] = True
    shown, result = page.repair(
        inpainter, str(path), None, drawing(small), 0, False, None, 1, True
    )
    assert shown.repaired.size == (1024, 450)
    result = image_io.read(result).image
    assert result.dtype == np.uint16
    hole = np.kron(small, np.ones((2, 2), bool))
    np.testing.assert_array_equal(result, inpainter(image, hole, sharp=True))


@pytest.mark.parametrize("index", range(4))
def test_examples_come_with_a_mask(index):
    path, mask, shown = page.open_example(index)
    image = image_io.read(path).image
    hole = hole_from_mask(image_io.read(mask).image)
    assert hole.shape == image.size[::-1] and 0.08 < hole.mean() < 0.15
    assert max(shown.size) <= 1024
    different = np.any(np.asarray(shown) != np.asarray(page.show(path)), axis=-1)
    assert 0.08 < different.mean() < 0.15


def test_mistakes_are_shown_on_the_page(inpainter, tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(gr.Error, match="Open an image first"):
        page.repair(inpainter, None, None, None, 0, False, None, 1, True)
    path.write_text("Hello")
    with pytest.raises(gr.Error, match="it is not an image"):
        page.show(str(path))
    Image.fromarray(photo()).save(path)
    with pytest.raises(gr.Error, match="Nothing is painted over yet"):
        page.repair(inpainter, str(path), None, None, 0, False, None, 1, True)
    everything = drawing(np.ones((60, 80), bool))
    with pytest.raises(gr.Error, match="no valid pixel is left"):
        page.repair(inpainter, str(path), None, everything, 0, False, None, 1, True)


def test_errors_show_no_folder(inpainter, tmp_path):
    path = tmp_path / "0123abcd" / "my photo.png"
    path.parent.mkdir()
    path.write_text("Hello")
    with pytest.raises(gr.Error) as error:
        page.show(str(path))
    assert error.value.message == "cannot read my photo.png: it is not an image."
    labels = np.eye(60, 80, dtype=np.uint8) * 3 + np.eye(60, 80, 1, dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(photo()).save(path)
    with pytest.raises(gr.Error, match="looks like a mask of labels"):
        page.show(str(path), mask=str(tmp_path / "labels.png"))


def test_a_file_that_crashes_its_decoder_does_not_end_the_page(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in paths:
        Image.fromarray(photo()).save(path)
    crash = "import os; input(); os.abort()"
    with monkeypatch.context() as patch:
        patch.setattr(page, "_DECODER", Decoder([sys.executable, "-c", crash]))
        for path in paths[:2]:
            with pytest.raises(gr.Error, match=r"cannot read .*: its decoder crashes"):
                page.show(str(path))
    assert page.show(str(paths[2])).size == (80, 60)


def test_an_error_of_the_package_is_no_crash(tmp_path):
    error = "input(); raise RuntimeError"
    decoder = Decoder([sys.executable, "-c", error])
    assert decoder.survives(str(tmp_path / "a.png"), max_pixels=1)


def test_a_decoder_that_was_killed_while_idle_is_started_again(tmp_path):
    decoder = Decoder()
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for _ in range(2):
        assert decoder.survives(str(tmp_path / "a.png"), max_pixels=16)
        decoder._process.kill()
        decoder._process.wait()


def test_large_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_MAX_PIXELS", 60 * 80 - 1)
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with pytest.raises(gr.Error, match="it has 80 x 60 pixels"):
        page.show(str(tmp_path / "a.png"))


def test_a_mask_may_be_opened_before_the_image(tmp_path):
    image, mask = str(tmp_path / "a.png"), str(tmp_path / "mask.png")
    Image.fromarray(photo()).save(image)
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:50] = True
    Image.fromarray(hole).save(mask)
    assert page.show(None, mask=mask) is None
    *paths, shown = page.open_image(image, None, mask, False)
    assert paths == [image, mask]
    np.testing.assert_array_equal(shown, page.show(image, mask=mask))
    # The next image is another one.
    *paths, shown = page.open_image(image, image, mask, False)
    assert paths == [image, None]
    np.testing.assert_array_equal(shown, photo())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--host", "::1"], None),
        (["--host", "0.0.0.0", "--no-auth"], None),
        (["--host", "0.0.0.0", "--auth", "ada:s:t"], ("ada", "s:t")),
        (["--auth", "ada"], ("ada", "asked for")),
    ],
)
def test_who_is_let_in(options, expected, network, monkeypatch):
    launch = mock.Mock()
    monkeypatch.setattr(page, "launch", launch)
    monkeypatch.setattr(demo, "_use_temporary_folder", lambda: None)
    monkeypatch.setattr(demo.getpass, "getpass", lambda prompt: "asked for")
    cli.main(["demo", "--weights", str(network), *options])
    assert launch.call_args.kwargs["auth"] == expected


def test_without_a_terminal_the_password_must_be_given(network, monkeypatch):
    monkeypatch.setattr(demo.getpass, "getpass", mock.Mock(side_effect=EOFError))
    with pytest.raises(SystemExit, match="no terminal to ask .* give NAME:PASSWORD"):
        cli.main(["demo", "--weights", str(network), "--auth", "ada"])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "example.org", "::"])
def test_other_machines_need_a_password_or_a_decision(host):
    with pytest.raises(SystemExit, match=f"--host {host} lets .* --auth .* --no-auth"):
        cli.main(["demo", "--host", host])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "0"], "--port must be in .1, 65535., got 0"),
        (["--port", "70000"], "--port must be in .1, 65535., got 70000"),
        (["--root-path", "repair"], "--root-path must begin with /, got 'repair'"),
    ],
)
def test_places_that_the_page_cannot_have(options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["demo", *options])


@pytest.mark.parametrize("name", ["example.org", "Example.ORG", "example.org:8443"])
def test_names_of_a_proxy(name):
    answered = []

    async def app(*_):
        answered.append(name)

    scope = {"type": "http", "method": "GET", "headers": [(b"host", b"example.org")]}
    asyncio.run(guard.refuse_other_sites(app, allowed=[name])(scope, None, None))
    assert answered


def test_a_result_is_deleted_with_the_next(inpainter, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path)
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:50] = True
    before = set(tmp_path.iterdir())
    _, first = page.repair(
        inpainter, str(path), None, drawing(hole), 0, False, None, 1, True
    )
    _, second = page.repair(
        inpainter, str(path), None, drawing(hole), 0, False, first, 1, True
    )
    assert set(tmp_path.iterdir()) - before == {pathlib.Path(second).parent}
    # A mistake deletes nothing.
    with pytest.raises(gr.Error):
        page.repair(inpainter, str(path), None, None, 0, False, second, 1, True)
    assert pathlib.Path(second).is_file()


def test_nothing_is_read_while_warnings_are_caught(inpainter, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path)
    hole = np.zeros((60, 80), bool)
    hole[20:40, 30:50] = True
    with concurrent.futures.ThreadPoolExecutor() as threads:
        shown = []

        def repair(*args, **options):
            shown.append(threads.submit(page.show, str(path)))
            with pytest.raises(TimeoutError):
                shown[0].result(timeout=0.5)
            return inpainter(*args, **options)

        page.repair(repair, str(path), None, drawing(hole), 0, False, None, 1, True)
        assert shown[0].result(timeout=60).size == (80, 60)


@pytest.mark.parametrize(
    "host, guarded", [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_only_loopback_addresses_are_guarded(inpainter, monkeypatch, host, guarded):
    build = mock.MagicMock()
    monkeypatch.setattr(page, "build", build)
    page.launch(inpainter, host=host, port=0, root_path="/repair")
    options = build().queue().launch.call_args.kwargs
    assert options["root_path"] == "/repair"
    middleware = [m.cls for m in options["app_kwargs"]["middleware"]]
    assert (guard.refuse_other_sites in middleware) == guarded


def test_ports_that_are_taken(inpainter):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1, port {port}: .* in use"):
            page.launch(inpainter, port=port)
    with pytest.raises(ValueError, match="cannot listen on 127.0.0.1, port 70000"):
        page.launch(inpainter, port=70_000)


def test_without_gradio(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pconv_jax.inpaint.page")
    monkeypatch.delattr(pconv_jax.inpaint, "page")
    monkeypatch.setattr(demo, "_use_temporary_folder", lambda: None)
    with pytest.raises(SystemExit, match=r"pip install 'pconv-jax\[demo\]'"):
        cli.main(["demo", "--weights", str(network)])


# As a process.


@contextlib.contextmanager
def serve(network, folder, *options, **variables):
    """Start a process with temporary files in a folder; yield it and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(network, folder, "--port", str(port), *options, **variables)
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://{address}", timeout=60).close()
                break
            except OSError:
                time.sleep(0.5)
        yield process, address
    finally:
        process.terminate()
        process.wait(60)


def start(network, folder, *options, **variables):
    """Start a process with temporary files in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "pconv_jax.cli", "demo", "--weights", str(network)]
        + list(options),
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), **variables},
        stdout=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(network, folder):
    """The address of a page with another name, where proxies are set that fail."""
    options = ("--allowed-host", "repair.example.org")
    proxies = {
        "http_proxy": "http://127.0.0.1:9",
        "ALL_PROXY": "socks5://127.0.0.1:9",
    }
    with serve(network, folder, *options, **proxies) as (_, address):
        yield address


def ask(address, method="GET", path="/", body=None, **headers):
    """Send a request; return the status and the text of the answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request(method, path, body, names)
        response = connection.getresponse()
        return response.status, response.read().decode()


def upload(address, **headers):
    kind = "multipart/form-data; boundary=X"
    head = 'Content-Disposition: form-data; name="files"; filename="uploaded.png"'
    body = f"--X\r\n{head}\r\n\r\nabc\r\n--X--\r\n"
    return ask(
        address, "POST", "/gradio_api/upload", body, Content_Type=kind, **headers
    )


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:1"])
def test_names_of_this_machine(address, host):
    assert ask(address, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["example.org", "localhost.example.org:1", "127.0.0.1.example.org"]
    + ["192.168.0.1", "[::1", ""],
)
def test_other_names_are_refused(address, host):
    status, text = ask(address, Host=host)
    assert status == 403 and "only to localhost" in text


def test_other_sites_post_nothing(address, folder):
    port = address.split(":")[1]
    for origin in ("http://example.org", "http://127.0.0.1:1", "null"):
        assert upload(address, Origin=origin)[0] == 403
    assert not list(folder.rglob("uploaded.png"))
    assert ask(address, Origin="http://example.org")[0] == 200  # To read is allowed.
    for host in (address, f"localhost:{port}"):
        assert upload(address, Host=host, Origin=f"http://{host}")[0] == 200
    assert list(folder.rglob("uploaded.png"))


def test_a_reverse_proxy_with_a_name(address):
    host = "repair.example.org"
    assert ask(address, Host=host)[0] == 200
    assert upload(address, Host=host, Origin=f"https://{host}")[0] == 200
    assert upload(address, Origin=f"https://{host}")[0] == 200
    assert upload(address, Host=host, Origin="https://example.org")[0] == 403
    assert ask(address, Host="example.org")[0] == 403


def test_uploads_that_are_broken_off_are_removed(address, folder):
    def left():
        return [path for path in folder.glob("pconv-*/tmp*") if path.is_file()]

    host, port = address.split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            head = 'Content-Disposition: form-data; name="files"; filename="a.png"'
            body = f"--X\r\n{head}\r\n\r\n" + "x" * 300_000
            connection.sendall(
                f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address}\r\n"
                "Content-Type: multipart/form-data; boundary=X\r\n"
                f"Content-Length: 1000000\r\n\r\n{body}".encode()
            )
            time.sleep(0.05)
    for _ in range(100):
        if not left():
            break
        time.sleep(0.1)
    assert not left()


def test_uploads_have_a_limit(address):
    _, config = ask(address, path="/config")
    assert json.loads(config)["max_file_size"] == 200 * 2**20


@pytest.mark.slow
def test_no_file_outlives_the_process(network, tmp_path):
    with serve(network, tmp_path) as (process, address):
        assert upload(address)[0] == 200
        (uploaded,) = tmp_path.rglob("uploaded.png")
        assert uploaded.relative_to(tmp_path).parts[0].startswith("pconv-")
        # Like a page that is still open.
        url = f"http://{address}/gradio_api/heartbeat/a"
        with urllib.request.urlopen(url, timeout=60):
            process.terminate()
            process.wait(60)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.5, 1, 2])
def test_it_can_be_ended_while_it_starts(network, tmp_path, seconds):
    process = start(network, tmp_path)
    try:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2 + seconds)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


# In a browser.


@pytest.fixture
def tab():
    """A page of a browser, with the set of all hosts that it sends requests to."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the extra [browser] is not installed"
    )
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        tab.hosts = set()
        tab.on("request", lambda r: tab.hosts.add(r.url.split("/")[2]))
        yield tab
        browser.close()


def wait_until_shown(tab, canvas, image):
    """Wait until a canvas shows the image in its center, and moves no more."""
    shots = []
    for _ in range(100):
        shots.append(canvas.screenshot())
        pixels = np.asarray(Image.open(io.BytesIO(shots[-1])).convert("RGB"), float)
        height, width, _ = pixels.shape
        middle = pixels[height // 2 - 9 : height // 2 + 9, width // 2 - 9 :][:, :18]
        shown = np.abs(middle.mean((0, 1)) - image.mean((0, 1))).max() < 10
        if shown and len(set(shots[-4:])) == 1 and len(shots) > 4:
            return
        tab.wait_for_timeout(400)
    raise AssertionError("The image does not come to rest on the canvas.")


@pytest.mark.slow
def test_in_a_browser(tab, address, folder, tmp_path):
    image = photo(300, 400) // 4 + 100
    path = tmp_path / "photo.png"
    Image.fromarray(image).save(path)
    tab.goto(f"http://{address}")
    with tab.expect_file_chooser() as chooser:
        tab.click("#image")
    chooser.value.set_files(path)
    canvas = tab.locator("#editor canvas").first
    canvas.wait_for()
    wait_until_shown(tab, canvas, image)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 60, y)
    tab.mouse.down()
    tab.mouse.move(x, y + 10, steps=6)
    tab.mouse.move(x + 60, y - 20, steps=6)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    tab.fill("#variants input", "2")
    tab.wait_for_timeout(500)
    tab.click("#run")
    tab.wait_for_selector("#gallery img", timeout=60_000)
    first = tab.get_attribute("#repaired img", "src")
    tab.locator("#gallery button img").nth(1).click()
    tab.wait_for_function(
        "old => document.querySelector('#repaired img')?.src != old", arg=first
    )
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "photo-repaired-2.png"
    download.value.save_as(tmp_path / "out.png")
    result = np.asarray(Image.open(tmp_path / "out.png"))
    assert result.shape == image.shape
    changed = np.any(result != image, axis=-1)
    # The stroke goes through the middle, and ends well before the edges.
    rows, columns = np.nonzero(changed)
    assert 0.01 < changed.mean() < 0.2
    assert changed[140:160, 180:220].mean() > 0.9
    assert 60 < columns.min() < columns.max() < 340
    assert 60 < rows.min() < rows.max() < 240
    # The page shows the image that is downloaded.
    source = tab.get_attribute("#repaired img", "src")
    with urllib.request.urlopen(source) as response:
        (tmp_path / "shown.png").write_bytes(response.read())
    np.testing.assert_array_equal(Image.open(tmp_path / "shown.png"), result)
    # The next result replaces it.
    (first,) = {path.parent for path in folder.rglob("photo-repaired.png")}
    assert {path.name for path in first.iterdir()} == {
        "photo-repaired.png", "photo-repaired-2.png",
    }  # fmt: skip
    tab.click("#run")
    for _ in range(300):  # A minute, as above: two variants on a busy machine.
        tab.wait_for_timeout(200)
        if not first.exists():
            break
    (second,) = {path.parent for path in folder.rglob("photo-repaired.png")}
    assert second != first
    # No request goes to another machine.
    assert tab.hosts == {address}
