"""Evaluates methods on the pairs of a protocol, and writes what was found."""

import functools
import json
import math
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from pconv_jax import __version__, _files, masks
from pconv_jax.data import pipeline, sources
from pconv_jax.data.base import ImageSource
from pconv_jax.data.mask_folder import MaskFolder
from pconv_jax.evaluate import methods as methods_lib
from pconv_jax.evaluate import report, results
from pconv_jax.evaluate.learned import Learned, set_metrics
from pconv_jax.evaluate.methods import Method, Network
from pconv_jax.evaluate.protocol import EvalSet, draw_masks
from pconv_jax.evaluate.results import ALL_METRICS, METRICS, Evaluation
from pconv_jax.evaluate.store import Key, Record, Store, key_of
from pconv_jax.runs import opening, parallel
from pconv_jax.runs.config import read_settings
from pconv_jax.runs.inference import score_step
from pconv_jax.runs.output import picture_grid, write_json, write_png
from pconv_jax.runs.settings import Settings
from pconv_jax.unet import PConvUNet, suggest_sizes

_BATCH = 4  # Pictures that are worked on at once; more if there are more devices.
_ERROR_LENGTH = 200

DEFAULT_METHODS = ("network", "mean", "telea", "navier_stokes")
"""What `evaluate_run` compares unless told otherwise: the methods that are fast."""


def evaluate(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: ImageSource,
    *,
    image_size: int,
    examples: int,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluates one network.

    Args:
      model: the network.
      variables: its ``params`` and ``batch_stats``.
      source: the pictures, see `EvalSet`.
      image_size: side of the squares after resizing, in pixels.
      examples: how many for each of `MASK_CLASSES`.
      seed: of the masks.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if the size does not suit the network, or too many pictures cannot be
        read.
    """
    pairs = EvalSet(source, image_size=image_size, examples=examples, seed=seed)
    network = Network(network_name(model), model, variables)
    return compare([network], pairs, progress=progress)


def compare(
    methods: Sequence[Method],
    protocol: EvalSet,
    *,
    learned: Learned | None = None,
    directory: str | pathlib.Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates methods on the same pairs of pictures and masks.

    With several processes, each of them has to call this, and all get the result; they
    cannot keep records.

    Args:
      methods: what to compare. Differences are taken from the first one.
      protocol: the pairs.
      learned: the networks of metrics that need some; None leaves these out.
      directory: where to keep records as they come, so that the same call goes on where
        one that was killed stopped; None keeps none.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if a network does not suit the size of the pictures, or too many
        pictures cannot be read; or if several processes are to keep records.
    """
    if directory and parallel.process_count() > 1:
        raise ValueError("directory must be None where there are several processes.")
    for method in methods:
        _check_size(method, protocol.image_size)
    store = Store(directory and pathlib.Path(directory))
    precision = jax.config.jax_default_matmul_precision
    code = [__version__, jax.__version__, jax.default_backend(), str(precision)]
    for method in methods:
        of_pairs = protocol.fingerprint if directory else ""
        of_method = method.fingerprint if directory else ""
        about = [*code, of_pairs, of_method, learned and learned.fingerprint]
        about += [metric.definition for metric in METRICS.values()]
        store.open(method.name, json.dumps(about))
    devices = parallel.device_count()
    size = -(-_BATCH // devices) * devices
    total = len(methods) * len(protocol.classes) * protocol.examples
    # None: no bar where the standard error is not a terminal.
    disable = None if progress else True
    with tqdm(total=total, desc="evaluate", leave=False, disable=disable) as bar:
        for index, images in protocol.batches(size):
            for mask_class in protocol.classes:
                keys = [(*mask_class, int(i)) for i in index]
                todo = [m for m in methods if not store.has(m.name, keys)]
                bar.update(len(index) * (len(methods) - len(todo)))
                mask = protocol.masks(index, *mask_class) if todo else None
                for method in todo:
                    bar.set_postfix_str(method.name)
                    places = [_place(protocol, *key) for key in keys]
                    numbers = _evaluate_batch(method, images, mask, learned)
                    if "features" in numbers[0]:
                        store.add_features(
                            method.name,
                            _rows(protocol, keys),
                            np.stack([row.pop("features") for row in numbers]),
                            capacity=len(protocol.classes) * protocol.examples,
                        )
                    records = map(_make_record, [method] * len(keys), places, numbers)
                    store.add(method.name, records)
                    bar.update(len(index))
    evaluation = _collect(methods, protocol, store)
    if learned:
        evaluation.left_out.extend(learned.left_out)
        evaluation.sets.update(_score_sets(evaluation, protocol, store, learned))
    return evaluation


def evaluate_run(
    workdir: str | pathlib.Path | None = None,
    *,
    weights: str | None = None,
    config: ConfigDict | None = None,
    step: int | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    examples: int | None = None,
    images: str | None = None,
    mask_folder: str | None = None,
    hole: str = "white",
    image_size: int | None = None,
    seed: int = 0,
    time_budget: float = 60.0,
    learned: bool = True,
    vgg: str | None = None,
    out: str | pathlib.Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates a run's network, or a release's, beside other methods; writes a report.

    Written are ``results.json``, which is always the same for the same arguments, on
    any number of devices (unless a method runs out of its time); ``timing.json``;
    ``results.md``; ``examples.csv``; ``report.html``; ``pictures.png`` and
    ``worst.png``, the median and the worst example of each hole bin; and ``records/``,
    from which the same call goes on after one that was killed.

    Args:
      workdir: of the run.
      weights: a release instead, see `pretrained.from_pretrained`.
      config: the experiment that says on what to evaluate; None for the network's own,
        or the paper's recipe where there is none.
      step: which checkpoint; None for the newest.
      methods: what to compare, see `methods.get_methods`; 'network' is the network.
      examples: how many for each of `MASK_CLASSES`; None for what the experiment says.
      images: a folder of pictures, or a tar file; by default the experiment's
        validation split, or for a release without one, scikit-image's photos.
      mask_folder: a folder of mask pictures; None for masks that are drawn.
      hole: the colour of holes in them, 'white' or 'black'.
      image_size: side of the squares, in pixels; None for the experiment's.
      seed: of masks and intervals.
      time_budget: seconds that a classical method may take for a picture.
      learned: whether to compute LPIPS, FID and Inception Score, if the weights of
        their networks are there or can be downloaded.
      vgg: weights of a VGG, see `load_vgg_params`, for a perceptual distance that needs
        nothing else; None leaves it out.
      out: directory to write to; by default ``evaluation`` in the workdir, or for a
        release ``runs/NAME-evaluation``.
      progress: whether to show a progress bar.

    Raises:
      ValueError: if there is no such run or checkpoint, an argument makes no sense, or
        as `compare`.
    """
    if (workdir is None) == (weights is None):
        raise ValueError("give either a workdir or weights: the network to evaluate.")
    if weights is None:
        trained = opening.load_run(workdir, step=step)
        out = out or pathlib.Path(workdir) / "evaluation"
    else:
        if step is not None:
            raise ValueError("step: is of a workdir, and weights have none.")
        trained = opening.load_weights(weights)
        out = out or pathlib.Path("runs") / f"{pathlib.Path(weights).stem}-evaluation"
    # An experiment that nobody named says nothing of a release's pictures.
    on_photos = weights is not None and config is None
    if config is None:
        settings = trained.settings or Settings()
    else:
        settings = read_settings(config)
    if images:
        source = sources.open_images(images)
    elif on_photos:
        source = sources.open_source("bundled", split="validation")
    else:
        source = opening.get_images(settings.data, "validation")
    protocol = EvalSet(
        source,
        image_size=settings.image_size if image_size is None else image_size,
        examples=settings.evaluation_examples if examples is None else examples,
        seed=seed,
        mask_folder=MaskFolder(mask_folder, hole_color=hole) if mask_folder else None,
    )
    name = network_name(trained.model)
    network = Network(name, trained.model, trained.variables)
    specs = [name if spec == "network" else spec for spec in methods]
    chosen = methods_lib.get_methods(specs, network, time_budget=time_budget)
    networks = None
    if learned or vgg:
        networks = Learned(
            image_size=protocol.image_size, published=learned, vgg_weights=vgg
        )
    out = pathlib.Path(out)
    try:
        evaluation = compare(
            chosen,
            protocol,
            learned=networks,
            directory=out / "records",
            progress=progress,
        )
        about = {"step": trained.step, "config": settings.to_dict()}
        about |= {"warnings": trained.warnings}
        about |= {"vgg": pathlib.Path(vgg).name} if vgg else {}
        write_results(out, evaluation, protocol, chosen, about=about)
    finally:
        for method in chosen:
            method.close()
    return evaluation


def write_results(
    directory: pathlib.Path,
    evaluation: Evaluation,
    protocol: EvalSet,
    methods: Sequence[Method],
    *,
    about: Mapping[str, Any],
) -> None:
    """Writes all that was found: JSON, Markdown, CSV, HTML and pictures.

    Args:
      directory: where to.
      evaluation: what was found.
      protocol: on what.
      methods: of what.
      about: what else is to be in ``results.json``.
    """
    descriptions = {method.name: method.description for method in methods}
    found = {
        "pconv_jax": __version__,
        **about,
        "protocol": protocol.describe(),
        "methods": descriptions,
        "metrics": {m: ALL_METRICS[m]._asdict() for m in evaluation.metrics},
        "intervals": results.INTERVALS,
        "left_out": evaluation.left_out,
        "table": evaluation.table(),
        "summary": evaluation.summary(),
        "examples": evaluation.examples,
        "failures": evaluation.failures,
    }
    timing = {
        "methods": evaluation.timing(),
        "how": (
            "Wall time from pictures to pictures in the host's memory. Networks: "
            "compiled before, one picture at a time on each device, the time of a "
            "few divided by their number. Other methods: one picture at a time, on "
            "one core of the host."
        ),
        "devices": f"{parallel.device_count()} x {jax.devices()[0].device_kind}",
        "host": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    write_json(directory / "results.json", found)
    write_json(directory / "timing.json", timing)
    _files.write_bytes(directory / "examples.csv", evaluation.csv().encode())
    markdown = evaluation.format(markdown=True) + "\n"
    _files.write_bytes(directory / "results.md", markdown.encode())
    shown = choose_examples(evaluation)
    pictures = fill_examples(
        methods,
        protocol,
        [example for _, example in shown],
        failures=evaluation.failures,
    )
    page = report.make_page(
        evaluation,
        protocol=protocol.describe(),
        descriptions=descriptions,
        timing=timing,
        shown=[(rank, e, p) for (rank, e), p in zip(shown, pictures)],
    )
    _files.write_bytes(directory / "report.html", page.encode())
    for rank, name in {"median": "pictures.png", "worst": "worst.png"}.items():
        rows = [p for (found, _), p in zip(shown, pictures) if found == rank]
        if rows:
            write_png(directory / name, _lay_out(rows))


def choose_examples(evaluation: Evaluation) -> list[tuple[str, Record]]:
    """Returns the best, the median and the worst example of each hole bin.

    By the PSNR of the first method, or where it always failed, of the next.

    Returns:
      Pairs of 'best', 'median' or 'worst' and the record.
    """
    chosen = []
    for hole_bin in range(len(masks.HOLE_BINS)):
        for method in evaluation.methods:
            examples = evaluation.select(method=method, hole_bin=hole_bin)
            if examples:
                break
        else:
            continue
        ranked = sorted(examples, key=lambda e: -(e["psnr"] or math.inf))
        places = {0: "best", len(ranked) - 1: "worst", len(ranked) // 2: "median"}
        chosen += [(places[place], ranked[place]) for place in sorted(places)]
    return chosen


def fill_examples(
    methods: Sequence[Method],
    protocol: EvalSet,
    examples: Sequence[Record],
    *,
    failures: Sequence[Record] = (),
) -> list[dict[str, np.ndarray | None]]:
    """Fills some examples again, to look at.

    Args:
      methods: what with.
      protocol: which `examples` are of.
      examples: their records.
      failures: what need not be tried again.

    Returns:
      For each of them ``input`` (its hole white), what each method makes of it (None
      where it fails) and ``truth``, uint8 ``[H, W, 3]``.
    """
    failed = {(f["method"], key_of(f)) for f in failures}
    wanted: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        wanted.setdefault(example["index"], []).append(number)
    shown: list[dict[str, np.ndarray | None]] = [{} for _ in examples]
    for index, images in protocol.batches(_BATCH) if wanted else ():
        for i, image in zip(index.tolist(), images):
            for number in wanted.get(i, ()):
                example = examples[number]
                place = np.array([i]), example["hole_bin"], example["border"]
                mask = protocol.masks(*place)
                columns = {"input": np.where(mask[0] == 0, np.uint8(255), image)}
                for method in methods:
                    columns[method.name] = None
                    if (method.name, key_of(example)) in failed:
                        continue
                    filled = method.fill(image[None], mask)
                    comp = np.where(mask == 0, filled.pictures, image)[0]
                    if not filled.errors[0]:
                        columns[method.name] = comp
                shown[number] = columns | {"truth": image}
    return shown


def draw_pictures(
    model: PConvUNet,
    variables: Mapping[str, Any],
    source: ImageSource,
    *,
    image_size: int,
    count: int = 6,
    seed: int = 0,
) -> np.ndarray:
    """Returns examples to look at: hole, output, composite and truth side by side.

    They are the first of `evaluate`, of one hole bin after the other, by turns without
    and with holes at the border.

    Args:
      model: the network.
      variables: its ``params`` and ``batch_stats``.
      source: the pictures.
      image_size: side of the squares, in pixels.
      count: how many examples.
      seed: of the masks.

    Returns:
      uint8 ``[H, W, 3]``.
    """
    (batch,) = pipeline.eval_batches(
        source, batch_size=count, image_size=image_size, num_examples=count
    )
    index, truth = batch["index"], batch["image"]
    hole_bin = index % len(masks.HOLE_BINS)
    without, with_ = (
        draw_masks(index, hole_bin, border, image_size, seed=seed)
        for border in (False, True)
    )
    mask = np.where(index[:, None, None, None] % 2, with_, without)
    step = methods_lib.compile_fill_step(model)
    output = step(variables, {"image": truth, "mask": mask})["output"]
    columns = {
        "input": np.where(mask == 0, np.uint8(255), truth),
        "output": output,
        "composite": np.where(mask == 0, output, truth),
        "truth": truth,
    }
    columns = {name: x / np.float32(127.5) - 1 for name, x in columns.items()}
    return picture_grid(columns, max_rows=count)


def network_name(model: PConvUNet) -> str:
    """Returns what a network is called in tables, 'pconv' or 'conv'."""
    return "pconv" if model.conv == "partial" else "conv"


def _lay_out(rows: Sequence[Mapping[str, np.ndarray | None]]) -> np.ndarray:
    """Lays pictures of examples out in a grid, not too large; what failed is white."""
    blank = np.full_like(rows[0]["truth"], 255)
    columns = {
        name: [report.shrink(blank if row[name] is None else row[name]) for row in rows]
        for name in rows[0]
    }
    columns = {n: np.stack(x) / np.float32(127.5) - 1 for n, x in columns.items()}
    return picture_grid(columns, max_rows=None)


def _check_size(method: Method, image_size: int) -> None:
    if not method.is_network:
        return
    multiple = method.model.size_multiple
    if image_size % multiple:
        sizes = suggest_sizes(image_size, multiple)
        raise ValueError(
            f"image_size = {image_size} does not suit the network {method.name}, which "
            f"takes multiples of {multiple}: use {sizes}."
        )


def _evaluate_batch(
    method: Method, images: np.ndarray, mask: np.ndarray, learned: Learned | None
) -> list[dict[str, Any]]:
    """Fills and scores a batch; returns the numbers of each example."""
    processes = parallel.process_count()
    # Filled up with the last example, so that processes have equal shares.
    padded = np.minimum(
        np.arange(len(images) + -len(images) % processes), len(images) - 1
    )
    own = parallel.own_share(padded)
    batch = {"image": images[own], "mask": mask[own]}
    filled = method.fill(batch["image"], batch["mask"])
    scores = _compile_score_step()({}, batch | {"output": filled.pictures})
    if learned:
        comp = np.where(batch["mask"] == 0, filled.pictures, batch["image"])
        scores |= learned.distances(comp, batch["image"]) | learned.features(comp)
    # Processes exchange arrays, not texts.
    texts = np.array([e.encode()[:_ERROR_LENGTH] for e in filled.errors])
    errors = texts.astype(f"S{_ERROR_LENGTH}").view(np.uint8)
    numbers = parallel.gather(
        scores | {"seconds": filled.seconds, "error": errors.reshape(-1, _ERROR_LENGTH)}
    )
    rows = [{k: v[i] for k, v in numbers.items()} for i in range(len(images))]
    for row in rows:
        row["error"] = bytes(row["error"]).rstrip(b"\0").decode(errors="ignore")
    return rows


def _rows(protocol: EvalSet, keys: Sequence[Key]) -> np.ndarray:
    """Returns where the features of examples are kept."""
    places = {c: i * protocol.examples for i, c in enumerate(protocol.classes)}
    return np.array([places[b, border] + i for b, border, i in keys], np.int64)


def _score_sets(
    evaluation: Evaluation, protocol: EvalSet, store: Store, learned: Learned
) -> dict[tuple[str, int | None, bool | None], dict[str, float]]:
    """Returns the metrics of sets of examples, if there are features of them."""
    keys = [(*c, i) for c in protocol.classes for i in range(protocol.examples)]
    if store.get_features(evaluation.methods[0], _rows(protocol, keys[:1])) is None:
        return {}
    truth = [learned.features(images)["features"] for _, images in protocol.batches(4)]
    truth, sets = np.concatenate(truth), {}
    for method in evaluation.methods:
        for _, where in results.groups():
            chosen = evaluation.select(method=method, **where)
            if chosen:
                keys = [key_of(example) for example in chosen]
                features = store.get_features(method, _rows(protocol, keys))
                place = method, where.get("hole_bin"), where.get("border")
                sets[place] = set_metrics(features, truth)
    return sets


@functools.cache
def _compile_score_step():
    return parallel.compile_eval_step(lambda _, batch: score_step(batch))


def _place(
    protocol: EvalSet, hole_bin: int, border: bool, index: int
) -> dict[str, Any]:
    return {
        "hole_bin": hole_bin,
        "border": border,
        "index": index,
        "picture": protocol.picture(index),
    }


def _make_record(
    method: Method, place: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Record:
    record = {"method": method.name, **place}
    seconds = {"seconds": float(numbers["seconds"])}
    if numbers["error"]:
        return record | {"error": numbers["error"]} | seconds
    record["hole_ratio"] = round(float(numbers["hole_ratio"]), 6)
    for name, metric in METRICS.items():
        if name in numbers and (method.is_network or not name.startswith("output_")):
            value = float(numbers[name]) * (100 if metric.unit == "%" else 1)
            record[name] = round(value, 6) if math.isfinite(value) else None
    return record | seconds


def _collect(methods: Sequence[Method], protocol: EvalSet, store: Store) -> Evaluation:
    keys = [(*c, i) for c in protocol.classes for i in range(protocol.examples)]
    examples, failures, seconds = [], [], {}
    for method in methods:
        records = store.get(method.name, keys)
        failed = ["error" in record for record in records]
        seconds[method.name] = [
            record["seconds"] for record, f in zip(records, failed) if not f
        ]
        for record, f in zip(records, failed):
            kept = {name: x for name, x in record.items() if name != "seconds"}
            (failures if f else examples).append(kept)
    return Evaluation(
        examples, failures, seconds, list(protocol.left_out), protocol.seed
    )
