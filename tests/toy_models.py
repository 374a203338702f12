"""Small models on 4 x 4 images whose answers to an attack are known, and what tests of attacks share."""

import math

import torch
from torch import nn

from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import Clusters

SHAPE = (1, 4, 4)
SIZE = math.prod(SHAPE)
NORMS = ("linf", "l2")


class Linear(nn.Module):
    """A linear classifier of 4 x 4 images that notes the size of every batch it sees with gradients on."""

    def __init__(self, classes=3, seed=0, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, SIZE, generator=g, dtype=dtype))
        # the middle of the image space lies on every border
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum(dim=1))
        self.sizes = []

    def forward(self, images):
        if torch.is_grad_enabled():
            self.sizes.append(len(images))
        return images.flatten(1) @ self.weight.T + self.bias


class Odd(nn.Module):
    """Logits [0, v(x)] with v > 0 only for pixels in a window, though the gradient always points up."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, images):
        x = images.mean(dim=(1, 2, 3))
        inside = (x > self.low) & (x < self.high)
        value = x - x.detach() + torch.where(inside, 1.0, -1.0)
        return torch.stack([torch.zeros_like(value), value], dim=1)


class Rotation(nn.Module):
    """An orthogonal map of the pixels, about the middle of the image space: its Lipschitz constant is 1."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("matrix", torch.linalg.qr(torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64))[0])

    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.matrix


class Counted(nn.Module):
    """A model that counts, for itself, the rows through which a gradient flows back."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.backward_rows = 0

    def forward(self, images):
        outputs = self.model(images)
        if torch.is_grad_enabled() and outputs.requires_grad:
            outputs.register_hook(self._count)
        return outputs

    def _count(self, gradient):
        self.backward_rows += int((gradient != 0).any(dim=1).sum())


def some_images(count=8, seed=1, low=0.35, high=0.65, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(count, *SHAPE, generator=g, dtype=torch.float64)).to(dtype)


def labelled(model, images):
    with torch.no_grad():
        return model(images).argmax(dim=1)


def lengths(offsets, norm):
    return offsets.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1)


def cluster_model(seed, per_class, rule="soft", neighbours=None, *, variance=0.05, scale=0.3, classes=3, encoder=None):
    """Classes of clusters near the middle of the image space."""
    g = torch.Generator().manual_seed(seed)
    centroids = scale * torch.randn(classes * per_class, SIZE, generator=g, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(per_class)
    clusters = Clusters(centroids, labels, torch.full((classes * per_class,), variance, dtype=torch.float64))
    return ClusterClassifier(encoder or Rotation(seed), clusters, rule=rule, neighbours=neighbours)


class Centred(nn.Module):
    """The pixels themselves, about the middle of the image space."""

    def forward(self, images):
        return (images - 0.5).flatten(1)
