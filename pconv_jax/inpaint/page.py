"""A web page that repairs images: open one, paint over the area to fill.

The page shows images at a size that suits a browser; the downloaded image has its full
size, and only its hole has changed. Nothing leaves the machine that serves the page.
"""

import functools
import importlib.util
import re
import shutil
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from pconv_jax import masks
from pconv_jax._errors import RunError, UserError
from pconv_jax.inpaint import display, guard, image_io
from pconv_jax.inpaint.decoder import Decoder
from pconv_jax.inpaint.formats import SUFFIXES, variant_path
from pconv_jax.inpaint.hole import hole_from_mask, resize_hole
from pconv_jax.inpaint.image_io import ImageFile
from pconv_jax.inpaint.inpainter import Inpainter
from pconv_jax.inpaint.progress import Progress, ignore, share

try:
    import gradio as gr
    from gradio.themes import Soft
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware
except ModuleNotFoundError as error:
    raise UserError(
        f"the demo needs {error.name}: pip install 'pconv-jax[demo]'."
    ) from error

# Pixels. Objects that were pasted into photos, with soft rims, and painted over by a
# wobbling hand were removed best with 2 or 3, by PSNR, with and without a shadow.
_MARGIN = 3
_EXAMPLES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
_SUFFIXES = [suffix for suffix in SUFFIXES if suffix != ".npy"]
_MAX_UPLOAD = "200mb"
_MAX_PIXELS = 40_000_000
_DECODER = Decoder()  # Files may crash it, and not the page.
_MAX_WAITING = 30
_MAX_VARIANTS = 4

# What takes memory happens one at a time; Gradio shows the others their place.
_QUEUED: dict[str, Any] = {"concurrency_id": "images", "concurrency_limit": 1}

# Catching warnings catches those of all threads, and Gradio has many.
_CATCHING = threading.RLock()

_INTRODUCTION = """\
# Repair an image
Open an image, **paint over the area to fill**, and press *Repair*. Only the painted
area changes. Paint in *blue* over what must not be copied into it, such as the rest of
an object that is removed.
"""

_CSS = """
.legend span {
  display: inline-block; min-width: 1.8em; padding: .1em .4em; text-align: center;
  color: white; text-shadow: 0 0 3px black; font-size: .85em
}
"""


class _Paths(NamedTuple):
    """The files that were opened, and the first one that was written."""

    image: gr.State
    mask: gr.State
    result: gr.State


class _Inputs(NamedTuple):
    image: gr.UploadButton
    mask: gr.UploadButton
    editor: gr.ImageEditor
    margin: gr.Slider
    invert: gr.Checkbox
    sharp: gr.Checkbox
    variants: gr.Number
    run: gr.Button


class _Results(NamedTuple):
    repaired: gr.Image
    slider: gr.ImageSlider
    overlay: gr.Image
    legend: gr.HTML
    gallery: gr.Gallery
    report: gr.Markdown
    download: gr.DownloadButton


class Shown(NamedTuple):
    """What the components of `_Results` show, in their order.

    Attributes:
      repaired: The repaired image.
      slider: The image before and after.
      overlay: The image in gray, with the fill depth in colors.
      legend: The colors of the fill depth, HTML.
      gallery: An update of the gallery, which shows all variants if there are several.
      report: A sentence about the repair.
      download: An update of the button that downloads the result.
    """

    repaired: Image.Image | None
    slider: tuple[Image.Image, Image.Image] | None
    overlay: Image.Image | None
    legend: str
    gallery: dict[str, Any]
    report: str
    download: gr.DownloadButton


# Before there is a result.
_NOTHING = Shown(
    repaired=None,
    slider=None,
    overlay=None,
    legend="",
    gallery=gr.update(value=None, visible=False),
    report="",
    download=gr.DownloadButton(value=None, interactive=False),
)


def build(inpainter: Inpainter) -> gr.Blocks:
    """Build the page.

    Args:
      inpainter: Repairs the images.
    """
    with gr.Blocks(
        title="pconv_jax",
        analytics_enabled=False,
        delete_cache=(3600, 86400),
        fill_width=True,
    ) as page:
        paths = _Paths(gr.State(), gr.State(), gr.State(delete_callback=_delete))
        gr.Markdown(_INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column():
                inputs = _build_inputs()
            with gr.Column():
                results = _build_results()
        example_paths = _find_examples()
        gr.Markdown("Examples", visible=bool(example_paths))
        examples = gr.Dataset(
            components=["image"],
            samples=[[str(path)] for path in example_paths],
            type="index",
            show_label=False,
            visible=bool(example_paths),
            elem_id="examples",
        )

        _connect(inpainter, paths, inputs, results, examples)
    return page


def _connect(
    inpainter: Inpainter,
    paths: _Paths,
    inputs: _Inputs,
    results: _Results,
    examples: gr.Dataset,
) -> None:
    """Connect the events of the components to functions."""
    image_path, mask_path, result_path = paths
    opened = [image_path, mask_path, inputs.editor]
    inputs.image.upload(
        open_image,
        [inputs.image, image_path, mask_path, inputs.invert],
        opened,
        **_QUEUED,
    ).then(lambda: _NOTHING, None, list(results))
    inputs.mask.upload(
        lambda path, image, invert: (path, show(image, mask=path, invert=invert)),
        [inputs.mask, image_path, inputs.invert],
        [mask_path, inputs.editor],
        **_QUEUED,
    )
    inputs.invert.input(
        lambda path, mask, invert: show(path, mask=mask, invert=invert),
        [image_path, mask_path, inputs.invert],
        inputs.editor,
        **_QUEUED,
    )
    examples.click(open_example, examples, opened, **_QUEUED).then(
        lambda: _NOTHING, None, list(results)
    )
    inputs.run.click(
        _repair_with_bar(inpainter),
        [
            *opened,
            inputs.margin,
            inputs.invert,
            result_path,
            inputs.variants,
            inputs.sharp,
        ],
        [*results, result_path],
        **_QUEUED,
    )
    results.gallery.select(
        choose,
        [image_path, result_path],
        [results.repaired, results.slider, results.download],
        **_QUEUED,
    )


def _build_inputs() -> _Inputs:
    with gr.Row():
        image = gr.UploadButton("Open an image", file_types=_SUFFIXES, elem_id="image")
        mask = gr.UploadButton("Open a mask", file_types=_SUFFIXES, elem_id="mask")
    editor = gr.ImageEditor(
        label="Pink is filled, blue is not copied from",
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(
            default_size=32,
            colors=[f"rgb{display.PAINT}", f"rgb{display.KEEP_OUT}"],
            color_mode="fixed",
        ),
        height=600,
        canvas_size=(display.SIDE, display.SIDE * 3 // 4),
        elem_id="editor",
    )
    margin = gr.Slider(
        0, 32, _MARGIN, step=1, label="Grow the painted area by (pixels)"
    )
    with gr.Row():
        invert = gr.Checkbox(label="In the mask, black is filled")
        variants = gr.Number(
            1,
            minimum=1,
            maximum=_MAX_VARIANTS,
            precision=0,
            label=f"Variants (1 to {_MAX_VARIANTS})",
            elem_id="variants",
        )
    sharp = gr.Checkbox(True, label="Sharp: fill wide areas with whole pieces")
    run = gr.Button("Repair", variant="primary", elem_id="run")
    return _Inputs(image, mask, editor, margin, invert, sharp, variants, run)


def _build_results() -> _Results:
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
    gallery = gr.Gallery(
        show_label=False,
        visible=False,
        object_fit="contain",
        columns=_MAX_VARIANTS,
        height=180,
        format="png",
        allow_preview=False,
        buttons=[],
        elem_id="gallery",
    )
    report = gr.Markdown()
    download = gr.DownloadButton(
        "Download at full size", interactive=False, elem_id="download"
    )
    return _Results(repaired, slider, overlay, legend, gallery, report, download)


def open_image(
    path: str, previous: str | None, mask: str | None, invert: bool
) -> tuple[str, str | None, Image.Image | None]:
    """Open an image, with the mask that was opened before it.

    Args:
      path: Path of the image.
      previous: Path of the image before, whose mask is dropped, or None.
      mask: Path of a mask, or None.
      invert: Whether the mask is black where to fill.

    Returns:
      The paths of the image and its mask, and the image to paint on.
    """
    mask = mask if previous is None else None
    return path, mask, show(path, mask=mask, invert=invert)


def show(
    image: str | None, *, mask: str | None = None, invert: bool = False
) -> Image.Image | None:
    """Prepare an image to paint on.

    Args:
      image: Path of the image.
      mask: Path of a mask, whose hole is painted over. By default there is none.
      invert: Whether the mask is black where to fill. The default is False.

    Returns:
      The image at the size of the page; None if there is no image.
    """
    if image is None:
        return None
    shown = display.shrink(_read(image).image)
    if mask is not None:
        hole = resize_hole(_read_mask(mask, invert), shown.size[::-1])
        opacity = Image.fromarray(np.where(hole, 180, 0).astype(np.uint8))
        shown.paste(Image.new("RGB", shown.size, display.PAINT), mask=opacity)
    return shown


def open_example(index: int) -> tuple[str, str, Image.Image | None]:
    """Open an example: the paths of its image and mask, and the image to paint on."""
    path = str(_find_examples()[index])
    mask = masks.random_mask(
        jax.random.key(index), (512, 512), hole_ratio=0.12, border=False
    )
    shape = display.shape_of(_read(path).image)
    hole = resize_hole(np.asarray(mask)[..., 0] == 0, shape)
    mask_path = str(_new_file("mask.png"))
    image_io.write(mask_path, ImageFile(Image.fromarray(hole), {}))
    return path, mask_path, show(path, mask=mask_path)


def repair(
    inpainter: Inpainter,
    image: str | None,
    mask: str | None,
    drawing: dict[str, Any] | None,
    margin: int,
    invert: bool,
    previous: str | None,
    variants: int,
    sharp: bool,
    *,
    progress: Progress = ignore,
) -> tuple[Shown, str]:
    """Repair an image, and write it to a file to download.

    Args:
      inpainter: Repairs the image.
      image: Path of the image.
      mask: Path of a mask, or None.
      drawing: What was painted, as Gradio's editor gives it.
      margin: Number of pixels of the page by which the painted area grows. An opened
        mask is taken as it is.
      invert: Whether the mask is black where to fill.
      previous: Path of an earlier result, which is deleted, or None.
      variants: Number of results, with the seeds 0, 1, .... Each is written to a
        file, and the first is shown.
      sharp: See `Inpainter`.
      progress: See `Inpainter`. By default nothing is reported.

    Returns:
      What the page shows, and the path of the first file.
    """
    if image is None:
        raise _error("Open an image first.")
    variants = int(np.clip(variants or 1, 1, _MAX_VARIANTS))
    start = time.monotonic()
    with _CATCHING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # Other libraries warn programmers.
        warnings.filterwarnings("always", category=UserWarning)
        try:
            file = _read(image)
            before = display.shrink(file.image)
            shape = display.shape_of(file.image)
            hole = display.painted_area(
                drawing, display.PAINT, shape, margin=int(margin)
            )
            if mask is not None:
                hole |= _find_opened(mask, invert, shape)
            if not hole.any():
                raise UserError("Nothing is painted over yet.")
            exclude = display.painted_area(drawing, display.KEEP_OUT, shape)
            path = _new_file(f"{Path(image).stem}-repaired{_suffix(image)}")
            results, depth = _write_variants(
                inpainter, file, hole, exclude, path, variants, sharp, progress
            )
        except (RunError, UserError) as error:
            raise _error(str(error)) from error
    _delete(previous)
    for warning in caught:
        gr.Warning(str(warning.message))
    height, width = depth.shape
    shown = Shown(
        repaired=results[0],
        slider=(before, results[0]),
        overlay=display.draw_depth(results[0], depth),
        legend=display.depth_legend(depth),
        gallery=gr.update(value=results, visible=variants > 1, selected_index=0),
        report=f"{width} x {height} pixels, {np.mean(depth > 0):.1%} filled, in "
        f"{time.monotonic() - start:.1f} s.",
        download=gr.DownloadButton(value=str(path), interactive=True),
    )
    return shown, str(path)


def _write_variants(
    inpainter: Inpainter,
    file: ImageFile,
    hole: np.ndarray,
    exclude: np.ndarray,
    path: Path,
    count: int,
    sharp: bool,
    progress: Progress,
) -> tuple[list[Image.Image], np.ndarray]:
    """Repair an image with the seeds 0, 1, ..., and write each result to a file.

    Returns:
      The results at the size of the page, and the fill depth, which all have.
    """
    shown, depth = [], np.zeros(hole.shape, np.uint8)
    for seed in range(count):
        task = share(progress, seed, seed + 1, total=count)
        result, depth = inpainter(
            file.image,
            hole,
            exclude=exclude,
            seed=seed,
            sharp=sharp,
            progress=task,
            return_depth=True,
        )
        shown.append(display.shrink(result))
        image_io.write(variant_path(path, seed), ImageFile(result, file.info))
    return shown, depth


def _repair_with_bar(inpainter: Inpainter) -> Callable[..., tuple[Any, ...]]:
    """Return `repair` with the progress bar that Gradio gives to a function."""

    # Gradio looks for a default of this type, and puts its bar before the inputs.
    def run(bar: gr.Progress = gr.Progress(), *inputs: Any) -> tuple[Any, ...]:  # noqa: B008
        shown, path = repair(inpainter, *inputs, progress=bar)
        return *shown, path

    return run


def choose(
    image: str, result: str, event: gr.SelectData
) -> tuple[Image.Image, tuple[Image.Image, Image.Image], gr.DownloadButton]:
    """Show the variant that was chosen, and let it be downloaded.

    Args:
      image: Path of the image.
      result: Path of the first variant.
      event: What was chosen in the gallery.

    Returns:
      The values of the components of the image, of its comparison with the image
      before, and of the download.
    """
    path = str(variant_path(Path(result), event.index))
    after = display.shrink(_read(path).image)
    before = display.shrink(_read(image).image)
    return after, (before, after), gr.DownloadButton(value=path, interactive=True)


def launch(
    inpainter: Inpainter,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    root_path: str | None = None,
    allowed_hosts: Sequence[str] = (),
    auth: tuple[str, str] | None = None,
) -> None:
    """Serve the page until it is interrupted.

    Files of more than 200 MB, and images of more than 40,000,000 pixels, are refused.
    At a loopback address, requests of other sites' pages are refused, too.

    Args:
      inpainter: Repairs the images.
      host: Address to listen on. The default is 127.0.0.1; ``'0.0.0.0'`` lets other
        machines in.
      port: Port to listen on. The default is 7860.
      root_path: Path at which a reverse proxy serves the page, such as ``/repair``. By
        default it is ``/``.
      allowed_hosts: Names by which a reverse proxy on this machine serves the page. By
        default none.
      auth: Name and password that the page asks for. By default it asks for none.

    Raises:
      UserError: If the address and port cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"host and port: cannot listen on {host}, port {port}: {error}."
            ) from error
    # Gradio's own fonts would be downloaded from another machine.
    fonts = ["system-ui", "sans-serif"]
    name = guard.in_url(host)
    uploads = Path(get_upload_folder())
    middleware = [Middleware(guard.RemoveAbortedUploads, folder=uploads)]
    if guard.is_loopback(name):
        allowed = frozenset(allowed_hosts)
        middleware.insert(0, Middleware(guard.refuse_other_sites, allowed=allowed))
    print(f"Open http://{name}:{port} in a browser. Ctrl-C ends it.", flush=True)
    # No request may bypass the queue.
    page = build(inpainter).queue(api_open=False, max_size=_MAX_WAITING)
    page.launch(
        quiet=True,
        server_name=name,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        show_error=False,  # Only those of `_error`: others may name folders.
        root_path=root_path,
        auth=auth,
        theme=Soft(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        allowed_paths=[str(path) for path in _find_examples()],
        max_file_size=_MAX_UPLOAD,
        app_kwargs={"middleware": middleware},
    )


def _error(message: str) -> gr.Error:
    """Make an error for the page, without the folders of its files."""
    folder = re.escape(get_upload_folder().rstrip("/"))
    return gr.Error(re.sub(rf"{folder}(/\w+)*/", "", message), print_exception=False)


@functools.lru_cache(maxsize=1000)  # Gradio never gives two files one path.
def _can_be_decoded(path: str) -> bool:
    return _DECODER.survives(path, max_pixels=_MAX_PIXELS)


def _read(path: str) -> ImageFile:
    try:
        with _CATCHING:
            if not _can_be_decoded(path):
                raise UserError(
                    f"cannot read {path}: its decoder crashes. Convert it in another "
                    "program."
                )
            return image_io.read(path, max_pixels=_MAX_PIXELS)
    except UserError as error:
        raise _error(str(error)) from error


def _read_mask(path: str, invert: bool) -> np.ndarray:
    image = _read(path).image
    try:
        with _CATCHING:
            return hole_from_mask(image, invert=invert)
    except UserError as error:
        raise _error(str(error)) from error


def _find_opened(mask: str, invert: bool, shape: tuple[int, int]) -> np.ndarray:
    """Read the hole of an opened mask, at the image's size."""
    hole = _read_mask(mask, invert)
    if hole.shape != shape:
        warnings.warn(
            "The mask's size differed from the image's, so it was resized.",
            stacklevel=1,
        )
    return resize_hole(hole, shape)


def _new_file(name: str) -> Path:
    # Gradio deletes old files there.
    return Path(tempfile.mkdtemp(dir=get_upload_folder()), name)


def _delete(path: str | None) -> None:
    """Delete a file of `_new_file` and its folder."""
    if path is not None:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if suffix in _SUFFIXES else ".png"


def _find_examples() -> list[Path]:
    """Find the photos of scikit-image, if it is installed."""
    spec = importlib.util.find_spec("skimage")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        return []
    return [Path(folders[0], "data", name) for name in _EXAMPLES]
