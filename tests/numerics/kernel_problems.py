"""Problems for the kernels, and how far from the float64 references each dtype may be."""

import torch

from clustr_core.numerics.kernels import kmeans, reference, tiles

# n, dim, labels of the clusters: none a multiple of a tile
SHAPES = {
    "one-row": (1, 3, [0, 1, 1, 2]),
    "one-cluster-each": (70, 5, [0, 1, 2, 3]),
    "unequal-unsorted": (65, 37, [2, 0, 0, 3, 1, 0, 2, 0, 0, 4]),
    "two-tiles-of-classes": (5, 33, [*range(17), 3, 16, 16]),
    "two-tiles-of-clusters": (3, 66, [j % 3 for j in range(67)]),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(n, dim, labels, *, seed=0, dtype=torch.float32, scale=1.0):
    """Embeddings, centroids, labels and unequal variances."""
    g = torch.Generator().manual_seed(seed)
    centroids = scale * torch.randn(len(labels), dim, generator=g)
    near = torch.randint(len(labels), (n,), generator=g)
    embeddings = centroids[near] + scale * torch.randn(n, dim, generator=g)
    variance = scale**2 * dim * (0.5 + torch.rand(len(labels), generator=g))
    return embeddings.to(dtype), centroids.to(dtype), torch.tensor(labels), variance


def logit_error(z, mu, variance, dtype):
    """What float32 may lose of d^2 / (2 sigma^2), and the inputs' dtype of the logit, for each row."""
    origin = 0 if dtype in tiles.HALF_DTYPES else mu.double().mean(dim=0)
    reach = (z.double() - origin).norm(dim=1) + (mu.double() - origin).norm(dim=1).max()
    d2 = torch.cdist(z.double(), mu.double()).square()
    units = (z.shape[1] + 8) * torch.finfo(torch.float32).eps * reach.square() + torch.finfo(dtype).eps * d2.amax(1)
    return (units / variance.double().min())[:, None]


def assert_logits(found, wanted, z, mu, variance):
    # a class without a vote is placed up to 4 eps below where the reference has it
    slack = 8 * torch.finfo(found.dtype).eps * wanted.abs().amax(dim=1, keepdim=True)
    assert ((found.double() - wanted).abs() <= logit_error(z, mu, variance, z.dtype) + slack).all()


def assert_gradients(logits, wanted, leaves):
    """The gradients of a random combination of the logits."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    found, true = torch.autograd.grad(logits, leaves, weight), torch.autograd.grad(wanted, leaves, weight.double())
    eps = torch.finfo(logits.dtype).eps
    for mine, theirs in zip(found, true, strict=True):
        assert mine.dtype == logits.dtype
        size = 64 * eps * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs.to(mine), rtol=8 * eps, atol=size)


def between_of(mu):
    return torch.cdist(mu.double(), mu.double()).float()


def assert_radius(found, z, mu, labels, predicted, relative, correction=0.0):
    """Not above the exact radius, nor below it by more than rounding may have taken; the exact one is returned."""
    exact = reference.pairwise_radius(z, mu, labels, predicted, between_of(mu), 0.0, correction)
    low = reference.pairwise_radius(z, mu, labels, predicted, between_of(mu), 2 * relative, correction)
    # the roundings of the quotient and of the result are the caller's
    last = (relative + torch.finfo(found.dtype).eps) * exact
    assert (found.double() <= exact + last).all()
    assert (found.double() >= low - last).all()
    return exact


def blobs(sizes, k, dim, *, seed=0, offset=0.0, dtype=torch.float32):
    """For each class, k loose blobs, far from the origin if asked; rows shuffled."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = 4 * torch.randn(len(sizes), k, dim, generator=g)
    slots = torch.randint(k, (len(labels),), generator=g)
    z = centres[labels, slots] + torch.randn(len(labels), dim, generator=g) + offset
    return z.to(dtype), labels


def lloyd(z, labels, starts, max_iter):
    """`kmeans.lloyd` of all classes from centroids in the points' own coordinates, as `reference.lloyd` takes them."""
    centroids, slots = starts.float().clone(), torch.empty_like(labels)
    inertia = torch.empty(len(starts), dtype=torch.float64, device=z.device)
    for part in kmeans.grouped(z, labels):
        found, nearest, total = kmeans.lloyd(part, centroids[part.classes] - part.origins, max_iter)
        centroids[part.classes], inertia[part.classes] = found + part.origins, total
        slots[part.rows[part.filled]] = nearest[part.filled]
    return centroids, slots, inertia
