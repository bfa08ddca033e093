"""The paper's network, loss and training step in straightforward PyTorch.

It follows the published implementations: NVIDIA-style partial convolutions, whose masks
are as wide as the features and are convolved with a kernel of ones; concatenation in
the decoder; three passes through VGG16. It is the reference of the benchmarks. It has
the same parameters as `pconv_jax`, and computes the same numbers.
"""

import torch
from torch import nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)


class PartialConv2d(nn.Conv2d):
    """Partial convolution with masks [N, C, H, W]."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("ones", torch.ones_like(self.weight), persistent=False)

    def forward(self, x, mask):
        """Compute the outputs, and a mask as wide as they are."""
        with torch.no_grad():
            valid = F.conv2d(mask, self.ones, None, self.stride, self.padding)
            new_mask = (valid > 0).to(mask.dtype)
            total = self.ones[0].numel()
            ratio = total / valid.clamp(min=1) * new_mask
        x = F.conv2d(x * mask, self.weight, None, self.stride, self.padding) * ratio
        if self.bias is not None:
            x = (x + self.bias.view(1, -1, 1, 1)) * new_mask
        return x, new_mask


class PConvUNet(nn.Module):
    """The UNet of the paper; 8 levels for 512 pixels, 7 for 256."""

    def __init__(self, depth=8, width=64):
        super().__init__()
        features = [width * 2 ** min(level, 3) for level in range(depth)]
        kernels = [7, 5, 5] + [3] * depth
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = [3, *features]
        for level, (f, k) in enumerate(zip(features, kernels)):
            norm = level > 0
            conv = PartialConv2d(channels[level], f, k, 2, k // 2, bias=not norm)
            layers = [conv, nn.BatchNorm2d(f) if norm else nn.Identity(), nn.ReLU()]
            self.encoder.append(nn.ModuleList(layers))
        for level in reversed(range(depth)):
            last = level == 0
            f = channels[level]
            conv = PartialConv2d(channels[level + 1] + f, f, 3, 1, 1, bias=last)
            layers = [nn.Identity()] if last else [nn.BatchNorm2d(f), nn.LeakyReLU(0.2)]
            self.decoder.append(nn.ModuleList([conv, *layers]))

    def forward(self, images, mask):
        """Fill the holes of images [N, 3, H, W]; mask: 1 = valid."""
        h, m = images, mask.expand_as(images).contiguous()
        skips = []
        for conv, *layers in self.encoder:
            skips.append((h, m))
            h, m = conv(h, m)
            for layer in layers:
                h = layer(h)
        for conv, *layers in self.decoder:
            skip, skip_mask = skips.pop()
            h = torch.cat([F.interpolate(h, scale_factor=2), skip], dim=1)
            m = torch.cat([F.interpolate(m, scale_factor=2), skip_mask], dim=1)
            h, m = conv(h, m)
            for layer in layers:
                h = layer(h)
        return h


class VGG16(nn.Module):
    """VGG16 up to pool3."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()
        for channels in ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256)):
            layers = []
            for a, b in zip(channels, channels[1:]):
                layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)]
            self.blocks.append(nn.Sequential(*layers, nn.MaxPool2d(2)))
        mean, std = (
            torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.requires_grad_(False)

    def forward(self, images):
        """Compute pool1, pool2 and pool3 of images in [-1, 1]."""
        x = ((images + 1) / 2 - self.mean) / self.std
        pools = []
        for block in self.blocks:
            x = block(x)
            pools.append(x)
        return pools


def inpainting_loss(vgg, output, target, mask):
    """Compute the total loss of the paper, the mean over the batch."""
    comp = torch.where(mask > 0.5, target, output)
    error = (output - target).abs()
    total = (mask * error).mean() + 6 * ((1 - mask) * error).mean()
    out_features, comp_features = vgg(output), vgg(comp)
    with torch.no_grad():
        gt_features = vgg(target)
    for out, com, gt in zip(out_features, comp_features, gt_features):
        total = total + 0.05 * ((out - gt).abs().mean() + (com - gt).abs().mean())
        gram_gt = _gram(gt)
        style = (_gram(out) - gram_gt).abs().mean() + (
            _gram(com) - gram_gt
        ).abs().mean()
        total = total + 120 * style
    region = F.max_pool2d(1 - mask, 3, 1, 1)
    across = (comp[:, :, :, 1:] - comp[:, :, :, :-1]).abs()
    down = (comp[:, :, 1:] - comp[:, :, :-1]).abs()
    tv = (across * region[:, :, :, 1:] * region[:, :, :, :-1]).sum()
    tv = tv + (down * region[:, :, 1:] * region[:, :, :-1]).sum()
    return total + 0.1 * tv / comp.numel()


def _gram(x):
    x = x.float().flatten(2)
    return x @ x.transpose(1, 2) / (x.shape[1] * x.shape[2])
