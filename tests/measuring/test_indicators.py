"""The published tests of an attack, against answers known by hand."""

import pytest
import torch
from torch import Tensor, nn

from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.paper import paper_pgd
from clustr_core.attacks.temperature import rescaled
from clustr_core.measuring import indicators
from clustr_core.measuring.evaluation import Evaluation, Path
from clustr_core.models.classifiers import LinearClassifier
from clustr_core.theory.toys import TOY_EPS, cluster_toy

EPS = 0.1


class Slope(nn.Module):
    """Two classes: the second once the mean of the pixels exceeds a border, with logits that are linear in it."""

    def __init__(self, border: float = 0.55) -> None:
        super().__init__()
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        height = x.flatten(1).mean(dim=1) - self.border
        return torch.stack([-height, height], dim=1)


class Behind(nn.Module):
    """A model behind a function of its images, or in front of one of its outputs."""

    def __init__(self, model: nn.Module, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


def evaluation(surface: nn.Module, model: nn.Module | None = None, count: int = 6, **options) -> Evaluation:
    images = torch.full((count, 1, 4, 4), 0.5)
    model = surface if model is None else model
    options = {"steps": 10, "restarts": 1, "step_size": 0.02, "rule": pgd} | options
    return Evaluation(surface, model, images, torch.zeros(count, dtype=torch.int64), EPS, **options)


# --- 1: unavailable gradients


def test_no_gradient_is_unavailable_whether_it_is_zero_or_not_there():
    assert indicators.unavailable_gradients(evaluation(Slope())).value == 0
    flat = Behind(Slope(), lambda x: x.round())
    assert indicators.unavailable_gradients(evaluation(flat)).value == 1
    cut = Behind(Slope(), lambda x: x.detach())
    found = indicators.unavailable_gradients(evaluation(cut))
    assert (found.value, found.flagged) == (1, True)


# --- 2: unstable predictions


def test_a_loss_that_noise_changes_is_unstable():
    # cross-entropy of the constant log 2, of which noise changes nothing
    constant = Behind(Slope(), after=lambda z: 0 * z)
    assert indicators.unstable_predictions(evaluation(constant)).value == 0
    steep = Behind(Slope(0.5), after=lambda z: 1e5 * z)
    found = indicators.unstable_predictions(evaluation(steep))
    assert found.flagged
    assert found.value <= 1


def test_the_noise_is_of_the_seed_and_of_its_size():
    # the loss is linear far from its floor: log(1 + e^t) - t is next to 0 for t = 100
    model = Behind(Slope(0.0), after=lambda z: 100 * z)
    seen = []
    watched = Behind(model, before=lambda x: seen.append(x) or x)
    first = indicators.unstable_predictions(evaluation(watched), draws=3).value
    noise = [x - 0.5 for x in seen if (x != 0.5).any()]
    assert len(noise) == 3
    assert max(x.abs().max() for x in noise) <= 4 / 255
    assert max(x.abs().max() for x in noise) > 0.9 * 4 / 255
    assert indicators.unstable_predictions(evaluation(model), draws=3).value == first


# --- 3 and 4: what the attack passed, and whether it had arrived


def test_a_success_that_is_passed_and_not_returned_is_silent():
    toy = cluster_toy(examples=64)
    size = {"steps": 20, "restarts": 2}
    keeps = Evaluation(rescaled(toy.model, toy.images), toy.model, toy.images, toy.labels, TOY_EPS, **size, rule=pgd)
    assert indicators.silent_success(keeps).value == 0

    def forgets(*given, **options):
        result = pgd(*given, **options)
        # the first ten are given up again
        result.success[:10] = False
        return result

    lost = Evaluation(rescaled(toy.model, toy.images), toy.model, toy.images, toy.labels, TOY_EPS, **size, rule=forgets)
    found = indicators.silent_success(lost)
    assert found.flagged
    # but for those that were broken by their random start, which does not count
    assert 0 < found.value <= 10 / 64


def test_an_attack_that_still_climbs_is_incomplete():
    # a step of 0.001 reaches a tenth of the ball in 10 steps, and the border lies beyond it
    far = Slope(0.7)
    short = indicators.incomplete_optimisation(evaluation(far, step_size=0.001))
    assert (short.value, short.flagged) == (1, True)
    # 40 steps of 0.02 stand at the ball's border from the tenth on
    assert indicators.incomplete_optimisation(evaluation(far, steps=40)).value == 0


def test_an_image_that_is_broken_is_not_called_incomplete():
    assert indicators.incomplete_optimisation(evaluation(Slope(0.51), step_size=0.01)).value == 0


def test_a_path_has_each_restart_with_what_was_seen_of_each_image():
    path = Path(torch.tensor([0, 1]))
    path.add(0, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    path.add(0, torch.tensor([1]), torch.tensor([[2.0, 0.0]]))
    path.add(1, torch.tensor([0]), torch.tensor([[0.0, 3.0]]))
    (first, first_wrong), (second, second_wrong) = path.runs
    assert first.shape == (2, 2)
    assert first.isnan().tolist() == [[False, False], [True, False]]
    assert first_wrong.tolist() == [[False, False], [False, True]]
    assert second.shape == (1, 2)
    assert second_wrong.tolist() == [[True, False]]


@pytest.mark.parametrize("rule", [pgd, paper_pgd])
def test_rules_tell_of_each_pass_and_give_the_same_with_and_without(rule):
    told = []
    model, images = Slope(0.58), torch.full((5, 1, 4, 4), 0.5)
    labels = torch.zeros(5, dtype=torch.int64)
    options = {"eps": EPS, "step_size": 0.01, "steps": 4, "restarts": 2}
    watched = rule(model, images, labels, **options, watch=lambda *seen: told.append(seen))
    plain = rule(model, images, labels, **options)
    assert torch.equal(watched.adversarial, plain.adversarial)
    # so many steps, and where they end, of each restart
    assert [restart for restart, *_ in told] == [0] * 5 + [1] * 5
    assert all(outputs.shape == (len(which), 2) for _, which, outputs in told)
    assert not any(outputs.requires_grad for *_, outputs in told)


# --- 5 and 6: what was climbed, and no ball at all


def test_what_breaks_the_surface_and_not_the_model_is_a_failed_transfer():
    surface, model = Slope(0.52), Slope(0.9)
    found = indicators.transfer_failure(evaluation(surface, model))
    assert (found.value, found.flagged) == (1, True)
    assert indicators.transfer_failure(evaluation(surface)).value == 0


def test_without_a_ball_everything_breaks_but_what_cannot_be_climbed():
    # 0.5 + 20 steps of 0.02 reach 0.9
    assert indicators.unconstrained_failure(evaluation(Slope(0.85), steps=20)).value == 0
    assert indicators.unconstrained_failure(evaluation(Slope(0.85), steps=10)).value == 1
    backwards = Behind(Slope(0.85), after=lambda z: -z)
    found = indicators.unconstrained_failure(evaluation(backwards, Slope(0.85), steps=20))
    assert (found.value, found.flagged) == (1, True)


# --- binarisation


@pytest.fixture(scope="module")
def linear() -> LinearClassifier:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh())
    return LinearClassifier(encoder, 48, 10).eval().requires_grad_(False)


def planted_in(model: nn.Module, **options) -> Evaluation:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(dim=1)
    return Evaluation(model, model, images, labels, EPS, **{"steps": 20, "restarts": 2, "rule": pgd} | options)


def test_a_corner_is_planted_that_noise_does_not_find_and_an_attack_does(linear):
    asked = planted_in(linear)
    found = list(indicators.planted(asked, inner=100))
    assert len(found) >= 4
    for each in found:
        assert each.images.shape == (1, 1, 8, 8)
        outputs = each.model(each.images)
        assert outputs.shape == (1, 2)
        assert outputs.argmax() == 0
        assert each.attacked.success.item()
        end = each.attacked.adversarial
        assert (end - each.images).abs().max() <= EPS + 1e-6
        assert each.model(end).argmax() == 1
    # the head's outputs span what the model's do
    spread = [float(each.model(each.images).max() - each.model(each.images).min()) for each in found]
    assert all(0 < value < 10 for value in spread)
    assert indicators.binarisation(asked, inner=100).value == 0


def test_an_attack_that_does_not_move_finds_nothing(linear):
    found = indicators.binarisation(planted_in(linear, step_size=1e-6), inner=100)
    assert (found.value, found.flagged) == (1, True)


def test_the_embedding_is_what_the_last_linear_layer_is_given(linear):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.rand(5, 1, 8, 8)
    embed = indicators.embedding_of(network)
    assert embed is not None
    assert torch.equal(embed(x), network[:3](x))
    own = indicators.embedding_of(linear)
    assert own is not None
    assert torch.equal(own(x), linear.embed(x))
    assert indicators.embedding_of(Slope()) is None
    assert indicators.embedding_of(lambda x: x) is None


def test_nothing_is_asked_of_a_model_without_an_embedding():
    assert indicators.binarisation(evaluation(Slope())).value == 0
