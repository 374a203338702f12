"""A method of one's own, in one's own file: it trains, is killed, resumes, and is attacked and certified like ours."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file

from clustr_core.attacks.losses import cross_entropy
from clustr_core.drawing.results import draw_accuracy
from clustr_core.measuring.accuracy import robust_accuracy, summary_table
from clustr_core.measuring.attacked import attacks_of
from clustr_core.measuring.certified import certificates_of
from clustr_core.measuring.profile import load_profile
from clustr_core.training import loop
from clustr_core.training.loop import fit, train_epoch
from clustr_core.training.recipes import (
    METHODS,
    PRECISION_VERSIONS,
    Clustr,
    CrossEntropy,
    Recipe,
    recipe_from_dict,
    run_key,
)
from clustr_core.training.registry import register_recipe
from clustr_core.training.run import load_run
from clustr_core.training.step import Terms

ROOT = Path(__file__).resolve().parents[2]
# the example of CONTRIBUTING.md: my_method.py, beside the profile
MY_METHOD = '''\
from dataclasses import dataclass
from typing import ClassVar

import clustr_core as cc
from clustr_core.attacks.losses import cross_entropy
from clustr_core.training.step import Terms


def jittered(recipe, step):
    labels, noise = step.mine(step.labels), step.images.clone().uniform_(-1, 1, generator=step.generator)
    return Terms(cross_entropy(step.logits(step.mine(step.images + recipe.jitter * noise)), labels))


@cc.register_recipe(objective=jittered)
@dataclass(frozen=True, kw_only=True)
class Jitter(cc.Recipe):
    """Cross-entropy on images with uniform noise."""

    method: ClassVar[str] = "jitter"
    jitter: float = 0.1
'''
PROFILE = """\
plugins: [my_method.py]
shared: {dataset: digits, width: 8, train_examples: 150}
methods:
  jitter: {epochs: 3, jitter: 1/8}
attacks:
  l2: {norm: l2, eps: [1/4, 0.5], steps: 3, examples: 16}
certified_examples: 16
"""


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book's root with a method of one's own beside its profile; what is registered is forgotten afterwards."""
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").write_text(PROFILE, encoding="utf-8")
    (tmp_path / "profiles/my_method.py").write_text(MY_METHOD, encoding="utf-8")
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten():
    """Methods and modules of a test are forgotten after it."""
    with patch.dict(METHODS):
        yield
    sys.modules.pop("my_method", None)


def test_the_example_is_short():
    assert len([line for line in MY_METHOD.splitlines() if line]) <= 20


def test_a_method_of_ones_own_goes_all_the_way(book, digits, monkeypatch):
    profile = load_profile("tiny")
    recipe = profile.recipes["jitter"]
    assert (type(recipe).__module__, recipe.jitter, recipe.epochs) == ("my_method", 1 / 8, 3)
    assert profile.ordinary == {"jitter": recipe}
    whole = fit(recipe, dataset=digits, folder=book / "whole", progress=False)

    def killed(current, state, *args):
        row = train_epoch(current, state, *args)
        if state.epoch == 1:
            raise KeyboardInterrupt
        return row

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, dataset=digits, progress=False)
    run = fit(recipe, dataset=digits, progress=False)
    assert run.path.name == run_key(recipe)
    assert run.weights_sha256 == whole.weights_sha256
    assert fit(recipe, dataset=digits, progress=False) == run == load_run(run.path)

    attacks = attacks_of(run, profile, dataset=digits)
    assert set(attacks["method"]) == {"jitter"}
    assert set(attacks["eps"]) == {0.25, 0.5}
    certificates = certificates_of(run, profile, dataset=digits)
    assert set(certificates["method"]) == {"jitter"}
    assert (certificates["radius"] >= 0).all()
    table = summary_table(attacks, certificates, eps=0.5, pixels=64, norm="l2")
    assert table[["method", "column"]].to_numpy().tolist() == [["jitter", "clean"], ["jitter", "correct"]]
    axes = Figure().subplots()
    draw_accuracy(axes, robust_accuracy(attacks), "eps", "robust_accuracy")
    assert axes.get_legend_handles_labels()[1] == ["jitter"]


def test_its_objective_is_what_it_trains_with(book, digits):
    recipe = load_profile("tiny").recipes["jitter"]
    plain = fit(CrossEntropy(width=8, train_examples=150, epochs=3), dataset=digits, progress=False)
    still = fit(replace(recipe, jitter=0.0), dataset=digits, progress=False)
    moved = fit(recipe, dataset=digits, progress=False)
    # the first epoch's batches are the same, whatever is drawn after them
    first = [run.history["loss"][0] for run in (plain, still, moved)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            lambda losses: Terms(losses.mean()),
            ValueError,
            r"own: loss: expected a loss for each of 64 examples, got \[\]",
        ),
        (
            lambda losses: Terms(losses[:3]),
            ValueError,
            r"own: loss: expected a loss for each of 64 examples, got \[3\]",
        ),
        (lambda losses: Terms(losses, losses[:3]), ValueError, r"own: magnet: .* each of 64 examples, got \[3\]"),
        (lambda losses: Terms(None), ValueError, "own: loss: expected a loss for each of 64 examples, got NoneType"),
        (lambda losses: Terms(losses.detach()), ValueError, "own: loss: expected one with a gradient, got one without"),
        (lambda losses: losses, TypeError, "own: expected Terms from its objective, got Tensor"),
        (lambda losses: None, TypeError, "own: expected Terms from its objective, got NoneType"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_an_objective_that_returns_something_else_is_named(book, digits, returned, error, message):
    @register_recipe(objective=lambda recipe, step: returned(cross_entropy(step.logits(step.images), step.labels)))
    @dataclass(frozen=True, kw_only=True)
    class Own(Recipe):
        method: ClassVar[str] = "own"

    with pytest.raises(error, match=message):
        fit(Own(width=8, train_examples=150), dataset=digits, progress=False)


def test_a_run_of_another_text_of_the_module_is_told(book, digits, caplog):
    recipe = load_profile("tiny").recipes["jitter"]
    fit(recipe, dataset=digits, progress=False)
    fit(recipe, dataset=digits, progress=False)
    assert "another text" not in caplog.text
    path = book / "profiles/my_method.py"
    path.write_text(MY_METHOD.replace("recipe.jitter * noise", "recipe.jitter * noise / 2"), encoding="utf-8")
    fit(recipe, dataset=digits, progress=False)
    assert "trained by another text of the module my_method than the one here" in caplog.text


def test_the_shell_trains_it(book):
    command = [sys.executable, "-m", "clustr_core.cli", "train", "--profile", "tiny", "--method", "jitter"]
    environment = {"CLUSTR_HOME": str(book), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=book, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "jitter" in done.stdout
    assert json.loads(next((book / "runs").glob("*/run.json")).read_text(encoding="utf-8"))["module"] == "my_method"


def test_a_run_says_which_module_registers_its_method(book, digits):
    run = fit(load_profile("tiny").recipes["jitter"], dataset=digits, progress=False)
    del METHODS["jitter"]
    with pytest.raises(ValueError, match=r"run\.json: method: expected one of .* got 'jitter'; import my_method,"):
        load_run(run.path)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("[no_such_module]", r"tiny\.yaml: plugins: expected modules that can be imported, got 'no_such_module'"),
        (
            "[json.py]",
            r"plugins: expected modules .* got 'json.py' \(expected another file name, since a module",
        ),
        ("[gone.py]", r"plugins: expected modules that can be imported, got 'gone.py'"),
        ("my_method.py", r"plugins: expected a list, got 'my_method\.py'"),
    ],
)
def test_plugins_that_cannot_be_imported_are_named(book, plugins, message):
    (book / "profiles/tiny.yaml").write_text(f"plugins: {plugins}", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_profile("tiny")


def test_a_method_that_nobody_registers_is_unknown(book):
    text = PROFILE.replace("plugins: [my_method.py]\n", "")
    (book / "profiles/tiny.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown method 'jitter', expected some of .* a module under plugins"):
        load_profile("tiny")


# what its class must be


def plain(recipe, step):
    """Cross-entropy."""
    return Terms(cross_entropy(step.logits(step.mine(step.images)), step.mine(step.labels)))


def test_a_recipe_that_is_not_registered_is_refused_before_any_work(digits, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Unknown(Recipe):
        method: ClassVar[str] = "unknown"

    @dataclass(frozen=True, kw_only=True)
    class Impostor(CrossEntropy):
        extra: float = 1.0

    for recipe in (Unknown(), Impostor(), Recipe(), CrossEntropy(warm_start=Unknown())):
        with pytest.raises(ValueError, match=r"recipe: expected one of a registered method, got .*@register_recipe"):
            fit(recipe, dataset=digits, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_what_a_method_of_ones_own_needs_it_says_in_class_variables(digits, tmp_path):
    """Batches of clusters and a lasting perturbation, without a word of ours being derived from."""

    def magnet(recipe, step):
        found = step.magnet(step.embed(step.mine(step.images)), recipe.gap)
        return Terms(found, found)

    @register_recipe(objective=magnet)
    @dataclass(frozen=True, kw_only=True)
    class Own(Recipe):
        method: ClassVar[str] = "own"
        clustered: ClassVar[bool] = True
        cluster_batches: ClassVar[bool] = True
        persistent_perturbation: ClassVar[bool] = True
        clusters_per_batch: int = 12
        per_cluster: int = 4
        gap: float = 9.0
        eps: float = 0.05
        step_size: float = 0.05
        replays: int = 2

    run = fit(Own(width=8, train_examples=150, epochs=2), dataset=digits, folder=tmp_path / "run", progress=False)
    assert list(run.history) == ["epoch", "loss", "learning_rate", "magnet", "variance", "coverage"]
    assert type(run.model()).__name__ == "ClusterClassifier"
    assert 0 < load_file(run.path / "checkpoint.safetensors")["perturbation"].abs().max() <= 0.05 + 1e-7


def test_a_version_of_ones_own_is_part_of_the_name():
    def named(version):
        @register_recipe(objective=plain)
        @dataclass(frozen=True, kw_only=True)
        class Own(Recipe):
            method: ClassVar[str] = "own"

        Own.version = version
        return run_key(Own()), run_key(CrossEntropy(warm_start=Own()))

    names = [named(version) for version in (1, 2, 3)]
    assert len({first for first, _ in names}) == len({second for _, second in names}) == 3
    assert recipe_from_dict({"method": "own"}).method == "own"


def test_a_precisions_version_is_part_of_the_name(monkeypatch):
    recipes = [CrossEntropy(precision=precision) for precision in ("32-true", "tf32", "bf16-mixed")]
    recipes.append(CrossEntropy(warm_start=recipes[-1]))
    before = [run_key(recipe) for recipe in recipes]
    monkeypatch.setitem(PRECISION_VERSIONS, "bf16-mixed", 99)
    assert [key == run_key(recipe) for key, recipe in zip(before, recipes, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("version", ["2", 2.0, None, 0, -1, True])
def test_a_version_is_a_count(version):
    @dataclass(frozen=True, kw_only=True)
    class Own(Recipe):
        method: ClassVar[str] = "own-version"

    Own.version = version
    with pytest.raises(ValueError, match=r"Own\.version: expected an integer above 0, got "):
        register_recipe(objective=plain)(Own)


def test_what_a_registered_class_lacks_is_named():
    register = register_recipe(objective=plain)

    class Undecorated(Recipe):
        method: ClassVar[str] = "mine"
        extra: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Nameless(Recipe):
        extra: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Spaced(Recipe):
        method: ClassVar[str] = "My method"

    @dataclass(frozen=True, kw_only=True)
    class Taken(Recipe):
        method: ClassVar[str] = "ce"

    @dataclass(frozen=True, kw_only=True)
    class Inherited(Clustr):
        extra: float = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Required(Recipe):
        method: ClassVar[str] = "mine"
        extra: float

    @dataclass(frozen=True, kw_only=True)
    class Unspeakable(Recipe):
        method: ClassVar[str] = "mine"
        extra: object = Path("x")

    @dataclass(frozen=True, kw_only=True)
    class Listed(Recipe):
        method: ClassVar[str] = "mine"
        extra: dict | tuple = (1, (2, 3))

    @dataclass(frozen=True, kw_only=True)
    class Worded(Recipe):
        method: ClassVar[str] = "mine"
        extra: "float" = 1.0

    @dataclass(frozen=True, kw_only=True)
    class Incapable(Recipe):
        method: ClassVar[str] = "mine"
        persistent_perturbation: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Derived(Recipe):
        method: ClassVar[str] = "mine-clusters"

    @dataclass(frozen=True, kw_only=True)
    class Prototypes(Recipe):
        method: ClassVar[str] = "prototypes"

    @dataclass(frozen=True, kw_only=True)
    class Misspelt(Recipe):
        method: ClassVar[str] = "mine"
        guarantee: ClassVar = "Lipschitz"

    @dataclass(frozen=True, kw_only=True)
    class Smoothed(Recipe):
        method: ClassVar[str] = "mine"
        guarantee: ClassVar = "smoothing"

    for kind, message in (
        (Derived, r"Derived\.method: expected a free name, got 'mine-clusters', which tables use for other rows"),
        (Prototypes, r"Prototypes\.method: expected a free name, got 'prototypes', which tables use for other rows"),
        (Misspelt, r"Misspelt\.guarantee: expected one of \('none', 'lipschitz', 'smoothing'\), got 'Lipschitz'"),
        (Smoothed, r"Smoothed\.guarantee: expected smoothing of a class that derives from Smoothing, and of no other"),
        (Undecorated, r"Undecorated: expected a dataclass\(frozen=True, kw_only=True\)"),
        (Nameless, r"Nameless\.method: expected a name of its own such as 'my-method', got None"),
        (Spaced, r"Spaced\.method: .* got 'My method'"),
        (Taken, r"Taken\.method: expected a free name, got 'ce', which is CrossEntropy's"),
        (Inherited, r"Inherited\.method: expected a name of its own"),
        (Required, r"Required: expected defaults that JSON can hold \(.*extra"),
        (Unspeakable, r"Unspeakable: expected defaults that JSON can hold"),
        (Listed, r"Listed: expected fields that are read back as they were"),
        (Worded, r"Worded: expected types, got text for \['extra'\]"),
        (Incapable, r"Incapable: expected the fields \['eps', 'replays', 'step_size'\], which persistent_perturb"),
    ):
        with pytest.raises(ValueError, match=message):
            register(kind)
    assert "mine" not in METHODS


def test_contributing_shows_this_method_in_at_most_twenty_lines():
    assert len([line for line in MY_METHOD.splitlines() if line]) <= 20
    assert f"```python\n{MY_METHOD}```" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
