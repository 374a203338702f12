"""Neural collapse under attack: how tight the classes of an embedding are, and where attacked images go.

After training, embeddings of an ordinary network gather about their class means, and these spread as the vertices of a
simplex (neural collapse). Su et al. 2024 ask what attacks do to that. The definitions are those of their released code;
deviations: cross-entropy is climbed at the model's own temperature, with as many steps as the caller says, and of their
two measures of a leap, an angle and a distance, there is the angle.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Images, pgd_path
from clustr_core.attacks.temperature import rescaled
from clustr_core.measuring.semantics import FeatureNetwork

Embeddings = Float[Tensor, "example dim"]


def class_means(embeddings: Embeddings, labels: Int[Tensor, " example"], classes: int) -> Float[Tensor, "class dim"]:
    """The mean embedding of each class.

    Raises:
        ValueError: if a class has no example.
    """
    counts = torch.bincount(labels, minlength=classes)
    if len(counts) > classes or not counts.all():
        raise ValueError(f"labels: expected examples of each of {classes} classes, got counts {counts.tolist()}")
    sums = embeddings.new_zeros(classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return sums / counts[:, None]


def variability(embeddings: Embeddings, labels: Int[Tensor, " example"], classes: int) -> float:
    """How wide the classes are beside their distances, NC1: the trace of the covariance within classes times the
    pseudo-inverse of that between them. 0 is full collapse.

    Raises:
        ValueError: as `class_means`; if all class means are equal.
    Source: Papyan et al. 2020, as Su et al. 2024 compute it (without dividing by the number of classes).
    """
    points = embeddings.double()
    means = class_means(points, labels, classes)
    within, between = points - means[labels], means - means.mean(dim=0)
    if not between.any():
        raise ValueError("embeddings: expected class means that differ, got equal ones")
    inverse = torch.linalg.pinv(between.T @ between / classes, hermitian=True)
    return float(torch.trace(within.T @ within / len(points) @ inverse))


def angles(first: Float[Tensor, "class dim"], second: Float[Tensor, "class dim"]) -> Float[Tensor, " class"]:
    """Degrees between the class means of two sets, each centred by its own mean."""
    cosines = F.cosine_similarity(first - first.mean(dim=0), second - second.mean(dim=0))
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))


def collapse_table(
    networks: Mapping[str, FeatureNetwork],
    images: Images,
    labels: Int[Tensor, " example"],
    *,
    eps: float,
    step_size: float,
    steps: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Neural collapse of clean and of attacked images: a row each network.

    Attacks are PGD in L-infinity from a random start, which goes on to its last step whatever it has reached: away from
    the label, and towards the class after it (the last class's is the first).

    Returns:
        columns ``method nc1 nc1_attacked nc1_led reached leap stay nearest nearest_attacked``. ``nc1`` is `variability`
        of clean images, of images led away (classes by label), and of images led to a class (classes by that class);
        ``reached`` the share of these that the model gives that class. ``leap`` is the mean angle, in degrees, between
        the clean mean of a class and the mean of the images that were led there, ``stay`` between the clean mean of a
        class and the mean of its own images led away. ``nearest`` is the accuracy of the nearest clean class mean, on
        clean images and on those led away.
    """
    drawn = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
    start = (images + eps * (2 * drawn - 1)).clamp(0, 1)
    attack = partial(pgd_path, images=images, start=start, eps=eps, step_size=step_size, steps=steps)
    return pd.DataFrame(
        [{"method": name, **_collapse(network, images, labels, attack)} for name, network in networks.items()]
    )


def _collapse(
    network: FeatureNetwork, images: Images, labels: Int[Tensor, " example"], attack: Callable[..., Iterator[Images]]
) -> dict[str, float]:
    classes = int(labels.max()) + 1
    targets, cooled = (labels + 1) % classes, rescaled(network.model, images)
    *_, away = attack(partial(_loss, cooled, labels, 1.0))
    *_, led = attack(partial(_loss, cooled, targets, -1.0))
    with torch.no_grad():
        clean, of_away, of_led = (network.encoder(pixels).double() for pixels in (images, away, led))
        reached = network.model(led).argmax(dim=1) == targets
    means = class_means(clean, labels, classes)
    return {
        "nc1": variability(clean, labels, classes),
        "nc1_attacked": variability(of_away, labels, classes),
        "nc1_led": variability(of_led, targets, classes),
        "reached": _share(reached),
        "leap": float(angles(means, class_means(of_led, targets, classes)).mean()),
        "stay": float(angles(means, class_means(of_away, labels, classes)).mean()),
        "nearest": _share(torch.cdist(clean, means).argmin(dim=1) == labels),
        "nearest_attacked": _share(torch.cdist(of_away, means).argmin(dim=1) == labels),
    }


def _loss(model: nn.Module, towards: Tensor, sign: float, pixels: Images) -> Float[Tensor, " batch"]:
    return sign * F.cross_entropy(model(pixels), towards, reduction="none")


def _share(which: Tensor) -> float:
    return float(which.double().mean())
