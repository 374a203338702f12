"""Diagnostics: every check speaks where the closed form says the number is wrong, and is silent where it is right."""

import pytest
import torch
from torch import nn

from clustr_core import data
from clustr_core.attacks.ball import pgd_endpoint, random_point
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.losses import cross_entropy, margin_loss
from clustr_core.attacks.paper import ScoreModel, paper_surface
from clustr_core.attacks.temperature import rescaled
from clustr_core.measuring import checks, slices
from clustr_core.measuring.checks import CHECKS, MATERIAL, Finding
from clustr_core.measuring.diagnostics import examine, verdict
from clustr_core.measuring.evaluation import CHANGES, Evaluation
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters, fit_clusters
from clustr_core.theory.toys import HILL_STD, LINEAR_STD, TOY_EPS, VANISHED_STD, cluster_toy, toy_thresholds

KINDS = ("honest", "linear", "hill", "vanished")
MASKED = ("hill", "vanished")
STATIC = ("randomised", "gradients in forward", "too few classes")


def evaluation_of(kind, *, seed=0, eps=TOY_EPS, examples=64, **options):
    """An evaluation of the toy whose truth is known: "honest" and "linear" are right, "hill" and "vanished" are not."""
    std = {"linear": LINEAR_STD, "vanished": VANISHED_STD}.get(kind, HILL_STD)
    toy = cluster_toy(seed=seed, std=std, examples=examples)
    surface = ScoreModel(toy.model) if kind in ("hill", "linear") else toy.model
    return Evaluation(surface, toy.model, toy.images, toy.labels, eps, **options)


def exact(evaluation, kind, *, seed=0):
    """The robust accuracy, in closed form."""
    toy = cluster_toy(seed=seed, std=HILL_STD, examples=len(evaluation.images))
    return toy.robust(evaluation.eps).double().mean().item()


def other_model():
    return cluster_toy(seed=1000, std=LINEAR_STD).model


def table_of(evaluation, **options):
    e = evaluation
    return examine(e.surface, e.model, e.images, e.labels, eps=e.eps, **options)


class Mapped(nn.Module):
    """A model's outputs, changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images))


# --- the toy: the truth itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.02, 0.025, TOY_EPS])
@pytest.mark.parametrize("side", [1, 4])
def test_the_closed_form_is_the_worst_of_the_balls_corners(eps, side):
    toy = cluster_toy(seed=3, examples=40, side=side)
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    # a linear function is largest at a corner, and these are the corners in the plane of brightness
    corners = [toy.images + eps * sign[:, None, None] for sign in signs]
    with torch.no_grad():
        margins = torch.stack([margin_loss(toy.model(x), toy.labels) for x in corners]).amax(dim=0)
    torch.testing.assert_close(toy.largest_margin(eps), margins, atol=1e-3, rtol=1e-4)
    assert torch.equal(toy.robust(eps), margins < 0)


def test_no_attack_breaks_what_the_closed_form_calls_robust():
    toy = cluster_toy(seed=3, side=4)
    options = {"step_size": 0.006, "steps": 20, "loss": "margin", "restarts": 4}
    broken = pgd(rescaled(toy.model, toy.images), toy.images, toy.labels, eps=0.024, **options).success
    assert not (broken & toy.robust(0.024)).any()
    assert (broken | toy.robust(0.024)).float().mean() > 0.95
    assert 0.1 < toy.robust(0.024).float().mean() < 0.9


def test_the_closed_form_is_reached_at_its_corner_and_knows_the_walls():
    clusters = Clusters(torch.tensor([[0.1, 0.5], [0.3, 0.5]]), torch.tensor([0, 1]), torch.full((2,), 0.01))
    toy = cluster_toy(examples=2, side=1)
    model = ClusterClassifier(toy.model.encoder, clusters)
    images = torch.tensor([[0.05, 0.5], [0.25, 0.5]])[:, :, None, None]
    walled = type(toy)(model, images, torch.tensor([1, 0]))
    # mislabelled: the first may go left by 0.05 only, which does not help it back; log-margins in nats, by hand
    expected = [(0.3 - 0.0) ** 2 * 50 - 0.1**2 * 50, 0.35**2 * 50 - 0.15**2 * 50]
    assert walled.largest_margin(0.2).tolist() == pytest.approx(expected, abs=1e-4)
    mirrored = ClusterClassifier(
        toy.model.encoder, Clusters(1 - clusters.centroids, clusters.labels, clusters.variance)
    )
    other = type(toy)(mirrored, 1 - images, walled.labels)
    assert other.largest_margin(0.2).tolist() == pytest.approx(expected, abs=1e-4)


def test_all_toys_say_the_same_about_robustness():
    answers = [cluster_toy(std=std, side=side).robust(0.025) for std in (HILL_STD, LINEAR_STD) for side in (1, 16)]
    assert 0 < answers[0].sum() < len(answers[0])
    assert all(torch.equal(answers[0], other) for other in answers)


@pytest.mark.parametrize(("name", "value"), [("examples", 0), ("std", 0.0), ("side", 0)])
def test_a_toy_refuses_empty_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
        cluster_toy(**{name: value})


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reported_number_is_right_where_honest_and_far_off_where_masked(kind, seed):
    evaluation = evaluation_of(kind, seed=seed)
    overstated = evaluation.robust_accuracy - exact(evaluation, kind, seed=seed)
    if kind in MASKED:
        assert overstated > 2 * MATERIAL
    else:
        assert overstated == 0


# --- every check on the toy ---------------------------------------------------------------------------------------

SPEAKS = {
    "zero gradients": {"vanished"},
    "underflowing gradients": {"vanished"},
    "loss disagreement": {"hill", "vanished"},
    "grey ball": {"vanished"},
    "loss curves": {"hill", "vanished"},
    "black box: Square": {"hill", "vanished"},
    "black box: transfer": {"hill", "vanished"},
    "budget": set(),
    "wrong hill": {"hill"},
    "slices": {"hill"},
    "randomised": set(),
    "gradients in forward": set(),
    # scores are no logits even where they mislead nobody: one symptom does not decide
    "no logits": {"linear", "hill"},
    "too few classes": set(),
    "ablation": {"hill", "vanished"},
    "unavailable gradients": {"vanished"},
    "unstable predictions": set(),
    "silent success": {"hill"},
    "incomplete optimisation": set(),
    "transfer failure": set(),
    "unconstrained failure": {"hill", "vanished"},
    # of the surface's range: where that saturates, so does the planted head
    "binarisation": {"vanished"},
}
# which tell nothing apart on the toy
SILENT = {"budget", "no logits", "unstable predictions", "incomplete optimisation", "transfer failure"}
# in a plane hardly any corner can be told from the points within
SILENT |= {"binarisation"}


@pytest.fixture(scope="module")
def tables():
    return {kind: table_of(evaluation_of(kind, examples=128), source=other_model()) for kind in KINDS}


@pytest.mark.parametrize("check", list(CHECKS))
def test_a_check_speaks_exactly_where_it_should(check, tables):
    spoke = {kind for kind, table in tables.items() if table.set_index("check").loc[check, "flagged"]}
    assert spoke == SPEAKS[check]


def test_the_battery_flags_what_is_masked_and_passes_what_is_honest(tables):
    assert {kind for kind, table in tables.items() if verdict(table)} == set(MASKED)


def test_the_thresholds_stand_between_honest_and_masked_on_other_seeds_too():
    table = toy_thresholds(seeds=(20,)).set_index("check")
    assert list(table.index) == list(CHECKS)
    assert (table["threshold"] == [CHECKS[check].threshold for check in table.index]).all()
    for check in set(CHECKS) - {*SILENT, *STATIC}:
        row = table.loc[check]
        assert row["honest"] <= row["threshold"]
        # a success that is lost is the rule's fault, of which the toy has little
        assert row[["hill", "vanished"]].max() >= (1 if check == "silent success" else 2) * row["threshold"]
        assert row[["hill", "vanished"]].max() > row["threshold"]
    quiet = [*SILENT - {"no logits"}, *STATIC]
    assert (table.loc[quiet, "honest"] <= table.loc[quiet, "threshold"]).all()


@pytest.mark.parametrize("kind", MASKED)
def test_a_witness_never_claims_more_than_the_number_is_overstated(kind, tables):
    evaluation, values = evaluation_of(kind, examples=128), tables[kind].set_index("check")["value"]
    overstated = evaluation.robust_accuracy - exact(evaluation, kind)
    for check in ("black box: Square", "black box: transfer", "budget", "slices", "ablation"):
        assert values[check] <= overstated + 1e-9
    # here the witness is found for every single image
    assert values["ablation"] == pytest.approx(overstated)


def test_another_eps_where_some_images_are_robust_changes_no_verdict():
    for kind in KINDS:
        evaluation = evaluation_of(kind, seed=5, eps=0.028, examples=48)
        assert verdict(table_of(evaluation, queries=50, restarts=1)) == (kind in MASKED)


# --- single checks against answers known by hand ------------------------------------------------------------------


def test_zero_and_underflowing_gradients_are_counted_image_by_image():
    toy = cluster_toy(examples=40)
    # classes 2 and 3 lie on the bright side of the first channel
    scale = torch.tensor([1.0] * 10 + [1e-14] * 14 + [0.0] * 16)[:, None]
    surface = Mapped(rescaled(toy.model, toy.images), lambda z: z * scale if len(z) == 40 else z)
    evaluation = Evaluation(surface, toy.model, toy.images, toy.labels, TOY_EPS)
    assert checks.zero_gradients(evaluation).value == pytest.approx(16 / 40)
    assert checks.underflowing_gradients(evaluation).value == pytest.approx(30 / 40)
    largest = checks.input_gradients(evaluation)
    assert largest[:10].min() > 1e-4
    assert torch.equal(largest == 0, scale.squeeze(1) == 0)


def test_a_surface_without_a_gradient_is_refused():
    toy = cluster_toy(examples=8)
    evaluation = Evaluation(Mapped(toy.model, torch.Tensor.detach), toy.model, toy.images, toy.labels, TOY_EPS)
    with pytest.raises(ValueError, match="surface: expected outputs with a gradient, got none"):
        checks.zero_gradients(evaluation)


@pytest.mark.parametrize("kind", ["honest", "linear"])
def test_every_loss_of_an_honest_evaluation_finds_the_truth_at_every_eps(kind):
    evaluation = evaluation_of(kind)
    table = checks.loss_table(evaluation, [0.024, 0.028, TOY_EPS])
    assert list(table) == ["eps", "surface", "loss", "robust_accuracy"]
    assert table.groupby("eps").size().tolist() == [4, 4, 4]
    toy = cluster_toy()
    for eps, accuracy in zip(table["eps"], table["robust_accuracy"], strict=True):
        truth = toy.robust(eps)[:64].double().mean().item()
        assert truth <= accuracy <= truth + 0.1
    assert table.query("eps == 0.024")["robust_accuracy"].min() > 0.1


def test_the_disagreement_is_with_the_lowest_of_the_other_losses():
    evaluation = evaluation_of("hill")
    table = checks.loss_table(evaluation, [TOY_EPS]).set_index(["surface", "loss"])["robust_accuracy"]
    assert table["logits"].tolist() == [0, 0]
    assert checks.loss_disagreement(evaluation).value == pytest.approx(table["evaluation", "ce"])


def test_grey_refutes_only_where_grey_is_another_class():
    toy = cluster_toy(examples=40)
    always_0 = Mapped(toy.model, lambda z: z * 0 + torch.tensor([1.0, 0, 0, 0]))
    right = Evaluation(always_0, always_0, toy.images, torch.zeros_like(toy.labels), TOY_EPS)
    assert right.robust_accuracy == 1
    assert not checks.grey_ball(right).flagged
    # a surface that the attack cannot climb, and a model that calls grey something else
    flat = Mapped(toy.model, lambda z: z * 0 + torch.tensor([1.0, 0, 0, 0]))
    grey_is_1 = Mapped(toy.model, lambda z: z * 0 + torch.tensor([0, 1.0, 0, 0]))
    wrong = Evaluation(flat, grey_is_1, toy.images, torch.zeros_like(toy.labels), TOY_EPS)
    assert checks.grey_ball(wrong).value == 1


def test_the_grey_ball_does_not_blame_the_surface_for_a_short_step():
    evaluation = evaluation_of("honest", steps=5, step_size=1e-4)
    assert evaluation.robust_accuracy == 1
    assert checks.grey_ball(evaluation).value == 0


def test_black_boxes_are_held_against_the_reported_number():
    short = evaluation_of("honest", steps=1, restarts=1, step_size=1e-4)
    assert short.robust_accuracy == 1
    assert checks.transfer_gap(short, other_model()).flagged
    assert checks.transfer_gap(short, Mapped(other_model(), lambda z: -1 - z)).value == 0
    assert checks.square_gap(short, queries=200).value > checks.square_gap(short, queries=2).value >= 0


def test_the_budget_check_notices_too_few_steps():
    # 5 steps lead 0.015 of the 0.025 that are needed, 25 lead to the border of the ball
    short = evaluation_of("honest", steps=5, restarts=1, step_size=0.003)
    assert checks.budget(short).value == pytest.approx(short.robust_accuracy - 0)
    assert short.robust_accuracy > 0.5
    assert not checks.budget(evaluation_of("honest")).flagged


def test_a_wrong_hill_is_a_loss_that_rises_while_the_margin_falls():
    toy = cluster_toy(examples=40)
    upside_down = Evaluation(Mapped(toy.model, lambda z: -z / 100), toy.model, toy.images, toy.labels, TOY_EPS, 5, 1)
    # every image is wrong on that surface: the attack stays where it starts, so it is moved by hand
    start = random_point(toy.images, 1e-3, "linf", torch.Generator().manual_seed(0))
    moved = pgd_endpoint(
        lambda x: cross_entropy(upside_down.surface(x), toy.labels), toy.images, start,
        eps=TOY_EPS, step_size=TOY_EPS / 4, steps=8,
    )  # fmt: skip
    upside_down.attacked.adversarial.copy_(moved)
    assert checks.wrong_hill(upside_down).value == 1
    assert checks.wrong_hill(evaluation_of("honest")).value == 0


def test_slices_stay_in_the_ball_and_find_what_lies_behind_the_attack():
    evaluation = evaluation_of("hill")
    axes = slices.slice_axes(evaluation)
    assert axes[0].abs().flatten(1).amax(dim=1).tolist() == pytest.approx([1.0] * 64)
    assert set(axes[1].unique().tolist()) == {-1.0, 1.0}
    for a, b in ((1, 1), (-1, 1), (1, 0)):
        points = slices.on_slice(evaluation, axes, a, b)
        assert (points - evaluation.images).abs().max() <= TOY_EPS * (1 + 1e-5)
    assert torch.equal(slices.on_slice(evaluation, axes, 0, 0), evaluation.images)
    table = slices.slice_table(evaluation, points=5)
    assert list(table) == ["index", "a", "b", "loss", "margin"]
    assert len(table) == 64 * 25
    refuted = table.groupby("index")["margin"].max().gt(0).to_numpy() & evaluation.robust.numpy()
    assert checks.slices(evaluation, points=5).value == pytest.approx(refuted.mean())
    clean = table.query("a == 0 and b == 0")["loss"].to_numpy()
    expected = cross_entropy(evaluation.surface(evaluation.images), evaluation.labels)
    torch.testing.assert_close(torch.from_numpy(clean.copy()), expected)


def test_a_slice_needs_two_points():
    with pytest.raises(ValueError, match="points: expected at least 2 along each axis, got 1"):
        checks.slices(evaluation_of("honest", examples=4), points=1)


def test_a_randomised_surface_is_noticed():
    toy = cluster_toy(examples=16)
    noisy = Mapped(toy.model, lambda z: z + 0.1 * torch.randn_like(z))
    evaluation = Evaluation(noisy, toy.model, toy.images, toy.labels, TOY_EPS)
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    assert checks.randomised(evaluation).flagged
    assert torch.rand(1) == expected
    assert checks.randomised(evaluation_of("honest")).value == 0


ways = {
    "grad": torch.autograd.grad,
    "backward": lambda loss, leaf: loss.backward(),
    "autograd.backward": lambda loss, leaf: torch.autograd.backward(loss),
}


@pytest.mark.parametrize("way", list(ways))
def test_gradients_inside_the_forward_pass_are_counted(way):
    toy = cluster_toy(examples=4)

    def purify(logits):
        leaf = torch.ones(3, requires_grad=True)
        with torch.enable_grad():
            for _ in range(2):
                ways[way](leaf.sum(), leaf)
        return logits

    dynamic = Evaluation(Mapped(toy.model, purify), toy.model, toy.images, toy.labels, TOY_EPS)
    rule = CHECKS["gradients in forward"]
    assert checks.gradients_in_forward(dynamic) == Finding(
        "gradients in forward", 2.0, 0.0, True, rule.source, rule.meaning
    )
    assert checks.gradients_in_forward(evaluation_of("honest", examples=4)).value == 0


@pytest.mark.parametrize(
    ("change", "flagged"),
    [
        (lambda z: z, False),
        (lambda z: z.softmax(dim=1), True),
        (lambda z: z.exp() * 3, True),
        (lambda z: z * 100, False),
        (lambda z: z.exp() - 1e-3, False),
        (lambda z: z.log_softmax(dim=1), False),
    ],
)
def test_outputs_that_are_no_logits_are_noticed(change, flagged):
    toy = cluster_toy(examples=40)
    cool = rescaled(toy.model, toy.images)
    evaluation = Evaluation(Mapped(cool, change), toy.model, toy.images, toy.labels, TOY_EPS)
    assert checks.no_logits(evaluation).flagged == flagged


@pytest.mark.parametrize(("classes", "lacking"), [(2, 2), (3, 1), (4, 0), (10, 0)])
def test_few_classes_are_counted(classes, lacking):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    evaluation = Evaluation(model, model, torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64), 0.1)
    finding = checks.too_few_classes(evaluation)
    assert (finding.value, finding.flagged) == (lacking, lacking > 0)


def test_the_ablation_names_the_ingredient():
    hill = evaluation_of("hill").ablations.set_index("change")
    assert list(hill.index) == list(CHANGES)
    assert hill.loc["released", "drop"] == 0
    assert hill.loc[["surface", "all"], "robust_accuracy"].tolist() == [0, 0]
    assert hill["drop"].drop("all").idxmax() == "surface"
    assert (hill["robust_accuracy"] + hill["drop"]).tolist() == pytest.approx(
        [hill.loc["released", "robust_accuracy"]] * 6
    )
    short = evaluation_of("honest", steps=5, restarts=1, step_size=0.003)
    table = short.ablations.set_index("change")
    assert table["drop"].drop("all").idxmax() == "steps"
    assert table.loc["surface", "drop"] == pytest.approx(0, abs=0.05)
    assert checks.ablation(short).value == pytest.approx(table.loc["steps", "drop"])


# --- the battery --------------------------------------------------------------------------------------------------


def test_the_table_has_one_row_a_check_and_says_why(tables):
    table = tables["hill"]
    assert list(table) == ["check", "value", "threshold", "flagged", "source", "meaning"]
    assert table["check"].tolist() == list(CHECKS)
    assert (table["flagged"] == (table["value"] > table["threshold"])).all()
    assert table["value"].dtype == table["threshold"].dtype == float
    assert table["source"].str.len().min() > 5
    assert table["meaning"].is_unique
    without = table_of(evaluation_of("hill", examples=8))["check"].tolist()
    assert without == [check for check in CHECKS if check != "black box: transfer"]


def test_a_seed_fixes_the_table_and_the_global_random_state_stays():
    evaluation = evaluation_of("hill", examples=24)
    noisy = Mapped(evaluation.surface, lambda z: z + 1e-3 * torch.randn_like(z))
    seeds = (0, 0, 1)
    found = []
    for n, seed in enumerate(seeds):
        torch.manual_seed(n)
        expected = torch.rand(1)
        torch.manual_seed(n)
        found.append(
            examine(noisy, evaluation.model, evaluation.images, evaluation.labels, eps=TOY_EPS, seed=seed, queries=20)
        )
        assert torch.rand(1) == expected
    assert found[0].equals(found[1])
    assert not found[0].equals(found[2])


def test_one_witness_or_symptoms_of_two_kinds_decide(tables):
    def speaking(*checks):
        return verdict(tables["honest"].assign(flagged=lambda t: t["check"].isin(checks)))

    assert not speaking()
    for check, rule in CHECKS.items():
        assert speaking(check) == (rule.kind == "witness")
    witnesses = {check for check, rule in CHECKS.items() if rule.kind == "witness"}
    assert witnesses == {
        "loss disagreement", "black box: Square", "black box: transfer", "budget", "slices", "ablation"
    }  # fmt: skip
    # one cause counts once
    assert not speaking("zero gradients", "underflowing gradients")
    assert not speaking("grey ball", "loss curves", "wrong hill")
    assert not speaking("randomised", "gradients in forward")
    assert speaking("wrong hill", "no logits")
    assert speaking("zero gradients", "randomised")


def test_a_table_of_other_checks_is_refused(tables):
    with pytest.raises(ValueError, match=r"table: expected checks of .*, got \['luck'\]"):
        verdict(tables["honest"].assign(check="luck"))


def test_the_released_step_is_taken_where_it_reaches_the_border():
    assert evaluation_of("honest", examples=4, eps=0.1).step == 2 / 255
    assert evaluation_of("honest", examples=4, eps=0.2).step == pytest.approx(0.025)
    assert evaluation_of("honest", examples=4, eps=0.2, step_size=0.01).step == 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 1.5}, "eps: expected at most 1 in linf"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0"),
        ({"steps": 0}, "steps: expected a positive whole number, got 0"),
        ({"restarts": 0}, "restarts: expected a positive whole number, got 0"),
        ({"step_size": 0.0}, "step_size: expected a positive number, got 0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: expected one for each of 4 images, got 3"),
        ({"labels": torch.full((4,), 9)}, r"labels: expected classes in 0\.\.3, got 9 to 9"),
        ({"images": torch.full((4, 2, 2, 2), 2.0)}, r"images: expected pixels in \[0, 1\], got values from 2 to 2"),
        ({"images": torch.zeros(0, 2, 2, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "images: expected at least"),
        ({"surface": lambda x: torch.zeros(len(x), 7)}, "surface: expected the model's 4 classes, got 7"),
        ({"surface": lambda x: torch.full((len(x), 4), torch.nan)}, "model: expected logits, got NaN"),
    ],
)
def test_an_evaluation_that_makes_no_sense_is_refused(change, message, as_installed):
    toy = cluster_toy(examples=4, side=2)
    options = {"surface": toy.model, "model": toy.model, "images": toy.images, "labels": toy.labels, "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        Evaluation(**{**options, **change})


def test_weights_get_no_gradients_and_modes_stay():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4)).eval()
    g = torch.Generator().manual_seed(0)
    images, labels = torch.rand(8, 1, 8, 8, generator=g), torch.arange(8) % 4
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examine(model, model, images, labels, eps=0.1, source=model, steps=2, restarts=1, queries=5)
    assert all(p.grad is None for p in model.parameters())
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- judged on what the thresholds were not fixed on --------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    found = data.load_dataset("digits")
    return data.to_float(found.train_images), found.train_labels, data.to_float(found.test_images), found.test_labels


@pytest.mark.parametrize("seed", [0, 1])
def test_adversarial_training_on_digits_passes(digits, seed):
    images, labels, test_images, test_labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LinearClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU()), 64, 10)
    optimiser, g = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(seed)
    for _ in range(150):
        batch = torch.randint(len(images), (128,), generator=g)
        x, y = images[batch], labels[batch]
        start = random_point(x, 0.1, "linf", g)
        moved = pgd_endpoint(lambda z, y=y: cross_entropy(model(z), y), x, start, eps=0.1, step_size=0.04, steps=5)
        optimiser.zero_grad()
        cross_entropy(model(moved), y).mean().backward()
        optimiser.step()
    evaluation = Evaluation(paper_surface(model), model, test_images[:64], test_labels[:64], 0.1)
    assert evaluation.robust_accuracy > 0.5
    table = table_of(evaluation, queries=100)
    assert not verdict(table)


@pytest.mark.parametrize("per_class", [1, 5])
def test_the_released_evaluation_of_clusters_of_plain_digits_is_flagged(digits, per_class):
    images, labels, test_images, test_labels = digits
    clusters, _ = fit_clusters(images.flatten(1), labels, per_class=per_class)
    model = ClusterClassifier(nn.Flatten(), clusters).eval()
    evaluation = Evaluation(paper_surface(model), model, test_images[:64], test_labels[:64], 0.1)
    table = table_of(evaluation, queries=50, restarts=1)
    assert verdict(table)
    spoke = set(table.loc[table["flagged"], "check"])
    assert {"loss disagreement", "ablation"} <= spoke
    assert "zero gradients" not in spoke
