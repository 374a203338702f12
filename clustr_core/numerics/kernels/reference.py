"""What the kernels are held to: each formula in its obvious broadcast form, in float64 whatever comes.

Nothing here is fast or small: a table of every example, cluster and class is made, and gradients are autograd's. Tests
and benchmarks run it, and `cluster_logits` gives a kernel its second derivatives.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cluster_logits(
    embeddings: Float[Tensor, "batch dim"],
    centroids: Float[Tensor, "cluster dim"],
    labels: Int[Tensor, " cluster"],
    variance: Float[Tensor, " cluster"],
    num_classes: int,
    neighbours: int | None = None,
) -> Float[Tensor, "batch class"]:
    """g_c(z) = logsumexp over the (voting) clusters j of class c of -d_j^2 / (2 sigma_j^2)."""
    distances = (embeddings.double()[:, None] - centroids.double()).square().sum(dim=2)
    exponents = -distances / (2 * variance.double())
    member = labels == torch.arange(num_classes, device=labels.device)[:, None]
    own = exponents[:, None].masked_fill(~member, -torch.inf)
    if neighbours is None:
        return own.logsumexp(dim=2)
    votes = torch.zeros_like(exponents, dtype=torch.bool)
    votes.scatter_(1, distances.topk(neighbours, dim=1, largest=False).indices, True)
    logits = own.masked_fill(~votes[:, None], -torch.inf).logsumexp(dim=2)
    has_vote = (votes[:, None] & member).any(dim=2)
    # a class without a vote: below every class with one, by 1, as a function of its nearest cluster
    lowest = logits.masked_fill(~has_vote, torch.inf).amin(dim=1, keepdim=True).detach()
    return torch.where(has_vote, logits, torch.minimum(own.amax(dim=2), lowest) - 1)


def pairwise_radius(
    embeddings: Float[Tensor, "batch dim"],
    centroids: Float[Tensor, "cluster dim"],
    labels: Int[Tensor, " cluster"],
    predicted: Int[Tensor, " batch"],
    between: Float[Tensor, "cluster cluster"],
    relative: float,
    correction: Float[Tensor, " cluster"] | float,
) -> Float[Tensor, " batch"]:
    """min over rivals j of max over own i of ((d_j^2 - d_i^2) / 2 - relative (s_j + s_i) - correction_j) / between_ij.

    s_j = (||z|| + ||mu_j||)^2, both from the centroids' mean. An own cluster on top of a rival (to float32) is skipped.
    """
    info = torch.finfo(torch.float32)
    centroids = centroids.double()
    points, targets = embeddings.double() - centroids.mean(dim=0), centroids - centroids.mean(dim=0)
    q = targets.square().sum(dim=1) / 2 - points @ targets.T
    s = (points.norm(dim=1)[:, None] + targets.norm(dim=1)).square()
    gaps = (q - relative * s - correction)[:, :, None] - (q + relative * s)[:, None]
    own = labels == predicted[:, None]
    usable = own[:, None] & (between.square() > info.tiny / info.eps)
    radii = (gaps / between.double()).masked_fill(~usable, -torch.inf).amax(dim=2)
    return radii.masked_fill(own, torch.inf).amin(dim=1).clamp_min(0)


def lloyd(
    points: Float[Tensor, "point dim"],
    labels: Int[Tensor, " point"],
    centroids: Float[Tensor, "class k dim"],
    max_iter: int,
) -> tuple[Float[Tensor, "class k dim"], Int[Tensor, " point"], Float[Tensor, " class"]]:
    """Lloyd's iterations of each class by itself: centroids, the slot of each point, the inertia of each class.

    An empty cluster moves to the point of its class that is farthest from its centroid, no point taken twice.
    """
    points, centroids = points.double(), centroids.double().clone()
    slots = torch.empty_like(labels)
    inertia = centroids.new_empty(len(centroids))
    for label, means in enumerate(centroids):
        members = (labels == label).nonzero().squeeze(1)
        own = points[members]
        table = (own[:, None] - means).square().sum(dim=2)
        for _ in range(max_iter):
            nearest, farthest = table.argmin(dim=1), iter(table.amin(dim=1).argsort(descending=True, stable=True))
            for slot in range(len(means)):
                mine = nearest == slot
                means[slot] = own[mine].mean(dim=0) if mine.any() else own[next(farthest)]
            table = (own[:, None] - means).square().sum(dim=2)
            if torch.equal(table.argmin(dim=1), nearest):
                break
        slots[members] = table.argmin(dim=1)
        inertia[label] = table.amin(dim=1).sum()
    return centroids, slots, inertia
