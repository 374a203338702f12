"""Recipes and profiles: what is written is what is read, a wrong key is named, and a run's name tells all of it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from clustr_core.attacks.names import ATTACKS
from clustr_core.measuring.profile import Profile, Protocol, SandwichBudget, SmoothingBudget, load_profile
from clustr_core.storage.files import digest
from clustr_core.training import recipes
from clustr_core.training.fields import read_yaml
from clustr_core.training.loop import fit
from clustr_core.training.recipes import (
    _POSITIVE,
    METHODS,
    ONE_LIPSCHITZ,
    TRAINING_VERSION,
    AdversarialTraining,
    Clustr,
    ClustrCert,
    ClustrLip,
    ClustrQTrades,
    CrossEntropy,
    FastAdversarialTraining,
    FreeAdversarialTraining,
    FreeClustr,
    LipschitzMargin,
    Recipe,
    Smoothing,
    Trades,
    override,
    recipe_from_dict,
    recipe_to_dict,
    run_folder,
    run_key,
)
from clustr_core.training.run import load_run

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
shared: {dataset: digits, width: 8, learning_rate: 1e-3}
methods:
  ce: {epochs: 2, learning_rate: 1/2}
  pgd-at: {eps: 25.5/255, steps: 2}
  clustr: {warm_start: ce, snapshots: [0, 2]}
  clustr-qtrades:
attacks:
  linf: {norm: linf, eps: [8/255, 0.1], steps: 5, examples: 48}
certified_examples: 64
sandwich: {steps: 7, apgd_eps: [1/4, 0.5]}
smoothing: {examples: 9, failure_prob: 1/100}
chapters:
  03-training: {shown_examples: 64}
"""


@pytest.fixture
def profile(tmp_path):
    """Loads a profile from its text."""

    def load(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load_profile(path)

    return load


def test_a_profile_is_what_its_file_says(profile):
    found = profile(GOOD)
    assert found.name.startswith("mine-")
    assert list(found.recipes) == ["ce", "pgd-at", "clustr", "clustr-qtrades"]
    ce, at, clustr, qtrades = found.recipes.values()
    assert ce == CrossEntropy(epochs=2, width=8, learning_rate=0.5)
    assert at == AdversarialTraining(eps=0.1, steps=2, width=8)
    assert clustr == Clustr(warm_start=ce, snapshots=(0, 2), width=8)
    assert qtrades == ClustrQTrades(width=8)
    assert found.attacks == {"linf": Protocol(norm="linf", eps=(8 / 255, 0.1), steps=5, examples=48)}
    assert found.certified_examples == 64
    assert found.sandwich == SandwichBudget(steps=7, apgd_eps=(0.25, 0.5))
    assert found.smoothing == SmoothingBudget(examples=9, failure_prob=0.01)
    assert found.chapters == {"03-training": {"shown_examples": 64}}


def test_an_empty_profile_is_empty(profile):
    found = profile("")
    assert (found.recipes, found.attacks, found.certified_examples, found.chapters) == ({}, {}, None, {})
    assert (found.examination, found.sandwich, found.smoothing) == (None, None, None)


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_of_the_book_loads_and_survives_json(path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(ROOT))
    found = load_profile(path.stem)
    assert found == load_profile(path)
    assert set(found.recipes) == set(METHODS)
    assert found.attacks
    for recipe in found.recipes.values():
        assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {ce: {}}", r"mine\.yaml: unknown key \['method'\], expected some of .*'methods'"),
        ("methods: {magnet: {}}", r"mine\.yaml: unknown method 'magnet', expected some of \['ce', "),
        ("methods: {ce: {epoch: 3}}", r"mine\.yaml: methods\.ce: unknown key \['epoch'\], expected some of .*'epochs'"),
        ("methods: {ce: {gap: 3}}", r"mine\.yaml: methods\.ce: unknown key \['gap'\]"),
        ("{methods: {ce: {}}, shared: {gap: 3}}", r"mine\.yaml: methods\.ce: unknown key \['gap'\]"),
        (
            "{methods: {clustr: {}}, attacks: {carried: {attack: transfer, eps: [0.1]}}}",
            r"mine\.yaml: attacks\.carried\.source: expected one of \['clustr'\], got 'ce'",
        ),
        ("attacks: {linf: {eps: [0.1], radius: 1}}", r"mine\.yaml: attacks\.linf: unknown key \['radius'\]"),
        ("methods: {ce: {3: 4}}", r"mine\.yaml: methods\.ce: expected keys that are text, got \[3\]"),
        ("methods: {ce: {epochs: 0}}", r"methods\.ce: epochs: expected a positive number, got 0"),
        ("methods: {ce: {epochs: -1}}", r"methods\.ce: epochs: expected a positive number, got -1"),
        ("methods: {ce: {epochs: 2.5}}", r"methods\.ce: epochs: expected a whole number, got 2\.5"),
        ("methods: {ce: {epochs: many}}", r"methods\.ce: epochs: expected a number or a fraction, got 'many'"),
        ("methods: {ce: {epochs: true}}", r"methods\.ce: epochs: expected a number or a fraction, got True"),
        ("methods: {ce: {epochs: null}}", r"methods\.ce: epochs: expected a number or a fraction, got None"),
        ("methods: {ce: {epochs: [1]}}", r"methods\.ce: epochs: expected a number or a fraction, got \[1\]"),
        ("methods: {ce: {dataset: 5}}", r"methods\.ce: dataset: expected a name, got 5"),
        ("methods: {ce: {learning_rate: .nan}}", r"methods\.ce: learning_rate: expected a finite number"),
        ("methods: {ce: {learning_rate: .inf}}", r"methods\.ce: learning_rate: expected a finite number"),
        ("methods: {pgd-at: {eps: 8/0}}", r"methods\.pgd-at: eps: expected a number or a fraction, got '8/0'"),
        ("methods: {pgd-at: {eps: 8/255/2}}", r"methods\.pgd-at: eps: expected a number or a fraction"),
        ("methods: {ce: {milestones: 3}}", r"methods\.ce: milestones: expected a list, got 3"),
        ("methods: {ce: {milestones: [a]}}", r"methods\.ce: milestones: expected a number or a fraction, got 'a'"),
        ("methods: {ce: {augmentation: cutout}}", r"methods\.ce: augmentation: expected one of .* got 'cutout'"),
        ("methods: {ce: {optimiser: 1}}", r"methods\.ce: optimiser: expected one of \('adam', 'sgd'\), got 1"),
        ("methods: {clustr: {warm_start: ce}, ce: {}}", r"methods\.clustr\.warm_start: expected a method above it"),
        ("methods: {clustr: {warm_start: clustr}}", r"methods\.clustr\.warm_start: expected a method above it"),
        ("methods: {clustr: {warm_start: [ce]}}", r"methods\.clustr\.warm_start: expected a method above it"),
        (
            "methods: {ce: {width: 4}, clustr: {warm_start: ce, width: 8}}",
            r"methods\.clustr: warm_start: expected width=8 as in the recipe itself, got 4",
        ),
        ("attacks: {linf: {eps: []}}", r"attacks\.linf: eps: expected at least one, got \(\)"),
        (
            "attacks: {a: {attack: apgd, eps: [0.1]}}",
            r"attacks\.a: attack: expected one of \['autoattack', 'cell-walk', 'paper', 'pgd', 'square', 'transfer'\], "
            r"got 'apgd'",
        ),
        (
            "attacks: {a: {attack: paper, norm: l2, eps: [0.1]}}",
            r"attacks\.a: norm: expected 'linf' for attack 'paper', got 'l2'",
        ),
        (
            "attacks: {a: {attack: square, eps: [0.1], losses: [ce]}}",
            r"attacks\.a: losses: expected none for attack 'square', got \('ce',\)",
        ),
        ("attacks: {linf: {eps: [0.1], losses: ce}}", r"attacks\.linf: losses: expected a list, got 'ce'"),
        ("attacks: {linf: {eps: [0.1, -0.1]}}", r"attacks\.linf: eps: expected a positive number, got -0\.1"),
        ("chapters: {07-certified: 3}", r"chapters\.07-certified: expected keys with values, got 3"),
        (
            "methods: {ce: {}, clustr: {dataset: mnist5k}}",
            r"methods: expected one data set for all, got digits, mnist5k",
        ),
        (
            "attacks: {a: {eps: [8/255], steps: 1}, b: {eps: [0.031372549], steps: 2}}",
            r"attacks\.b: expected another attack, norm, eps or loss than a, got both with pgd, linf, 0\.0313725",
        ),
        ("attacks: {linf: {eps: [0.1, 0.1]}}", r"attacks\.linf: eps: expected each once, got \(0\.1, 0\.1\)"),
        ("attacks: {a: {eps: [0.1], losses: [ce, ce]}}", r"attacks\.a: losses: expected each once, got \('ce', 'ce'\)"),
        (
            "attacks: {weak: {eps: [0.1], steps: 1}, strong: {eps: [0.2, 0.1], steps: 40}}",
            r"attacks\.strong: expected another attack, norm, eps or loss than weak, got both with pgd, linf, 0\.1, ",
        ),
        ("attacks: {linf: {eps: [0.1], steps: 0}}", r"attacks\.linf: steps: expected a positive number, got 0"),
        (
            "attacks: {linf: {eps: [0.1], steps: 2000000}}",
            r"attacks\.linf: steps: expected at most 1,000,000, got 2000000",
        ),
        ("methods: {ce: {}, clustr: {warm_start: 0}}", r"clustr\.warm_start: expected a method above it, got 0"),
        ("attacks: {linf: {eps: [1.0e+300]}}", r"attacks\.linf: eps: expected at most 1,000\.0, got 1e\+300"),
        ("attacks: {linf: {eps: [0.1], seed: -1}}", r"attacks\.linf: seed: expected a positive number, got -1"),
        ("examination: {eps: 0.1, queries: 20000000}", r"examination: queries: expected at most 10,000,000"),
        ("attacks: {linf: {eps: [0.1], restarts: 0}}", r"attacks\.linf: restarts: expected a positive number, got 0"),
        ("attacks: {linf: {eps: [0.1], step_size: 0}}", r"attacks\.linf: step_size: expected a positive number"),
        ("attacks: {linf: {eps: [0.1], examples: 0}}", r"attacks\.linf: examples: expected a positive number"),
        ("attacks: {linf: {eps: [0.1], norm: [linf]}}", r"attacks\.linf: norm: expected one of .* got \['linf'\]"),
        ("attacks: {linf: {eps: [0.1], losses: [foo]}}", r"attacks\.linf: losses: expected some of .* got 'foo'"),
        ("attacks: {linf: {eps: [1000], steps: 2}}", r"attacks\.linf: eps: expected steps of at most 1,000\.0"),
        ("attacks: {1: {eps: [0.1]}}", r"attacks: expected keys that are text, got \[1\]"),
        ("attacks: {~: {eps: [0.1]}}", r"attacks: expected keys that are text, got \[None\]"),
        ("methods: {pgd-at: {eps: 1.0e+300}}", r"methods\.pgd-at: eps: expected at most 1,000\.0, got 1e\+300"),
        ("methods: {free-at: {step_size: 1.0e+300}}", r"methods\.free-at: step_size: expected at most 1,000\.0"),
        ("methods: {clustr: {gap: 1.0e+300}}", r"methods\.clustr: gap: expected at most 1,000,000\.0"),
        ("attacks: {linf: {eps: [0.1], norm: l1}}", r"attacks\.linf: norm: expected one of .* got 'l1'"),
        ("attacks: {linf: }", r"attacks\.linf: eps: expected at least one, got \(\)"),
        ("methods: [ce]", r"mine\.yaml: methods: expected keys with values, got \['ce'\]"),
        ("methods: {ce: 5}", r"mine\.yaml: methods\.ce: expected keys with values, got 5"),
        ("shared: 5", r"mine\.yaml: shared: expected keys with values, got 5"),
        ("attacks: {linf: [0.1]}", r"mine\.yaml: attacks\.linf: expected keys with values"),
        ("- ce", r"mine\.yaml: expected keys with values, got \['ce'\]"),
        ("methods: {ce: [", r"mine\.yaml: expected YAML, got "),
        ("certified_examples: 0", r"mine\.yaml: certified_examples: expected a positive number, got 0"),
        (
            "attacks: {a: {eps: [0.1], examples: 9}, b: {attack: square, eps: [0.1, 0.2]}}\ncertified_examples: 8",
            r"mine\.yaml: certified_examples: expected 9 at least, as the attacks at linf 0\.1 have, got 8",
        ),
        (
            "attacks: {a: {eps: [0.1], examples: 9}, b: {attack: square, eps: [0.1, 0.2]}}\ncertified_examples: 9",
            r"certified_examples: expected no number \(all test images\), as the attacks at linf 0\.2 have, got 9",
        ),
        ("certified_examples: all", r"mine\.yaml: certified_examples: expected a number or a fraction, got 'all'"),
        (
            "methods: {ce: {schedule: cosine}}",
            r"methods\.ce: schedule: expected one of \('steps', 'triangle'\), got 'cosine'",
        ),
        (
            "methods: {ce: {schedule: triangle, milestones: [3]}}",
            r"methods\.ce: milestones: expected none with schedule 'triangle', got \(3,\)",
        ),
        ("methods: {ce: {crop_padding: 0}}", r"methods\.ce: crop_padding: expected a positive number, got 0"),
        (
            "methods: {clustr-cert: {encoder: small-cnn}}",
            r"methods\.clustr-cert: encoder: expected one of \('lip-mlp', .*\) for clustr-cert, got 'small-cnn'",
        ),
        # a method that promises nothing has no margin
        ("methods: {clustr-lip: {margin: 1}}", r"methods\.clustr-lip: unknown key \['margin'\]"),
        ("methods: {smoothing: {noise: 0}}", r"methods\.smoothing: noise: expected a positive number, got 0"),
        ("sandwich: {points: 0}", r"mine\.yaml: sandwich: points: expected a positive number, got 0"),
        ("sandwich: {apgd_eps: [0.5, -1]}", r"mine\.yaml: sandwich: apgd_eps: expected a positive number, got -1"),
        ("sandwich: {step: 3}", r"mine\.yaml: sandwich: unknown key \['step'\]"),
        ("sandwich: [3]", r"mine\.yaml: sandwich: expected keys with values, got \[3\]"),
        ("smoothing: {samples: 2.5}", r"mine\.yaml: smoothing: samples: expected a whole number, got 2\.5"),
        ("smoothing: {samples: -2}", r"mine\.yaml: smoothing: samples: expected a positive number, got -2"),
        ("smoothing: {failure_prob: 1}", r"mine\.yaml: smoothing: failure_prob: expected less than 1, got 1"),
        ("smoothing: {failure_prob: 0}", r"mine\.yaml: smoothing: failure_prob: expected a positive number, got 0"),
    ],
)
def test_what_a_profile_cannot_say(profile, as_installed, text, message):
    with pytest.raises(ValueError, match=message):
        profile(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-007", -7), ("8/255", 8 / 255), ("0/255", 0.0), ("25.5/255", 0.1),
        ("1e-3", 0.001), (".5", 0.5), ("1.", 1.0),
        ("true", True), ("~", None), ("'8/255'", "8/255"), ("{a: [1/4]}", {"a": [0.25]}),
        # text, of which YAML 1.1 makes 90, 10, 16, 7, False and a date
        *((text, text) for text in ("1:30", "1_0", "0x10", "0o7", "no", "2020-01-01", "1/0")),
    ],
)  # fmt: skip
def test_numbers_are_decimal_and_words_are_words(text, value):
    found = read_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", ["1:30", "1_0", "0x10", "no", "ten", "1/0", [5], True])
def test_what_is_no_number_is_refused_and_not_guessed(value):
    with pytest.raises(ValueError, match="ce: epochs: expected a number or a fraction, got"):
        override(CrossEntropy(), {"epochs": value})


def test_whole_numbers_of_any_length_stay_what_they_are():
    assert override(CrossEntropy(), {"seed": 2**60 + 1}).seed == 2**60 + 1


def test_a_profile_that_is_no_text_is_named(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"shared: {dataset: \xff}")
    with pytest.raises(ValueError, match=r"own\.yaml: expected text in UTF-8, got"):
        load_profile(tmp_path / "own.yaml")


def test_fractions_are_numbers_in_the_chapters_too(profile):
    found = profile("chapters: {04-pgd: {pictured_eps: 8/255, radii: [36/255, 0.5]}}")
    assert found.chapters == {"04-pgd": {"pictured_eps": 8 / 255, "radii": [36 / 255, 0.5]}}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("shared: {width: 8}\nmethods:\n  ce: {epochs: 2}\n  ce: {epochs: 3}\n", 4),
        ("shared: {width: 8, width: 8}\n", 1),
        ("certified_examples: 3\n\ncertified_examples: 4\n", 3),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_line(profile, text, line):
    with pytest.raises(
        ValueError, match=rf"(?s)mine\.yaml: expected YAML, got the key '\w+' stands twice.* line {line}"
    ):
        profile(text)


def test_two_profiles_of_one_file_name_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    folders = [tmp_path / "profiles", tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "tiny.yaml").write_text("certified_examples: 3", encoding="utf-8")
    names = [load_profile(folder / "tiny.yaml").name for folder in folders]
    assert names[0] == "tiny" == load_profile("tiny").name
    assert len(set(names)) == 3
    assert all(re.fullmatch("tiny-[0-9a-f]{6}", name) for name in names[1:])
    # however the path is written, and whatever the file says
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a/tiny.yaml").write_text("certified_examples: 4", encoding="utf-8")
    assert load_profile("tiny.yaml").name == load_profile("../a/tiny.yaml").name == names[1]
    assert load_profile("tiny.yaml").path == tmp_path / "a/tiny.yaml"


@pytest.mark.parametrize("name", ["my profile", "tiny.1", "täny", "a+b"])
def test_a_profile_has_a_plain_name(tmp_path, name):
    (tmp_path / f"{name}.yaml").touch()
    with pytest.raises(ValueError, match="profile: expected a file name of letters, digits, - and _, got"):
        load_profile(tmp_path / f"{name}.yaml")


def test_a_missing_profile_says_which_there_are(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").touch()
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    assert load_profile("tiny").recipes == {}
    with pytest.raises(FileNotFoundError, match=r"profile: expected one of \['tiny'\] or a YAML file, got huge"):
        load_profile("huge")


@pytest.mark.parametrize("name", sorted(_POSITIVE))
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_sizes_must_be_positive(as_installed, name, value):
    kind = next(kind for kind in METHODS.values() if name in {item.name for item in fields(kind)})
    with pytest.raises(ValueError, match=f"{name}: expected a (positive|whole) number, got {value}"):
        kind(**{name: value})


def test_every_choice_must_be_a_known_one(as_installed):
    for name in ("augmentation", "optimiser", "schedule", "precision"):
        with pytest.raises(ValueError, match=f"{name}: expected one of"):
            CrossEntropy(**{name: "other"})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "train_examples", "seed", "steps", "replays", "per_class"])
@pytest.mark.parametrize("value", [2.0, 1.5, True])
def test_counts_are_whole_numbers(as_installed, name, value):
    kind = next(kind for kind in METHODS.values() if name in {item.name for item in fields(kind)})
    with pytest.raises(ValueError, match=f"{name}: expected a whole number, got {value}"):
        kind(**{name: value})


@pytest.mark.parametrize("name", ["milestones", "snapshots"])
def test_epochs_that_never_come_are_refused(as_installed, name):
    assert getattr(CrossEntropy(epochs=3, **{name: (0, 3)}), name) == (0, 3)
    with pytest.raises(ValueError, match=rf"{name}: expected epochs in 0\.\.3, got \[4, -1\]"):
        CrossEntropy(epochs=3, **{name: (0, 4, -1)})
    with pytest.raises(ValueError, match=rf"ce: {name}: expected epochs in 0\.\.2, got \[3\]"):
        recipe_from_dict({"method": "ce", "epochs": 2, name: [3]})
    with pytest.raises(ValueError, match=f"{name}: expected epochs in"):
        override(CrossEntropy(epochs=3, **{name: (3,)}), {"epochs": 2})


def test_the_constants_of_the_papers():
    fast, trades, free = FastAdversarialTraining(), Trades(), FreeAdversarialTraining()
    assert (fast.eps, fast.step_size, fast.steps) == (8 / 255, 10 / 255, 1)
    assert (trades.trades_weight, trades.eps, trades.step_size, trades.steps) == (6, 0.031, 0.007, 10)
    assert trades.start_scale == 1e-3
    for kind in (free, FreeClustr()):
        assert (kind.eps, kind.step_size, kind.replays) == (8 / 255, 8 / 255, 8)
    assert FreeClustr().gap == Clustr().gap == 12.5


# guarantees


def test_what_each_method_promises_and_by_what_it_decides():
    facts = {kind.method: (kind.guarantee, kind.clustered, kind.rule) for kind in METHODS.values()}
    nothing = {"ce", "pgd-at", "trades", "free-at", "fast-at"}
    assert facts == {
        **dict.fromkeys(nothing, ("none", False, "soft")),
        **dict.fromkeys(("clustr", "clustr-qtrades", "free-clustr"), ("none", True, "soft")),
        **dict.fromkeys(("clustr-lip", "clustr-cert"), ("lipschitz", True, "nearest")),
        "lip-linear": ("lipschitz", False, "soft"),
        "smoothing": ("smoothing", False, "soft"),
    }
    # of the method, not of a run: no field, so in no run's name
    names = {name for kind in METHODS.values() for name in recipe_to_dict(kind())}
    assert not names & {"guarantee", "clustered", "rule"}


@pytest.mark.parametrize("kind", METHODS.values())
def test_a_lipschitz_guarantee_needs_an_encoder_that_has_one(kind, as_installed):
    for encoder in ("small-cnn", "resnet18", "vgg"):
        if kind.guarantee == "lipschitz":
            with pytest.raises(ValueError, match=f"encoder: expected one of .* for {kind.method}, got '{encoder}'"):
                kind(encoder=encoder)
        else:
            assert kind(encoder=encoder).encoder == encoder
    for encoder in ONE_LIPSCHITZ:
        assert kind(encoder=encoder).encoder == encoder
    assert (kind().encoder in ONE_LIPSCHITZ) == (kind.guarantee == "lipschitz")


def test_milestones_belong_to_steps(as_installed):
    assert CrossEntropy(schedule="triangle").milestones == ()
    assert CrossEntropy(schedule="steps", milestones=(2,)).schedule == "steps"
    with pytest.raises(ValueError, match=r"milestones: expected none with schedule 'triangle', got \(2,\)"):
        CrossEntropy(schedule="triangle", milestones=(2,))


def test_a_profile_tells_its_methods_apart():
    every = {name: kind() for name, kind in METHODS.items()}
    profile = Profile("every", every, {})
    assert set(profile.ordinary) == {
        "ce", "pgd-at", "trades", "free-at", "fast-at", "clustr", "clustr-qtrades", "free-clustr",
    }  # fmt: skip
    assert set(profile.lipschitz) == {"clustr-lip", "clustr-cert", "lip-linear"}
    assert profile.attacked == {**profile.ordinary, **profile.lipschitz}
    assert set(every) - set(profile.attacked) == {"smoothing"}
    assert all(found[name] is every[name] for found in (profile.ordinary, profile.lipschitz) for name in found)
    bare = Profile("bare", {}, {})
    assert (bare.ordinary, bare.lipschitz, bare.attacked) == ({}, {}, {})


def test_budgets(as_installed):
    assert SandwichBudget() == SandwichBudget(examples=None, steps=100, restarts=1, points=1000, apgd_eps=())
    assert SmoothingBudget().failure_prob == 0.001
    for kind in (SandwichBudget, SmoothingBudget):
        for item in fields(kind):
            bad = (-1.0,) if item.name == "apgd_eps" else -1
            with pytest.raises(ValueError, match=f"{item.name}: expected a positive number, got -1"):
                kind(**{item.name: bad})
    for value in (math.nan, math.inf, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"failure_prob: expected (a positive number|less than 1), got"):
            SmoothingBudget(failure_prob=value)
    for kind, name in ((SandwichBudget, "steps"), (SandwichBudget, "examples"), (SmoothingBudget, "samples")):
        for value in (2.0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name}: expected a whole number, got {value}"):
                kind(**{name: value})


def test_a_field_younger_than_names_is_in_them_only_where_it_was_changed(as_installed):
    plain = ClustrCert()
    assert run_key(plain) == "digits-clustr-cert-919a8ddcb6"
    names = {run_key(replace(plain, **change)) for change in ({}, {"loss": "emma"}, {"annealing": 2.0})}
    assert len(names) == 3
    assert recipe_from_dict(recipe_to_dict(replace(plain, loss="emma"))).loss == "emma"
    old = {key: value for key, value in recipe_to_dict(plain).items() if key not in ("loss", "annealing")}
    assert recipe_from_dict(old) == plain
    for changes in ({"loss": "hinge"}, {"annealing": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
            replace(plain, **changes)


def test_the_defaults_of_what_certifies():
    cert, linear = ClustrCert(), LipschitzMargin()
    assert (cert.margin, cert.temperature) == (linear.margin, linear.temperature) == (0.5, 0.25)
    assert Smoothing().noise == 0.25
    assert ClustrLip().gap == Clustr().gap


# protocols


@pytest.mark.parametrize(
    ("attack", "climbed"),
    [
        ("pgd", ("ce", "margin")),
        ("paper", ("ce",)),
        ("cell-walk", ("cells",)),
        ("transfer", ("margin",)),
        ("square", ("margin",)),
        ("autoattack", ("standard",)),
    ],
)
def test_what_each_attack_climbs_unless_told_otherwise(attack, climbed):
    assert set(ATTACKS) == {"pgd", "paper", "cell-walk", "transfer", "square", "autoattack"}
    assert Protocol(attack=attack, eps=(0.1,)).climbed == climbed
    if attack in ("pgd", "paper", "transfer"):
        assert Protocol(attack=attack, eps=(0.1,), losses=("dlr", "ce")).climbed == ("dlr", "ce")
    else:
        with pytest.raises(ValueError, match=f"losses: expected none for attack '{attack}', got"):
            Protocol(attack=attack, eps=(0.1,), losses=("ce",))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 20}, 0.0125),
        ({"steps": 5}, 0.05),
        ({"steps": 20, "step_size": 0.03}, 0.03),
        ({"attack": "cell-walk", "steps": 5}, 0.05),
        ({"attack": "transfer", "steps": 5}, 0.05),
        ({"attack": "paper", "steps": 5}, 2 / 255),
        ({"attack": "paper", "steps": 100}, 2 / 255),
        ({"attack": "paper", "steps": 20, "step_size": 0.03}, 0.03),
    ],
)
def test_the_step_of_a_protocol(options, expected):
    assert Protocol(eps=(0.1,), **options).step_size_at(0.1) == pytest.approx(expected)


@pytest.mark.parametrize("eps", [2 / 255, 25.5 / 255])
def test_the_papers_step_is_the_same_at_every_eps(eps):
    assert Protocol(attack="paper", eps=(eps,)).step_size_at(eps) == 2 / 255


def test_override_changes_what_it_names_and_refuses_the_rest():
    recipe = Clustr(warm_start=CrossEntropy())
    changed = override(recipe, {"epochs": "5", "gap": "1/2", "snapshots": [1], "train_examples": None})
    assert changed == replace(recipe, epochs=5, gap=0.5, snapshots=(1,))
    for changes, message in (
        ({"epoch": 5}, r"clustr: unknown key \['epoch'\]"),
        ({"epochs": None}, "clustr: epochs: expected a number"),
        ({"warm_start": "ce"}, "clustr: warm_start: expected a recipe or None, got 'ce'"),
        ({"epochs": -3}, "epochs: expected a positive number, got -3"),
    ):
        with pytest.raises(ValueError, match=message):
            override(recipe, changes)
    assert override(recipe, {"warm_start": None}) == Clustr()


def test_the_warm_start_follows_in_what_it_must_share():
    changed = override(Clustr(warm_start=CrossEntropy()), {"width": 8, "dataset": "mnist5k", "epochs": 3})
    start = CrossEntropy(width=8, dataset="mnist5k")
    assert changed == Clustr(width=8, dataset="mnist5k", epochs=3, warm_start=start)


@pytest.mark.parametrize("changes", [{"width": 8}, {"dataset": "mnist5k"}, {"encoder": "resnet18"}])
def test_a_warm_start_of_another_network_is_refused(changes):
    with pytest.raises(ValueError, match=f"warm_start: expected {next(iter(changes))}="):
        Clustr(warm_start=CrossEntropy(**changes))


def starts(kind):
    """A method whose network may be the start of another's."""
    return kind if kind.guarantee == "lipschitz" else CrossEntropy


@pytest.mark.parametrize("kind", [kind for kind in METHODS.values() if kind.guarantee == "lipschitz"])
def test_a_certifying_method_starts_from_its_own_kind_alone(kind):
    """Its network has a part that no other has: learnt centroids, an orthonormal head."""
    assert kind(warm_start=kind(epochs=3)).warm_start == kind(epochs=3)
    for other in METHODS.values():
        if other is not kind:
            start = other(encoder="lip-mlp")
            with pytest.raises(
                ValueError, match=f"warm_start: expected a recipe of {kind.method} itself, got {other.method}"
            ):
                kind(warm_start=start)


@pytest.mark.parametrize("kind", METHODS.values())
def test_a_recipe_survives_json(kind):
    start = starts(kind)(seed=4, train_examples=9, encoder=kind().encoder)
    for recipe in (kind(epochs=3, milestones=(1, 2), warm_start=start), kind(schedule="triangle", crop_padding=2)):
        assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"method: expected one of .*, got None"),
        ({"method": "magnet"}, r"method: expected one of .*, got 'magnet'"),
        ({"method": "ce", "gap": 3}, r"ce: unknown key \['gap'\]"),
        ({"method": "ce", "epochs": 0}, r"ce: epochs: expected a positive number"),
        ({"method": "clustr", "warm_start": {"method": "magnet"}}, r"method: expected one of"),
    ],
)
def test_what_is_no_recipe(content, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(content)


def others(kind, item):
    """Another value for a field of a recipe."""
    default = item.default
    encoder = "lip-cnn" if kind.guarantee == "lipschitz" else "resnet18"
    special = {"dataset": "mnist5k", "loss": "emma", "encoder": encoder, "augmentation": "crop", "optimiser": "sgd"}
    special |= {"schedule": "triangle", "precision": "bf16-mixed", "warm_start": starts(kind)(encoder=kind().encoder)}
    if item.name in special:
        return special[item.name]
    if isinstance(default, tuple):
        return (7,)
    return default / 2 + 0.5 if isinstance(default, float) else (default or 0) + 1


@pytest.mark.parametrize("kind", METHODS.values())
def test_every_field_changes_the_name_of_a_run(kind):
    changed = [kind(**{item.name: others(kind, item)}) for item in fields(kind)]
    changed.append(kind(warm_start=starts(kind)(epochs=21, encoder=kind().encoder)))
    keys = [run_key(recipe) for recipe in (kind(), *changed)]
    assert len(set(keys)) == len(keys)
    assert keys == [run_key(recipe) for recipe in (kind(), *changed)]


def test_methods_with_the_same_fields_have_different_names():
    assert len({run_key(kind()) for kind in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("dataset", "begins"),
    [("digits", "digits-ce-"), ("folder:data/cats", "cats-ce-"), ("folder:/data/cats/", "cats-ce-")],
)
def test_where_a_run_lies(dataset, begins, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    recipe = CrossEntropy(dataset=dataset)
    assert run_key(recipe).startswith(begins)
    assert run_folder(recipe) == tmp_path / "runs" / run_key(recipe)


@pytest.mark.parametrize("python", ["3.11.0", "3.14.2"])
def test_a_name_does_not_depend_on_python_or_on_source_code(python, monkeypatch):
    """A name is a digest of the recipe's values and of one number: it is pinned here, and nothing else is read."""
    before = run_key(CrossEntropy())
    monkeypatch.setattr("platform.python_version", lambda: python)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("a name needs no file"))
    assert run_key(CrossEntropy()) == before
    content = json.dumps(recipe_to_dict(CrossEntropy()), sort_keys=True)
    assert before == f"digits-ce-{digest(content, str(TRAINING_VERSION))[:10]}"


def test_another_version_of_the_training_is_another_run(monkeypatch):
    before = run_key(CrossEntropy())
    monkeypatch.setattr(recipes, "TRAINING_VERSION", TRAINING_VERSION + 1)
    assert run_key(CrossEntropy()) != before


def test_names_are_found_without_reading_tensors():
    code = (
        "import sys; import clustr_core.measuring.profile; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        Recipe().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_recipe_holds_its_values_as_a_file_gives_them_back(tmp_path, digits, as_installed):
    """Else a training would end in a run that is never again taken for the recipe's."""
    given = {"milestones": [1], "snapshots": [0, 1], "learning_rate": np.float64(0.01), "width": np.int64(4)}
    recipe = CrossEntropy(epochs=1, train_examples=100, **given)
    assert (recipe.milestones, recipe.snapshots) == ((1,), (0, 1))
    assert (type(recipe.learning_rate), type(recipe.width)) == (float, int)
    run = fit(recipe, dataset=digits, folder=str(tmp_path / "run"), progress=False)
    assert load_run(str(run.path), expected=recipe).recipe == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": True}, "learning_rate: expected a number, got True"),
        ({"milestones": (1.5,)}, "milestones: expected a whole number, got 1.5"),
        ({"milestones": 3}, "milestones: expected a list, got 3"),
        ({"epochs": None}, "epochs: expected a whole number, got None"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"dataset": 5}, "dataset: expected a name, got 5"),
        ({"warm_start": "ce"}, "warm_start: expected a recipe or None, got 'ce'"),
    ],
)
def test_a_value_that_a_file_could_not_give_back_is_refused(given, message, as_installed):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CrossEntropy(**given)


def test_a_chain_of_starts_is_as_long_as_can_be_read_back():
    longest = CrossEntropy()
    for _ in range(recipes.LONGEST_CHAIN - 1):
        longest = CrossEntropy(warm_start=longest)
    assert recipes.recipe_from_dict(recipes.recipe_to_dict(longest)) == longest
    with pytest.raises(
        ValueError, match="warm_start: expected at most 16 recipes, one the start of the next, got more"
    ):
        CrossEntropy(warm_start=longest)


def test_epochs_are_told_with_those_of_every_start():
    start = CrossEntropy(epochs=5)
    middle = recipes.Clustr(epochs=3, warm_start=start)
    assert recipes.epochs_in_words(start) == "5"
    assert recipes.epochs_in_words(replace(middle, epochs=2, warm_start=middle)) == "5 + 3 + 2"


def test_two_suffixes_of_one_name_are_two_profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    for suffix in ("yaml", "yml"):
        (tmp_path / f"profiles/tiny.{suffix}").write_text("certified_examples: 3", encoding="utf-8")
    own, other = load_profile("tiny").name, load_profile(tmp_path / "profiles/tiny.yml").name
    assert own == "tiny"
    assert re.fullmatch(r"tiny-[0-9a-f]{6}", other)


@pytest.mark.parametrize("name", ["published", "bench"])
def test_no_profile_writes_where_other_tables_lie(tmp_path, monkeypatch, name):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / f"profiles/{name}.yaml").write_text("certified_examples: 3", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"profile: expected another name than those of folders .* got {name}"):
        load_profile(name)
