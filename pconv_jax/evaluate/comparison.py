"""Compares methods on the same images and masks, and resumes after a kill."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pconv_jax import __version__, _files
from pconv_jax._errors import UserError
from pconv_jax.evaluate import results
from pconv_jax.evaluate.eval_set import EvalSet, MaskClass
from pconv_jax.evaluate.learned import LearnedMetrics, set_metrics
from pconv_jax.evaluate.methods import Method, Network
from pconv_jax.evaluate.metric_definitions import METRICS
from pconv_jax.evaluate.results import Evaluation
from pconv_jax.evaluate.store import Key, Record, Store, key_of
from pconv_jax.runs import parallel
from pconv_jax.runs.inference import score_step
from pconv_jax.unet import suggest_sizes

_BATCH = 4  # Least number of images that are read at a time.
_ERROR_LENGTH = 200


def compare(
    methods: Sequence[Method],
    eval_set: EvalSet,
    *,
    learned: LearnedMetrics | None = None,
    directory: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate methods on the same pairs of images and masks.

    If there are several processes, each of them must call this, and all of them get the
    result; they cannot keep records.

    Args:
      methods: The methods. Differences are taken from the first one.
      eval_set: The pairs.
      learned: The networks of learned metrics. None (the default) leaves these out.
      directory: Directory for records, from which the same call resumes after an
        interruption. None (the default) keeps no records.
      progress: Whether to show a progress bar (the default).

    Raises:
      UserError: If a network does not accept the image size, too many images cannot be
        read, several processes are to keep records, or another evaluation is using the
        directory.
      RunError: If the records cannot be written.
    """
    if directory and parallel.process_count() > 1:
        raise UserError("directory must be None if there are several processes.")
    for method in methods:
        _check_size(method, eval_set.image_size)
    store = Store(_files.as_path(directory) if directory else None)
    with store.locked():
        for method in methods:
            # Reading all images for a fingerprint takes long, and only files need it.
            about = _fingerprint(method, eval_set, learned) if directory else ""
            store.open(method.name, about)
        _evaluate_all(methods, eval_set, store, learned, progress=progress)
        evaluation = _collect(methods, eval_set, store)
        if learned:
            evaluation.left_out.extend(learned.left_out)
            evaluation.sets.update(_score_sets(evaluation, eval_set, store, learned))
    return evaluation


def _check_size(method: Method, image_size: int) -> None:
    if method.model is None:
        return
    multiple = method.model.size_multiple
    if image_size % multiple:
        sizes = suggest_sizes(image_size, multiple)
        raise UserError(
            f"image_size = {image_size} does not suit the network {method.name}, which "
            f"accepts multiples of {multiple}: use {sizes}."
        )


def _fingerprint(
    method: Method, eval_set: EvalSet, learned: LearnedMetrics | None
) -> str:
    """Describe everything that the records of a method depend on, as text."""
    precision = jax.config.jax_default_matmul_precision
    about = [__version__, jax.__version__, jax.default_backend(), str(precision)]
    about += [eval_set.fingerprint, method.fingerprint]
    about += [learned and learned.fingerprint]
    about += [metric.definition for metric in METRICS.values()]
    return json.dumps(about)


def _evaluate_all(
    methods: Sequence[Method],
    eval_set: EvalSet,
    store: Store,
    learned: LearnedMetrics | None,
    *,
    progress: bool,
) -> None:
    """Evaluate all examples that the store does not have yet."""
    size = _batch_size(methods, learned)
    total = len(methods) * len(eval_set.classes) * eval_set.examples
    # None hides the bar if standard error is not a terminal.
    disable = None if progress else True
    with tqdm(total=total, desc="evaluate", leave=False, disable=disable) as bar:
        for index, images in eval_set.batches(size):
            for mask_class in eval_set.classes:
                hole, border = mask_class
                keys = [(hole, border, int(i)) for i in index]
                todo = [m for m in methods if not store.has(m.name, keys)]
                bar.update(len(index) * (len(methods) - len(todo)))
                if not todo:
                    continue
                mask = eval_set.masks(index, *mask_class)
                for method in todo:
                    bar.set_postfix_str(method.name)
                    numbers = _evaluate_batch(method, images, mask, learned)
                    _add_batch(store, method, eval_set, keys, numbers)
                    bar.update(len(index))


def _batch_size(methods: Sequence[Method], learned: LearnedMetrics | None) -> int:
    """Choose how many images are read at a time: as many as devices compute."""
    parts = [method.device_batch for method in methods if isinstance(method, Network)]
    parts += [learned.device_batch] if learned else []
    devices = parallel.device_count()
    return max(-(-_BATCH // devices), *parts, 1) * devices


def _evaluate_batch(
    method: Method, images: np.ndarray, mask: np.ndarray, learned: LearnedMetrics | None
) -> list[dict[str, Any]]:
    """Fill and score a batch; return the numbers of each example."""
    processes = parallel.process_count()
    # The last example is repeated, so that processes have equal shares.
    padded = np.minimum(
        np.arange(len(images) + -len(images) % processes), len(images) - 1
    )
    own = parallel.own_share(padded)
    batch = {"image": images[own], "mask": mask[own]}
    filled = method.fill(batch["image"], batch["mask"])
    scores = _compile_score_step()({}, batch | {"output": filled.images})
    if learned:
        comp = np.where(batch["mask"] == 0, filled.images, batch["image"])
        scores |= learned.distances(comp, batch["image"]) | learned.features(comp)
    # Processes can exchange arrays, but not strings.
    texts = np.array([e.encode()[:_ERROR_LENGTH] for e in filled.errors])
    errors = texts.astype(f"S{_ERROR_LENGTH}").view(np.uint8)
    numbers = parallel.gather(
        scores | {"seconds": filled.seconds, "error": errors.reshape(-1, _ERROR_LENGTH)}
    )
    rows = [{k: v[i] for k, v in numbers.items()} for i in range(len(images))]
    for row in rows:
        row["error"] = bytes(row["error"]).rstrip(b"\0").decode(errors="ignore")
    return rows


def _add_batch(
    store: Store,
    method: Method,
    eval_set: EvalSet,
    keys: Sequence[Key],
    numbers: Sequence[dict[str, Any]],
) -> None:
    """Add the numbers of `_evaluate_batch` to the store."""
    if "features" in numbers[0]:
        store.add_features(
            method.name,
            _rows(eval_set, keys),
            np.stack([row["features"] for row in numbers]),
            capacity=len(eval_set.classes) * eval_set.examples,
        )
    records = (_make_record(method, eval_set, *pair) for pair in zip(keys, numbers))
    store.add(method.name, records)


def _make_record(
    method: Method, eval_set: EvalSet, key: Key, numbers: Mapping[str, Any]
) -> Record:
    hole, border, index = key
    record = {
        "method": method.name,
        "hole": hole,
        "border": border,
        "index": index,
        "picture": eval_set.image_index(index),
    }
    seconds = {"seconds": float(numbers["seconds"])}
    if numbers["error"]:
        return record | {"error": numbers["error"]} | seconds
    record["hole_ratio"] = round(float(numbers["hole_ratio"]), 6)
    for name, metric in METRICS.items():
        if name.startswith("output_") and method.model is None:
            continue
        if name in numbers:
            value = float(numbers[name]) * (100 if metric.unit == "%" else 1)
            record[name] = round(value, 6) if math.isfinite(value) else None
    return record | seconds


def _rows(eval_set: EvalSet, keys: Sequence[Key]) -> np.ndarray:
    """Number the rows in which the features of examples are kept."""
    places = {c: i * eval_set.examples for i, c in enumerate(eval_set.classes)}
    rows = [places[MaskClass(hole, border)] + i for hole, border, i in keys]
    return np.array(rows, np.int64)


def _all_keys(eval_set: EvalSet) -> list[Key]:
    numbers = range(eval_set.examples)
    return [(hole, border, i) for hole, border in eval_set.classes for i in numbers]


def _collect(methods: Sequence[Method], eval_set: EvalSet, store: Store) -> Evaluation:
    """Collect the records of all examples, in order."""
    keys = _all_keys(eval_set)
    examples, failures, seconds = [], [], {}
    for method in methods:
        records = store.get(method.name, keys)
        succeeded = ["error" not in record for record in records]
        seconds[method.name] = [
            record["seconds"] for record, ok in zip(records, succeeded) if ok
        ]
        for record, ok in zip(records, succeeded):
            kept = {name: x for name, x in record.items() if name != "seconds"}
            (examples if ok else failures).append(kept)
    return Evaluation(
        examples, failures, seconds, list(eval_set.left_out), eval_set.seed
    )


def _score_sets(
    evaluation: Evaluation, eval_set: EvalSet, store: Store, learned: LearnedMetrics
) -> dict[tuple[str, str | None, bool | None], dict[str, float]]:
    """Compute the metrics of sets of examples; {} if there are no features."""
    first = _rows(eval_set, _all_keys(eval_set)[:1])
    if store.get_features(evaluation.methods[0], first) is None:
        return {}
    batches = eval_set.batches(_BATCH)
    truth = np.concatenate([learned.features(x)["features"] for _, x in batches])
    sets = {}
    for method in evaluation.methods:
        for _, where in results.groups():
            chosen = evaluation.select(method=method, **where)
            keys = [key_of(example) for example in chosen]
            features = store.get_features(method, _rows(eval_set, keys))
            if chosen and features is not None:
                place = method, where.get("hole"), where.get("border")
                sets[place] = set_metrics(features, truth)
    return sets


@functools.cache
def _compile_score_step() -> parallel.EvalStep:
    return parallel.compile_eval_step(lambda _, batch: score_step(batch))
