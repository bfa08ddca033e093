"""Make testdata/learned_metrics.npz: outputs of the lpips and pytorch-fid projects.

Run it by hand, ``python -m tests.helpers.learned_golden``, with torch, torchvision,
lpips==0.1.4 and pytorch-fid==0.3.0 installed. A test runs it too if they are installed.
All weights are from `reference.recipe_weights`, so nothing is downloaded.
"""

import json
import warnings
from unittest import mock

import numpy as np

from tests.helpers import TESTDATA, reference

PATH = TESTDATA / "learned_metrics.npz"
SEEDS = {"alex": 1, "vgg": 2, "inception": 3}
LPIPS_SHAPE = (2, 67, 78, 3)
# One is enlarged, the other reduced.
INCEPTION_SHAPES = ((2, 50, 67, 3), (1, 310, 340, 3))


def make_images(shape, seed):
    """Make images in [0, 1] of blots, each image with a color of its own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, shape)
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 3
    x += rng.random((shape[0], 1, 1, 3))
    return x.clip(0, 1).astype(np.float32)


def pairs():
    a = make_images(LPIPS_SHAPE, 0)
    b = (0.7 * a + 0.3 * make_images(LPIPS_SHAPE, 1)).astype(np.float32)
    b[0, 20:40, 30:60] = 0.5
    return a, b


def recipe(name, shapes):
    """Draw the weights of a network, by their names in its file."""
    weights = reference.recipe_weights(SEEDS[name], shapes)
    for key, array in weights.items():
        if key.startswith("lin"):  # Trained heads are nonnegative.
            weights[key] = np.abs(array)
        elif key.endswith("bn.weight"):  # Otherwise little is left of the image.
            weights[key] = 1.5 * array
        elif key == "fc.weight":
            weights[key] = (array - 1) / 5
    return weights


def lpips_model(net):
    """Make the model of the lpips project, and list its weights in its files."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision renamed an argument.
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    model.eval().double()
    # Slices keep the indices of torchvision's layers. Heads are stored once.
    files = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("net."):
            files[name] = "features." + name.split(".", 2)[2], tensor.shape
        elif name.startswith("lin") and not name.startswith("lins."):
            files[name] = name, tensor.shape
    return model, files


def load(model, weights):
    import torch

    state = {name: torch.from_numpy(w).double() for name, w in weights.items()}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return set(missing.missing_keys)


def read_torch(path):
    import torch

    return {k: t.numpy() for k, t in torch.load(path, map_location="cpu").items()}


def to_torch(images):
    import torch

    return torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2))


def lpips_golden(net):
    """Compute the distances at each depth, [5, N]; also return the weights' shapes."""
    import torch

    model, files = lpips_model(net)
    shapes = [(name, list(shape)) for name, shape in files.values()]
    weights = recipe(net, shapes)
    state = {own: weights[name] for own, (name, _) in files.items()}
    state |= {f"lins.{k[3]}{k[4:]}": w for k, w in state.items() if k[:3] == "lin"}
    assert not load(model, state) - {"scaling_layer.shift", "scaling_layer.scale"}
    with torch.no_grad():
        _, depths = model(*map(to_torch, pairs()), retPerLayer=True, normalize=True)
    return np.stack([depth.numpy()[:, 0, 0, 0] for depth in depths]), shapes


def inception_golden():
    """Compute features and logits of all images; also return the weights' shapes."""
    import torch
    from pytorch_fid import inception
    from torchvision.models import Inception3

    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(Inception3, "load_state_dict"),
    ):
        network = inception.fid_inception_v3().double()
    state = network.state_dict()
    shapes = [(n, list(t.shape)) for n, t in state.items() if "num_batches" not in n]
    missing = load(network, recipe("inception", shapes))
    assert all(name.endswith("num_batches_tracked") for name in missing)
    with mock.patch.object(inception, "fid_inception_v3", lambda: network):
        model = inception.InceptionV3([3]).eval()
    features, logits = [], []
    with torch.no_grad():
        for seed, shape in enumerate(INCEPTION_SHAPES):
            x = model(to_torch(make_images(shape, seed)))[0][:, :, 0, 0]
            features.append(x.numpy())
            logits.append((network.fc(x) - network.fc.bias).numpy())
    return np.concatenate(features), np.concatenate(logits), shapes


def main():
    arrays = {}
    for net in ("alex", "vgg"):
        arrays[f"{net}/depths"], shapes = lpips_golden(net)
        arrays[f"{net}/shapes"] = json.dumps(shapes)
    features, logits, shapes = inception_golden()
    arrays["inception/features"] = features.astype(np.float32)
    arrays["inception/logits"] = logits.astype(np.float32)
    arrays["inception/shapes"] = json.dumps(shapes)
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
