"""An attack of one's own: judged by us, held to its ball, measured and kept like ours."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

import clustr_core as cc
from clustr_core.attacks.ball import project
from clustr_core.attacks.names import ATTACKS
from clustr_core.attacks.registry import OWN_ATTACKS, run_own
from clustr_core.measuring.attacked import attacks_of
from clustr_core.measuring.profile import load_profile
from clustr_core.models.encoders import ENCODERS
from clustr_core.training.loop import fit
from clustr_core.training.recipes import METHODS
from tools import notebooks

ROOT = Path(__file__).resolve().parents[2]

WALK = {"norm": "linf", "eps": 0.1, "step_size": 0.05, "steps": 2}
PROFILE = """\
shared: {dataset: digits, width: 8, train_examples: 150}
methods: {ce: {epochs: 1}}
attacks: {mine: {attack: one-step, norm: linf, eps: [0.1], steps: 1, examples: 16}}
"""


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is forgotten after it."""
    with patch.dict(ATTACKS), patch.dict(OWN_ATTACKS), patch.dict(ENCODERS), patch.dict(METHODS):
        yield
    sys.modules.pop("mine_of_chapter", None)


@pytest.fixture
def linear():
    """A linear classifier of four pixels, and images a known distance from its border."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]) / 4)
    images = torch.full((3, 1, 2, 2), 0.5)
    return model.eval(), images, torch.tensor([0, 0, 1])


def towards(model, images, labels, *, norm, eps, step_size, steps, restarts, seed):
    """One step of eps down the first logit's margin."""
    points = images.clone().requires_grad_()
    logits = model(points)
    (logits[:, 1] - logits[:, 0]).sum().backward()
    return (images + eps * points.grad.sign()).clamp(0, 1)


def test_its_points_are_judged(linear):
    model, images, labels = linear
    cc.register_attack("one-step")(towards)
    model[1].bias = nn.Parameter(torch.tensor([0.0, 0.45]))  # the border lies at a mean of 0.45
    for eps, broken in ((0.04, False), (0.06, True)):
        found = run_own("one-step", model, images, labels, **WALK | {"eps": eps})
        assert found.success.tolist() == [broken, broken, True]  # the last was wrong before
        assert torch.equal(found.adversarial[2], images[2])
        assert found.clean_prediction.tolist() == [0, 0, 0]
        assert found.prediction.tolist() == [int(broken), int(broken), 0]
        assert found.gradients.tolist() == [1, 1, 1]


def test_it_has_gradients_where_its_caller_has_none(linear):
    cc.register_attack("one-step")(towards)
    with torch.inference_mode():
        assert run_own("one-step", *linear, **WALK).gradients.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (lambda x: x + 0.2, "within eps of their images in linf, got one 0.2 away"),
        (lambda x: x - 0.6, r"pixels in \[0, 1\], got -0.1 to -0.1"),
        (lambda x: x * torch.nan, "finite points"),
        (lambda x: x[:1], r"a point for each image, \[3, 1, 2, 2\] of torch.float32, got \[1, 1, 2, 2\]"),
        (lambda x: x.double(), "of torch.float64"),
        (lambda x: None, "got NoneType"),
    ],
)
def test_points_that_cannot_count(linear, returned, complaint):
    cc.register_attack("one-step")(lambda model, images, labels, **rest: returned(images))
    with pytest.raises(ValueError, match=f"one-step: expected .*{complaint}"):
        run_own("one-step", *linear, **WALK)


def test_a_projected_point_of_the_sphere_counts(linear):
    model, images, labels = linear
    cc.register_attack("one-step")(lambda model, images, labels, **rest: images + rest["eps"] / 2)
    assert run_own("one-step", model, images, labels, **WALK | {"norm": "l2"}).success.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "options", "attack", "complaint"),
    [
        ("pgd", {}, towards, "name: expected a free one, got 'pgd'"),
        ("My Attack", {}, towards, "name: expected one such as 'my-attack'"),
        *(
            (name, {}, towards, "name: expected one such as 'my-attack'")
            for name in ("nan", "2020", "1e5", "true", "1-2")
        ),
        ("one-step", {"version": 0}, towards, "version: expected an integer above 0, got 0"),
        ("one-step", {}, lambda model, images, labels, *, eps: images, "can be called as attack.*norm"),
        ("one-step", {}, lambda model, images, **rest: images, "can be called as attack.*labels"),
        ("one-step", {}, lambda model, images, labels, *, mine, **rest: images, "can be called as attack.*mine"),
        ("one-step", {}, 5, "can be called as attack.*5"),
    ],
)
def test_what_cannot_be_registered(name, options, attack, complaint):
    with pytest.raises(ValueError, match=complaint):
        cc.register_attack(name, **options)(attack)
    assert name == "pgd" or name not in ATTACKS


def test_a_profile_measures_it_and_keeps_the_rows_by_version(tmp_path, monkeypatch, digits):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").write_text(PROFILE, encoding="utf-8")
    with pytest.raises(ValueError, match=r"attack: expected one of .* got 'one-step'"):
        load_profile("tiny")
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return towards(*args, **kwargs)

    cc.register_attack("one-step")(counted)
    profile = load_profile("tiny")
    run = fit(profile.recipes["ce"], dataset=digits, progress=False)
    rows = attacks_of(run, profile, dataset=digits, progress=False)
    mine = rows[rows["attack"] == "one-step"]
    assert len(mine) == 16 * rows["method"].nunique()
    assert {*mine["loss"]} == {"one-step"}
    first = len(calls)
    assert first
    attacks_of(run, profile, dataset=digits, progress=False)
    assert len(calls) == first
    cc.register_attack("one-step", version=2)(counted)
    attacks_of(run, profile, dataset=digits, progress=False)
    assert len(calls) == 2 * first


def test_no_images_are_no_result(linear):
    cc.register_attack("one-step")(towards)
    model, images, labels = linear
    assert len(run_own("one-step", model, images[:0], labels[:0], **WALK).success) == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_projected_point_is_inside_in_every_precision(linear, dtype, norm):
    model, images, labels = linear
    images = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    cc.register_attack("one-step")(lambda model, images, labels, **rest: project(images + 1, images, 0.1, norm))
    assert len(run_own("one-step", lambda x: model(x.float()), images, labels, **WALK | {"norm": norm}).success) == 3


def test_an_attack_that_changes_the_model_is_refused(linear):
    model, images, labels = linear

    def cheat(given, images, labels, **rest):
        with torch.no_grad():
            model[1].weight.mul_(-1)
        return images

    cc.register_attack("one-step")(cheat)
    with pytest.raises(ValueError, match="one-step: expected the model as it was"):
        run_own("one-step", model, images, labels, **WALK)


def test_a_profile_finds_what_its_plugin_registers(tmp_path, monkeypatch):
    """The profile of chapter 10, with its cells as the plugin, in that order: read first, registered by it."""
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    source = next(path for path in notebooks.sources(ROOT) if path.stem.endswith("-extend"))
    cells = [cell for cell in notebooks.read_source(source).cells if cell.cell_type == "code"]
    own = {cell.metadata.get("label", ""): cell.source for cell in cells}
    imports = next(cell.source for cell in cells if cell.source.startswith("import")).partition("\n\ntorch.")[0]
    wanted = [own["own-encoder"].split("\n\n\n")[0], own["own-method"].split("\n\n\nce = ")[0], own["own-attack"]]
    (tmp_path / "mine_of_chapter.py").write_text("\n\n\n".join([imports, *wanted]), encoding="utf-8")
    text = source.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(text.replace("mine.py", "mine_of_chapter.py"), encoding="utf-8")
    profile = load_profile(tmp_path / "mine.yaml")
    assert profile.attacks["mine"].attack == "momentum"
    assert profile.recipes["label-smoothing"].encoder == "two-layers"
