"""A page in the browser that repairs pictures: paint over what is to go.

The page shows pictures at a size that a browser likes; what is downloaded is the whole
picture, as it came in but for its hole. Nothing leaves the machine that it runs on.
"""

import functools
import importlib.resources
import ipaddress
import shutil
import socket
import tempfile
import threading
import time
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

import cv2
import gradio as gr
import jax
import numpy as np
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pconv_jax import masks
from pconv_jax.inpaint import image_io
from pconv_jax.inpaint.hole import hole_from_mask, resize_hole
from pconv_jax.inpaint.image_io import Picture
from pconv_jax.inpaint.inpainter import Inpainter

_SIDE = 1024  # Of what is shown, in pixels.
_PAINT = (255, 45, 149)
_EXAMPLES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
_SUFFIXES = [suffix for suffix in image_io.SUFFIXES if suffix != ".npy"]
_MAX_UPLOAD = "200mb"

# Whoever catches warnings catches those of all threads, and Gradio has many.
_CATCHING = threading.RLock()

_INTRODUCTION = """\
# Repair a picture
Open a picture, **paint over what is to be filled**, and press *Repair*. Nothing but
what is painted over changes.
"""

_REFUSAL = """\
This page answers to localhost alone, and to no other site; --host opens it to others.
"""

# What is shown before there is a result.
_NOTHING = (None, None, None, "", "", gr.DownloadButton(value=None, interactive=False))

_CSS = """
.legend span {
  display: inline-block; min-width: 1.8em; padding: .1em .4em; text-align: center;
  color: white; text-shadow: 0 0 3px black; font-size: .85em
}
"""


def build(inpainter: Inpainter) -> gr.Blocks:
    """Returns the page.

    Args:
      inpainter: what repairs the pictures.
    """
    with gr.Blocks(
        title="pconv_jax",
        analytics_enabled=False,
        delete_cache=(3600, 86400),
        fill_width=True,
    ) as page:
        photo_path, mask_path = gr.State(), gr.State()
        result_path = gr.State(delete_callback=_delete)
        gr.Markdown(_INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column():
                with gr.Row():
                    photo = gr.UploadButton(
                        "Open a picture", file_types=_SUFFIXES, elem_id="photo"
                    )
                    mask = gr.UploadButton(
                        "Open a mask", file_types=_SUFFIXES, elem_id="mask"
                    )
                editor = gr.ImageEditor(
                    label="What is painted over is filled",
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(
                        default_size=32,
                        colors=[f"rgb{_PAINT}"],
                        color_mode="fixed",
                    ),
                    height=600,
                    canvas_size=(_SIDE, _SIDE * 3 // 4),
                    elem_id="editor",
                )
                with gr.Row():
                    dilate = gr.Slider(
                        0,
                        32,
                        step=1,
                        label="Grow the hole by (pixels)",
                    )
                    invert = gr.Checkbox(label="In the mask, black is filled")
                run = gr.Button("Repair", variant="primary", elem_id="run")
            with gr.Column():
                with gr.Tabs():
                    with gr.Tab("Repaired"):
                        repaired = gr.Image(
                            show_label=False,
                            format="png",
                            height=600,
                            buttons=["fullscreen"],
                            elem_id="repaired",
                        )
                    with gr.Tab("Before and after"):
                        slider = gr.ImageSlider(show_label=False, max_height=600)
                    with gr.Tab("Fill depth"):
                        overlay = gr.Image(
                            show_label=False,
                            height=540,
                            buttons=["fullscreen"],
                            elem_id="depth",
                        )
                        legend = gr.HTML()
                report = gr.Markdown()
                download = gr.DownloadButton(
                    "Download at full size", interactive=False, elem_id="download"
                )
        gr.Markdown("Examples")
        examples = gr.Dataset(
            components=["image"],
            samples=[[str(_example(name))] for name in _EXAMPLES],
            type="index",
            show_label=False,
            elem_id="examples",
        )

        opened = [photo_path, mask_path, editor]
        results = [repaired, slider, overlay, legend, report, download]
        photo.upload(lambda path: (path, None, show(path)), photo, opened).then(
            lambda: _NOTHING, None, results
        )
        mask.upload(
            lambda path, photo: (path, show(photo, mask=path)),
            [mask, photo_path],
            [mask_path, editor],
        )
        invert.input(
            lambda path, mask, invert: show(path, mask=mask, invert=invert),
            [photo_path, mask_path, invert],
            editor,
        )
        examples.click(open_example, examples, opened).then(
            lambda: _NOTHING, None, results
        )
        run.click(
            functools.partial(repair, inpainter),
            [photo_path, mask_path, editor, dilate, invert, result_path],
            [*results, result_path],
        )
    return page


def show(
    photo: str | None, *, mask: str | None = None, invert: bool = False
) -> Image.Image | None:
    """Returns a picture to paint on, with the hole of a mask that was opened."""
    if photo is None:
        return None
    image = _shown(_read(photo).image)
    if mask is None:
        return image
    hole = hole_from_mask(_read(mask).image, invert=invert)
    hole = resize_hole(hole, image.size[::-1])
    paint = Image.new("RGB", image.size, _PAINT)
    image.paste(paint, mask=Image.fromarray(np.where(hole, 180, 0).astype(np.uint8)))
    return image


def open_example(index: int) -> tuple[str, str, Image.Image]:
    """Returns one of the examples: the paths of picture and mask, and what to show."""
    path = str(_example(_EXAMPLES[index]))
    mask = masks.random_mask(
        jax.random.key(index), (512, 512), hole_ratio=0.12, border=False
    )
    image = _read(path).image
    hole = resize_hole(np.asarray(mask)[..., 0] == 0, image.size[::-1])
    mask_path = str(_new_file("mask.png"))
    image_io.write(mask_path, Picture(Image.fromarray(hole), {}))
    return path, mask_path, show(path, mask=mask_path)


def repair(
    inpainter: Inpainter,
    photo: str | None,
    mask: str | None,
    drawing: dict[str, Any] | None,
    dilate: int,
    invert: bool,
    previous: str | None,
) -> tuple[Any, ...]:
    """Returns what the page shows of a repaired picture, and the file to download.

    Args:
      inpainter: what repairs it.
      photo: path of the picture.
      mask: path of a mask, if one was opened.
      drawing: what was painted, as Gradio's editor gives it.
      dilate: by how many pixels to enlarge the hole.
      invert: whether the mask is black where to fill.
      previous: path of an earlier result, which is deleted.
    """
    if photo is None:
        raise _error("Open a picture first.")
    start = time.monotonic()
    with _CATCHING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            picture = _read(photo)
            before = _shown(picture.image)
            hole = _hole(picture.image, mask, drawing, invert)
            result, depth = inpainter(
                picture.image, hole, dilate=int(dilate), return_depth=True
            )
            path = _new_file(f"{Path(photo).stem}-repaired{_suffix(photo)}")
            image_io.write(path, Picture(result, picture.info))
        except ValueError as error:
            raise _error(str(error)) from error
    _delete(previous)
    for warning in caught:
        gr.Warning(str(warning.message))
    after = _shown(result)
    height, width = depth.shape
    report = (
        f"{width} x {height} pixels, {np.mean(depth > 0):.1%} filled, in "
        f"{time.monotonic() - start:.1f} s."
    )
    download = gr.DownloadButton(value=str(path), interactive=True)
    overlay = _overlay(after, depth)
    slider, legend = (before, after), _legend(depth)
    return after, slider, overlay, legend, report, download, str(path)


def launch(inpainter: Inpainter, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serves the page until it is interrupted.

    Files of more than 200 MB are refused. At a loopback address, so is whatever a page
    of another site asks for.

    Args:
      inpainter: what repairs the pictures.
      host: address to listen on; ``'0.0.0.0'`` lets others in.
      port: to listen on.

    Raises:
      ValueError: if it cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"host and port: cannot listen on {host}, port {port}: {error}."
            ) from error
    # Gradio's own fonts would be fetched from elsewhere.
    fonts = ["system-ui", "sans-serif"]
    name = f"[{host}]" if ":" in host else host
    guards = [Middleware(_refuse_other_sites)] if _is_loopback(name) else []
    print(f"Open http://{name}:{port} in a browser. Ctrl-C ends it.", flush=True)
    page = build(inpainter).queue(api_open=False)  # So that no request goes past it.
    page.launch(
        quiet=True,
        server_name=name,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        show_error=True,
        theme=gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        allowed_paths=[str(_example("").parent)],
        max_file_size=_MAX_UPLOAD,
        app_kwargs={"middleware": guards},
    )


def _refuse_other_sites(app: ASGIApp) -> ASGIApp:
    """Returns an application that does not do what pages of other sites ask for.

    They reach it by names of their own that lead to this machine, and by posting to it.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_of_this_site(scope):
            await app(scope, receive, send)
        else:
            refusal = PlainTextResponse(_REFUSAL, status_code=403)
            await refusal(scope, receive, send)

    return guarded


def _is_of_this_site(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")
    harmless = origin is None or scope.get("method") == "GET"
    return _is_loopback(host) and (harmless or origin.partition("://")[2] == host)


def _is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine by name or address."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname
        return name == "localhost" or ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


def _error(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def _read(path: str) -> Picture:
    try:
        with _CATCHING:
            return image_io.read(path)
    except ValueError as error:
        raise _error(str(error)) from error


def _hole(image, mask, drawing, invert):
    """Returns what was painted over, or is in the mask that was opened."""
    shape = image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]
    hole = np.zeros(shape, bool)
    for layer in (drawing or {}).get("layers") or ():
        painted = np.asarray(layer.convert("RGBA"))[..., 3] > 0
        hole |= resize_hole(painted, shape)
    if mask is not None:
        opened = hole_from_mask(_read(mask).image, invert=invert)
        if opened.shape != shape:
            warnings.warn(
                "The mask is of another size than the picture, and was made to fit.",
                stacklevel=1,
            )
        hole |= resize_hole(opened, shape)
    if not hole.any():
        raise ValueError("Nothing is painted over yet.")
    return hole


def _shown(image: Image.Image | np.ndarray) -> Image.Image:
    """Returns 8-bit RGB of a size to look at; what is transparent is white."""
    array = image if isinstance(image, np.ndarray) else image_io.to_array(image)
    if array.dtype != np.uint8:
        top = 1 if np.issubdtype(array.dtype, np.floating) else 65535
        array = np.rint(np.clip(array / np.float32(top), 0, 1) * 255).astype(np.uint8)
    shown = Image.fromarray(array)
    if shown.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", shown.size, "white")
        shown = Image.alpha_composite(white, shown.convert("RGBA"))
    shown = shown.convert("RGB")
    shown.thumbnail((_SIDE, _SIDE))
    return shown


def _colors(levels: int) -> np.ndarray:
    """Returns the color of each fill depth from 1 on, uint8 ``[levels, 3]``."""
    ramp = np.linspace(255, 40, levels).astype(np.uint8)[:, None]
    return cv2.applyColorMap(ramp, cv2.COLORMAP_PLASMA)[:, 0, ::-1]


def _overlay(image: Image.Image, depth: np.ndarray) -> Image.Image:
    """Returns a picture in grey, its hole in the colors of the fill depth."""
    depth = cv2.resize(depth, image.size, interpolation=cv2.INTER_NEAREST)
    colors = _colors(int(depth.max(initial=1)))
    grey = np.asarray(image.convert("L").convert("RGB"))
    hole = (depth > 0)[..., None]
    mixed = 0.3 * grey + 0.7 * colors[np.maximum(depth, 1) - 1]
    return Image.fromarray(np.where(hole, mixed, grey).astype(np.uint8))


def _legend(depth: np.ndarray) -> str:
    colors = _colors(int(depth.max(initial=1)))
    chips = "".join(
        f"<span style='background: rgb({r}, {g}, {b})'>{level}</span>"
        for level, (r, g, b) in enumerate(colors, 1)
        if np.any(depth == level)
    )
    return f"<div class='legend'>{chips} layer at which a pixel became valid</div>"


def _new_file(name: str) -> Path:
    # Gradio deletes what is shown from there, once it is old.
    return Path(tempfile.mkdtemp(dir=gr.utils.get_upload_folder()), name)


def _delete(path: str | None) -> None:
    """Deletes a file of `_new_file`, if there is one."""
    if path is not None:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _SUFFIXES else ".png"


def _example(name: str) -> Path:
    return Path(str(importlib.resources.files("skimage") / "data" / name))
