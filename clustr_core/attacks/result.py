"""What every attack shares: the model's verdict on an image, and what an attack returns."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clustr_core.attacks.ball import Images
from clustr_core.numerics.checks import (
    check_are_tensors,
    check_classes,
    check_evaluating,
    check_logits,
    checked_outputs,
)

Model = nn.Module | Callable[[Images], Tensor]
# told at each pass of an attack: (restart, which of the images it was of, what the model returned, without a graph)
Watch = Callable[[int, Int[Tensor, " active"], Float[Tensor, "active class"]], None]


@dataclass(frozen=True)
class AttackResult:
    """What an attack did, example by example.

    Args:
        adversarial: the first misclassified image found; else the last one tried.
        success: whether ``adversarial`` is misclassified; an example misclassified when clean is a success, with
            the clean image.
        clean_correct: whether the clean image was classified correctly.
        gradients: how many input gradients were spent on each example.
        prediction: the class that the attacked model predicts for ``adversarial``, where the attack judged it.
        clean_prediction: the class that the attacked model predicts for the clean image.
    """

    adversarial: Images
    success: Bool[Tensor, " batch"]
    clean_correct: Bool[Tensor, " batch"]
    gradients: Int[Tensor, " batch"]
    prediction: Int[Tensor, " batch"]
    clean_prediction: Int[Tensor, " batch"]

    @classmethod
    def before(cls, images: Images, labels: Int[Tensor, " batch"], prediction: Int[Tensor, " batch"]) -> "AttackResult":
        """Where an attack begins: the clean images, of which the misclassified ones are successes already."""
        correct = prediction == labels
        return cls(images.clone(), ~correct, correct, torch.zeros_like(labels), prediction.clone(), prediction)

    def note(
        self, where: Int[Tensor, " some"], points: Images, predicted: Tensor, broken: Bool[Tensor, " some"]
    ) -> None:
        """Write down, in place, the points that were judged last of some examples, and which of these are broken."""
        self.adversarial[where] = points.detach()
        self.prediction[where] = predicted
        self.success[where] = broken


def not_logits(outputs: Float[Tensor, "batch class"], *, saturation: bool = True) -> str | None:
    """What gives away that a model's outputs are no logits; None if nothing does.

    Probabilities: all in [0, 1], rows summing to one. Scores: all in [0, 1], or none negative and most rows with a
    class at 0 (logits of a network may be positive throughout, but not with their floor at 0). Saturation: for more
    than half of the rows, float cross-entropy at the predicted class is exactly 0, and with it every gradient of it;
    looked for only if asked, since it does no harm to a margin.
    """
    if outputs.numel() < 10:
        return None
    within = bool(((outputs >= 0) & (outputs <= 1)).all())
    if within and ((outputs.sum(dim=1) - 1).abs() < 1e-4).all():
        return "all outputs lie in [0, 1] and each row sums to one: they look like probabilities; take their logarithm"
    if within and outputs.any():
        return "all outputs lie in [0, 1]: they look like scores; take their logarithm"
    if bool((outputs >= 0).all()) and (outputs.amin(dim=1) < 1e-3).float().mean() > 0.5 and outputs.any():
        return "no output is negative and most rows reach down to 0: they look like scores; take their logarithm"
    certain = outputs.softmax(dim=1).amax(dim=1) == 1
    if saturation and certain.float().mean() > 0.5:
        share = 100 * certain.float().mean().item()
        return f"cross-entropy is saturated: softmax rounds to 1 for {share:.0f} % of the images; see attacks.rescaled"
    return None


def warn_unless_logits(outputs: Float[Tensor, "batch class"], name: str = "model", *, saturation: bool = True) -> None:
    """Say how it was noticed, if a model's outputs do not look like logits."""
    if reason := not_logits(outputs, saturation=saturation):
        warnings.warn(f"{name}: expected logits, but {reason}", UserWarning, stacklevel=5)


def logits_of(model: Model, images: Images, name: str = "model") -> Float[Tensor, "batch class"]:
    """A model's logits, of whose values nothing is asked, in float32 at least.

    Raises:
        TypeError: if it returns no tensor.
        ValueError: if there is not one row for each image.
    """
    return checked_outputs(model(images), len(images), name)


def judged_logits(
    model: Model, images: Images, labels: Int[Tensor, " batch"], *, warn: bool = False
) -> Float[Tensor, "batch class"]:
    """Logits without a graph, after checking that they rank the classes, and that labels are classes of the model.

    Raises:
        TypeError: as `logits_of`.
        ValueError: as `logits_of`; if logits are NaN or infinite, or a label is not a class.
    """
    with torch.no_grad():
        logits = logits_of(model, images)
    check_logits(logits)
    if warn:
        warn_unless_logits(logits)
    check_classes(labels, logits.shape[1])
    return logits


def predicted(
    model: Model, images: Images, labels: Int[Tensor, " batch"], *, warn: bool = False
) -> Int[Tensor, " batch"]:
    """The class that a model predicts for each image; checks and errors of `judged_logits`."""
    return judged_logits(model, images, labels, warn=warn).argmax(dim=1)


def misclassified(model: Model, images: Images, labels: Tensor) -> Bool[Tensor, " batch"]:
    """Whether each image is misclassified; checks and errors of `judged_logits`."""
    return predicted(model, images, labels) != labels


def prepared(model: Model, images: Images, labels: Tensor) -> tuple[Images, Int[Tensor, " batch"]]:
    """Copies of checked images and labels that an attack can compute with, once the model is known to be evaluating.

    Images lie in memory row by row, whatever their strides were, so that these change no verdict. Labels are int64, on
    the images' device. Neither is a tensor of inference mode, of which no gradient can be taken.

    Raises:
        TypeError: if images or labels are no tensor; as `check_evaluating`.
        ValueError: as `check_evaluating`.
    """
    check_evaluating(model)
    check_are_tensors(images=images, labels=labels)
    images = images.detach().clone(memory_format=torch.contiguous_format)
    return images, labels.detach().to(images.device, torch.int64, copy=True)
