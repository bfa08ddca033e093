"""The measured programs in PyTorch; see `benchmarks.jax_programs`.

On a GPU, float32 means TF32, which is also the default of JAX.
"""

import contextlib
import io
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import inputs, torch_network
from benchmarks.worker import Program

_CUDA = torch.cuda.is_available()
_DEVICE = "cuda" if _CUDA else "cpu"


def describe() -> dict[str, Any]:
    """Describe the versions and the device that the programs run on."""
    device = torch.cuda.get_device_name() if _CUDA else "cpu"
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    versions["python (torch)"] = platform.python_version()
    return {"versions": versions, "platform": _DEVICE, "device": device}


def peak_device_memory() -> int | None:
    """Get the peak bytes in use on the device so far; None on CPUs."""
    return torch.cuda.max_memory_allocated() if _CUDA else None


def build(program: str, **settings: Any) -> Program:
    """Build a program, and compile it if its mode says so."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return _PROGRAMS[program](**settings)


def _matmul(n, dtype):
    x = _tensor(inputs.normal(n, n)).to(getattr(torch, dtype))

    def call():
        x @ x
        _wait()

    return Program(torch.inference_mode()(call))


def _layer(conv, size, batch, channels, features, backward, dtype):
    def to_device(x):
        x = x.to(dtype=getattr(torch, dtype))
        return x.contiguous(memory_format=torch.channels_last)

    x = to_device(_nchw(inputs.normal(batch, size, size, channels)))
    mask = _nchw(inputs.mask(batch, size)).expand_as(x).contiguous()
    mask = to_device(mask)
    kind = torch_network.PartialConv2d if conv == "dense" else torch.nn.Conv2d
    module = kind(channels, features, 3, padding=1)
    module = module.to(
        _DEVICE, getattr(torch, dtype), memory_format=torch.channels_last
    )
    args = (x, mask) if conv == "dense" else (x,)
    cotangent = to_device(_nchw(inputs.normal(batch, size, size, features)))

    def forward():
        y = module(*args)
        return y[0] if conv == "dense" else y

    def call():
        if backward:
            module.zero_grad()
            x.grad = None
            forward().backward(cotangent)
        else:
            with torch.inference_mode():
                forward()
        _wait()

    x.requires_grad_(backward)
    return Program(call)


def _inference(size, batch, mode, dtype, depth=8, width=64):
    network = torch_network.PConvUNet(depth, width).to(_DEVICE).eval()
    images, mask = _nchw(inputs.images(batch, size)), _nchw(inputs.mask(batch, size))
    if mode == "onnxruntime":
        return _onnxruntime(network, images, mask)
    network, (images, mask), run = _in_mode(mode, network, images, mask)

    def call():
        with torch.inference_mode(), run():
            network(images, mask)
        _wait()

    return _warm(call, mode)


def _train(size, batch, depth, width, mode, dtype):
    network = torch_network.PConvUNet(depth, width).to(_DEVICE)
    vgg = torch_network.VGG16().to(_DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    images, mask = _nchw(inputs.images(batch, size)), _nchw(inputs.mask(batch, size))
    if mode != "eager":
        vgg = vgg.to(memory_format=torch.channels_last)
    network, (images, mask), run = _in_mode(mode, network, images, mask)
    loss_fn = torch_network.inpainting_loss
    if "compile" in mode:
        loss_fn = torch.compile(loss_fn)

    def call():
        optimizer.zero_grad()
        with run():
            loss = loss_fn(vgg, network(images, mask), images, mask)
        loss.backward()
        optimizer.step()
        _wait()

    return _warm(call, mode)


def _in_mode(mode, network, *tensors):
    """Prepare the network, its inputs and the context of a mode."""
    run = contextlib.nullcontext
    if mode != "eager":
        network = network.to(memory_format=torch.channels_last)
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    if "compile" in mode:
        network = torch.compile(network)
    if "autocast" in mode:

        def run():
            return torch.autocast(_DEVICE, dtype=torch.bfloat16)

    return network, tensors, run


def _onnxruntime(network, images, mask):
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(
        network, (images, mask), file, input_names=["images", "mask"], dynamo=False
    )
    providers = ["CUDAExecutionProvider"] if _CUDA else ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers)
    feeds = {"images": images.cpu().numpy(), "mask": mask.cpu().numpy()}
    return Program(lambda: session.run(None, feeds))


def _warm(call: Callable[[], None], mode: str) -> Program:
    """Compile by calling once; the time of that call's work is negligible."""
    if "compile" not in mode:
        return Program(call)
    start = time.perf_counter()
    call()
    return Program(call, time.perf_counter() - start)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(_DEVICE)


def _nchw(array: np.ndarray) -> torch.Tensor:
    return _tensor(array).permute(0, 3, 1, 2).contiguous()


def _wait() -> None:
    if _CUDA:
        torch.cuda.synchronize()


_PROGRAMS = {
    "inference": _inference,
    "layer": _layer,
    "matmul": _matmul,
    "train": _train,
}
