"""The certificate of a linear head."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clustr_core.attacks.names import Norm
from clustr_core.certificates.lipschitz import check_constants
from clustr_core.numerics.checks import check_finite
from clustr_core.numerics.distances import squared_distances
from clustr_core.numerics.rounding import full_precision, given_and_working_dtype, relative_rounding, rounded_down


def margin_radius(
    embeddings: Float[Tensor, "batch dim"],
    head: nn.Linear,
    *,
    lipschitz: float = 1.0,
    embedding_error: float = 0.0,
) -> Float[Tensor, " batch"]:
    """L2 radius of a linear head on a Lipschitz encoder: min_j (g_c - g_j) / (L ||w_c - w_j||), c the predicted class.

    Lowered, as `certified_radius` is, by bounds on the rounding of the logits and of the embeddings; half precision is
    computed in float32, and rounded down.

    Raises:
        ValueError: for fewer than two classes, an embedding that is not finite, ``lipschitz`` not positive or
            ``embedding_error`` negative.
    Source: Tsuzuku et al. 2018; Leino et al. 2021, definition 2 (a constant for each pair of classes).
    """
    check_constants(lipschitz, embedding_error)
    if head.out_features < 2:
        raise ValueError(f"head: expected at least two classes, got {head.out_features}")
    check_finite(embeddings)
    weight = head.weight.detach()
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    dtype, wide = given_and_working_dtype(embeddings, weight)
    embeddings, weight, bias = embeddings.to(wide), weight.to(wide), bias.to(wide)
    with full_precision(embeddings.device):
        predicted = (embeddings @ weight.T + bias).argmax(dim=1)
        radius = linear_radius(weight, bias, embeddings, predicted)
    size = weight.norm(dim=1).amax() * embeddings.norm(dim=1) + bias.abs().amax()
    shortest = squared_distances(weight, weight).fill_diagonal_(torch.inf).amin().sqrt()
    slack = 4 * relative_rounding(embeddings) * size / shortest
    # two equal rows tell nothing apart
    radii = (radius - slack).double() - 2 * embedding_error
    return rounded_down(radii.nan_to_num(nan=0.0).clamp_min(0) / lipschitz, dtype)


def linear_radius(
    weight: Float[Tensor, "class dim"],
    bias: Float[Tensor, " class"],
    points: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    norm: Norm = "l2",
) -> Float[Tensor, " batch"]:
    """The exact distance of each point to a linear classifier's nearest other class; 0 where it is misclassified.

    min_j (w_y - w_j) . x + b_y - b_j over the dual norm of w_y - w_j: L2 for "l2", L1 for "linf". The space has no
    walls: where pixels end at 0 and 1, the distance can only be larger.
    """
    logits = points @ weight.T + bias
    margins = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight).norm(p=2 if norm == "l2" else 1, dim=2)
    own = torch.nn.functional.one_hot(labels, len(weight)).bool()
    return (margins / lengths.masked_fill(own, 1)).masked_fill(own, torch.inf).amin(dim=1).clamp_min(0)
