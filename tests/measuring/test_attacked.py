"""Measurements of runs: one row an example, done once, and going on where they were interrupted."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from clustr_core import data
from clustr_core.attacks.autoattack import autoattack, square
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.paper import ScoreModel, paper_pgd
from clustr_core.attacks.temperature import rescaled
from clustr_core.attacks.transfer import transfer
from clustr_core.certificates.ladder import certified_radius
from clustr_core.certificates.linear import margin_radius
from clustr_core.certificates.lipschitz import lipschitz_upper_bound
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.certificates.prototypes import pixel_prototype_rows
from clustr_core.certificates.rounding import embedding_error
from clustr_core.certificates.smoothing import certify_smoothed
from clustr_core.measuring import attacked as attacked_module
from clustr_core.measuring import certified as certified_module
from clustr_core.measuring import pieces as pieces_module
from clustr_core.measuring import sandwiched as sandwiched_module
from clustr_core.measuring import targets as targets_module
from clustr_core.measuring.accuracy import best_bound, broken_certificates, robust_accuracy
from clustr_core.measuring.attacked import attack_table, attacks_of, run_attack
from clustr_core.measuring.certified import (
    certificate_rows,
    certificate_table,
    certificates_of,
    prototype_certificates,
)
from clustr_core.measuring.counterexamples import CertificateBroken, load_counterexample
from clustr_core.measuring.pieces import fill_cache, some_test_images
from clustr_core.measuring.profile import Profile, Protocol, SandwichBudget, SmoothingBudget
from clustr_core.measuring.sandwich import measure_sandwich
from clustr_core.measuring.sandwiched import sandwich_of, sandwich_table
from clustr_core.measuring.targets import AttackTarget, heads_of, target_of
from clustr_core.measuring.versions import VERSIONS
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.embed import embed_all
from clustr_core.storage.files import digest, read_json, seal_of, write_json
from clustr_core.training.loop import fit
from clustr_core.training.recipes import (
    AdversarialTraining,
    ClustrCert,
    ClustrLip,
    CrossEntropy,
    LipschitzMargin,
    Smoothing,
)
from clustr_core.training.run import load_run

PROTOCOL = Protocol(eps=(0.05, 0.3), steps=4, restarts=2, examples=40)
COLUMNS = [
    "attack", "norm", "eps", "loss", "steps", "restarts", "index", "label", "prediction", "correct",
    "adversarial_prediction", "robust", "gradients",
]  # fmt: skip
ROW = ["bound", "index", "label", "prediction", "correct"]
KINDS = {
    "pgd": PROTOCOL,
    "pgd, l2": Protocol(norm="l2", eps=(0.5, 1.0), steps=4, examples=40, losses=("dlr", "ce")),
    "paper": Protocol(attack="paper", eps=(0.05, 0.2), steps=4, restarts=3, examples=40),
    "cell-walk": Protocol(attack="cell-walk", eps=(0.05, 0.2), steps=4, restarts=2, examples=40),
    "transfer": Protocol(attack="transfer", eps=(0.05, 0.3), steps=4, examples=40, source="clustr"),
    "square": Protocol(attack="square", eps=(0.05, 0.3), steps=20, examples=40),
    "autoattack": Protocol(attack="autoattack", eps=(0.3,), examples=3),
}


def small_pieces(monkeypatch, size):
    """So many images at one time."""
    monkeypatch.setattr(pieces_module, "CHUNK", size)


@pytest.fixture(params=["ce", "clustr"])
def run(request, runs):
    """A run that has not been measured yet."""
    return unmeasured(runs[request.param])


def unmeasured(run):
    shutil.rmtree(run.path / "tables", ignore_errors=True)
    return run


@pytest.fixture
def measure(digits):
    """`attack_table` on digits, without a bar."""

    def table(run, protocol=PROTOCOL, **options):
        return attack_table(run, protocol, dataset=digits, progress=False, **options)

    return table


@pytest.fixture
def attacked(monkeypatch):
    """What was attacked: one entry for each call, (attack, eps, loss, images)."""
    made = []

    def counted(model, images, labels, protocol, *, eps, loss, **options):
        made.append((protocol.attack, eps, loss, [image.numpy().tobytes() for image in images]))
        return real(model, images, labels, protocol, eps=eps, loss=loss, **options)

    real = run_attack
    monkeypatch.setattr(attacked_module, "run_attack", counted)
    return made


def calls(attacked):
    """Each call as (eps, loss, number of images)."""
    return [(eps, loss, len(images)) for _, eps, loss, images in attacked]


def single(attacked):
    """Each image of each call, with what it was attacked by: none may occur twice."""
    return [(attack, eps, loss, image) for attack, eps, loss, images in attacked for image in images]


def tables(run):
    return {path: path.stat().st_mtime_ns for path in (run.path / "tables").iterdir()}


def expected_result(run, source, protocol, images, labels, sample, eps, loss):
    """The same attack, called directly."""
    model, step = run.model(), 2.5 * eps / protocol.steps
    size = {"eps": eps, "step_size": step, "steps": protocol.steps}
    cooled = rescaled(model, sample)
    match protocol.attack:
        case "pgd":
            return pgd(cooled, images, labels, **size, restarts=protocol.restarts, loss=loss, norm=protocol.norm)
        case "paper":
            surface = ScoreModel(model) if run.recipe.method == "clustr" else model
            return paper_pgd(surface, images, labels, eps=eps, steps=4, restarts=3)
        case "cell-walk":
            return cell_walk(model, images, labels, **size, rivals=2)
        case "transfer":
            return transfer(source.model(), model, images, labels, **size, loss="margin")
        case "square":
            return square(cooled, images, labels, norm="linf", eps=eps, queries=20)
        case "autoattack":
            return autoattack(cooled, images, labels, norm="linf", eps=eps)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_attack(kind, run, runs, measure, digits):
    protocol = KINDS[kind]
    # from the other model
    source = runs["clustr" if run.recipe.method == "ce" else "ce"] if kind == "transfer" else None
    table = measure(run, protocol, source=source)
    assert list(table) == COLUMNS
    assert len(table) == len(protocol.eps) * len(protocol.climbed) * protocol.examples
    assert table["attack"].unique().tolist() == [protocol.attack]
    assert table["norm"].unique().tolist() == [protocol.norm]
    assert table["loss"].unique().tolist() == sorted(protocol.climbed)
    expected = (0, 0) if kind == "autoattack" else (protocol.steps, protocol.restarts)
    assert (table["steps"].unique().tolist(), table["restarts"].unique().tolist()) == ([expected[0]], [expected[1]])
    order = torch.randperm(len(digits.test_labels), generator=torch.Generator().manual_seed(0))
    sample = data.to_float(digits.test_images[order[:128]])
    for (eps, loss), rows in table.groupby(["eps", "loss"]):
        where = order[: protocol.examples]
        images, labels = data.to_float(digits.test_images[where]), digits.test_labels[where]
        result = expected_result(run, source, protocol, images, labels, sample, eps, loss)
        with torch.no_grad():
            before, after = run.model()(images).argmax(dim=1), run.model()(result.adversarial).argmax(dim=1)
        plain = pd.DataFrame(
            {
                "index": where,
                "label": labels,
                "prediction": before,
                "correct": before == labels,
                "adversarial_prediction": after,
                "robust": ~result.success,
                "gradients": result.gradients,
            }
        ).sort_values("index", ignore_index=True)
        pd.testing.assert_frame_equal(rows[plain.columns].reset_index(drop=True), plain)
    if kind != "paper":
        assert (table["robust"] == (table["adversarial_prediction"] == table["label"])).all()
        assert not (table["robust"] & ~table["correct"]).any()
        assert (table.loc[~table["correct"], "gradients"] == 0).all()
        accuracy = robust_accuracy(table)["robust_accuracy"]
        assert (accuracy.diff().dropna() <= 0).all()
    if kind == "square":
        assert (table["gradients"] == 0).all()
    elif kind not in ("autoattack", "paper"):
        most = protocol.steps * protocol.restarts
        assert table["gradients"].max() == most
        assert (table.loc[table["robust"] & table["correct"], "gradients"] == most).all()


def test_transfer_needs_a_source(runs, measure):
    with pytest.raises(ValueError, match="source: expected a model to transfer from, got none"):
        measure(unmeasured(runs["ce"]), KINDS["transfer"])
    assert not (runs["ce"].path / "tables").exists() or not tables(runs["ce"])


# chunks


@pytest.fixture
def small_chunks(monkeypatch):
    small_pieces(monkeypatch, 16)


def test_a_second_call_attacks_nothing_and_loads_no_model(run, measure, attacked, small_chunks, monkeypatch):
    first = measure(run)
    before = tables(run)
    assert calls(attacked) == [(eps, loss, n) for eps in (0.05, 0.3) for loss in ("ce", "margin") for n in (16, 16, 8)]
    assert len(set(single(attacked))) == len(single(attacked)) == 160
    assert len(before) == 12

    def forbidden(*args, **options):
        raise AssertionError("loaded again")

    monkeypatch.setattr(type(run), "model", forbidden)
    pd.testing.assert_frame_equal(measure(run), first)
    assert len(attacked) == 12
    assert tables(run) == before
    with pytest.raises(AssertionError, match="loaded again"):
        measure(run, replace(PROTOCOL, seed=1))


def test_a_model_is_loaded_once_for_all_chunks(run, measure, small_chunks, monkeypatch):
    loads = []
    real = type(run).model
    monkeypatch.setattr(type(run), "model", lambda self, *args: loads.append(1) or real(self, *args))
    measure(run)
    assert len(loads) == 1


@pytest.mark.parametrize("kind", ["pgd", "paper", "cell-walk", "transfer", "square"])
def test_an_interrupted_measurement_goes_on(kind, runs, measure, small_chunks, monkeypatch, attacked):
    run, source = unmeasured(runs["clustr"]), runs["ce"] if kind == "transfer" else None
    whole = 3 * len(KINDS[kind].eps) * len(KINDS[kind].climbed)

    def interrupted(*args, **options):
        if len(attacked) == 4:
            raise KeyboardInterrupt
        return counted(*args, **options)

    counted = attacked_module.run_attack
    with monkeypatch.context() as patch:
        patch.setattr(attacked_module, "run_attack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure(run, KINDS[kind], source=source)
    before = tables(run)
    assert len(before) == 4
    table = measure(run, KINDS[kind], source=source)
    assert len(attacked) == whole
    assert len(set(single(attacked))) == len(single(attacked))
    assert before.items() <= tables(run).items()
    pd.testing.assert_frame_equal(measure(unmeasured(run), KINDS[kind], source=source), table)


def test_more_images_or_another_grid_attack_only_what_is_new(runs, measure, small_chunks, attacked):
    run, protocol = unmeasured(runs["ce"]), replace(PROTOCOL, examples=32, losses=("ce",))
    few = measure(run, protocol)
    assert calls(attacked) == [(0.05, "ce", 16)] * 2 + [(0.3, "ce", 16)] * 2
    more = measure(run, replace(protocol, examples=48, eps=(0.05, 0.1, 0.3)))
    assert calls(attacked)[4:] == [(0.05, "ce", 16), *[(0.1, "ce", 16)] * 3, (0.3, "ce", 16)]
    assert len(set(single(attacked))) == len(single(attacked))
    kept = more[more["eps"].isin(few["eps"]) & more["index"].isin(few["index"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, few)
    losses = measure(run, replace(protocol, losses=("ce", "dlr")))
    assert calls(attacked)[9:] == [(0.05, "dlr", 16)] * 2 + [(0.3, "dlr", 16)] * 2
    assert losses["loss"].unique().tolist() == ["ce", "dlr"]


def test_the_rows_of_an_image_come_once_and_in_order(runs, measure, small_chunks):
    table = measure(unmeasured(runs["ce"]))
    assert not table.duplicated(["eps", "loss", "index"]).any()
    pd.testing.assert_frame_equal(table.sort_values(["eps", "loss", "index"], ignore_index=True), table)


def test_chunks_change_nothing_of_a_clean_image(runs, measure, monkeypatch):
    protocol, clean = replace(PROTOCOL, eps=(0.05,), losses=("ce",)), ["index", "label", "prediction", "correct"]
    whole = measure(unmeasured(runs["ce"]), protocol)
    small_pieces(monkeypatch, 16)
    pd.testing.assert_frame_equal(measure(unmeasured(runs["ce"]), protocol)[clean], whole[clean])


# what a measurement is a measurement of

CHANGES = [
    {"steps": 3}, {"restarts": 1}, {"step_size": 0.01}, {"seed": 1}, {"norm": "l2"}, {"losses": ("dlr",)},
    {"eps": (0.06,)}, {"attack": "transfer"}, {"attack": "cell-walk"}, {"attack": "paper"}, {"attack": "square"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_any_other_protocol_is_another_measurement(runs, measure, attacked, changes):
    run, protocol = unmeasured(runs["ce"]), replace(PROTOCOL, examples=10, losses=("ce",), eps=(0.05,))
    if changes.get("attack") in ("cell-walk", "square"):
        changes = changes | {"losses": ()}
    measure(run, protocol)
    measure(run, replace(protocol, **changes), source=runs["clustr"])
    assert len(attacked) == len(tables(run)) == 2
    measure(run, protocol)
    assert len(attacked) == 2


def test_what_a_protocol_leaves_open_does_not_name_the_file(runs, measure, attacked):
    run, protocol = unmeasured(runs["ce"]), Protocol(eps=(0.1,), steps=5, examples=10, losses=("ce",))
    measure(run, protocol)
    # the same step, written out; another source, which plain PGD does not have; a grid of which this is a part
    measure(run, replace(protocol, step_size=2.5 * 0.1 / 5))
    measure(run, protocol, source=runs["clustr"])
    measure(run, replace(protocol, eps=(0.1, 0.2)))
    assert calls(attacked) == [(0.1, "ce", 10), (0.2, "ce", 10)]


def test_another_source_or_head_is_another_measurement(runs, measure, attacked, digits, tmp_path):
    run, protocol = unmeasured(runs["ce"]), replace(KINDS["transfer"], examples=10, eps=(0.1,))
    third = fit(replace(run.recipe, epochs=1), dataset=digits, folder=tmp_path / "third", progress=False)
    for number, source in enumerate((runs["clustr"], third), start=1):
        measure(run, protocol, source=source)
        assert len(attacked) == len(tables(run)) == number
    measure(run, protocol, source=runs["clustr"])
    assert len(attacked) == 2
    measure(run, protocol, source=third, head="clusters")
    assert len(attacked) == len(tables(run)) == 3


def test_any_other_model_is_another_measurement(digits, tmp_path, attacked):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    protocol = Protocol(eps=(0.1,), steps=2, examples=10, losses=("ce",))
    loads = []

    def subject(identity):
        return AttackTarget("mine", lambda: loads.append(1) or network, identity, tmp_path, digits)

    for identity, count in (("a", 1), ("b", 2), ("a", 2)):
        attacked_module.measure(subject(identity), protocol, progress=False)
        assert len(attacked) == len(loads) == len(list(tmp_path.iterdir())) == count


def test_another_version_of_the_attacks_is_another_measurement(runs, measure, attacked, monkeypatch):
    run, protocol = unmeasured(runs["ce"]), Protocol(eps=(0.1,), steps=1, examples=2, losses=("ce",))
    measure(run, protocol)
    measure(run, protocol)
    assert len(attacked) == 1
    monkeypatch.setitem(VERSIONS, "attack", VERSIONS["attack"] + 1)
    measure(run, protocol)
    assert len(attacked) == 2


def test_other_weights_are_another_measurement(runs, measure, attacked, tmp_path):
    """Weights that changed under a run's name are refused; said to be the run's, they are measured anew."""
    protocol = Protocol(eps=(0.1,), steps=1, examples=2, losses=("ce",))
    copy = shutil.copytree(unmeasured(runs["ce"]).path, tmp_path / "copy")
    measure(load_run(copy), protocol)
    weights = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: expected the file of sha256 \w{10}, as run\.json says"):
        measure(load_run(copy), protocol)
    record = read_json(copy / "run.json") | {"weights_sha256": digest((copy / "model.safetensors").read_bytes())}
    del record["sha256"]
    write_json(copy / "run.json", record | {"sha256": seal_of(record)})
    measure(load_run(copy), protocol)
    assert len(attacked) == 2


def test_the_order_of_the_examples_is_the_same_for_all_and_grows(runs, digits):
    few, images, labels = some_test_images(runs["ce"], digits, 20)
    more, _, _ = some_test_images(runs["clustr"], digits, 60)
    every, _, _ = some_test_images(runs["clustr"], digits, None)
    assert set(few.tolist()) < set(more.tolist())
    assert few.tolist() == sorted(few.tolist())
    assert every.tolist() == list(range(len(digits.test_labels)))
    assert torch.equal(images, digits.test_images[few])
    assert torch.equal(labels, digits.test_labels[few])
    assert few.tolist() != list(range(20))


def test_rows_of_a_certificate(run, digits):
    table = certificate_table(run, examples=50, dataset=digits)
    assert list(table) == [*ROW, "feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"]
    by_bound = table.pivot(index="index", columns="bound", values="feature_radius")
    assert len(by_bound) == 50
    assert (by_bound["triangle"] <= by_bound["nearest"] + 1e-6).all()
    assert (by_bound["nearest"] <= by_bound["pairwise"] + 1e-6).all()
    assert (table["radius"] - table["feature_radius"] / table["lipschitz"]).abs().max() < 1e-7
    assert table["lipschitz"].nunique() == table["lipschitz_lower_bound"].nunique() == 1
    assert (table["lipschitz_lower_bound"] <= table["lipschitz"]).all()
    assert (table["lipschitz_lower_bound"] > 0).all()
    rows = table.query("bound == 'nearest'")
    where, model = rows["index"].tolist(), run.cluster_model()
    embeddings = embed_all(model.encoder, digits.test_images[where])
    expected = certified_radius(embeddings, model.clusters, bound="nearest", rule="soft", neighbours=20)
    assert rows["feature_radius"].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    assert (rows["correct"] == (rows["prediction"] == rows["label"])).all()


def test_a_certificate_is_computed_once(run, digits, monkeypatch):
    first = certificate_table(run, examples=20, dataset=digits)

    def forbidden(*args, **options):
        raise AssertionError("certified again")

    monkeypatch.setattr(certified_module, "certified_radius", forbidden)
    pd.testing.assert_frame_equal(certificate_table(run, examples=20, dataset=digits), first)
    with pytest.raises(AssertionError, match="certified again"):
        certificate_table(run, examples=21, dataset=digits)


# certificates that are meant to hold

CERTIFYING = ("clustr-lip", "clustr-cert", "clustr-cert, convolutions", "lip-linear")
SMOOTHING = SmoothingBudget(examples=12, samples=80, selection_samples=10, failure_prob=0.01)


@pytest.fixture(scope="module")
def certifying(tmp_path_factory, digits):
    """A run of each method that promises something, measured by nobody yet."""
    small = {"train_examples": 300, "learning_rate": 0.02, "schedule": "triangle", "epochs": 8}
    dense, deep = {"encoder": "lip-mlp", "width": 32}, {"encoder": "lip-cnn", "width": 16}
    made = {
        "clustr-lip": ClustrLip(per_cluster=4, **dense, **small),
        "clustr-cert": ClustrCert(margin=0.8, temperature=0.1, **dense, **small),
        "clustr-cert, convolutions": ClustrCert(per_class=1, **deep, **small | {"epochs": 3}),
        "lip-linear": LipschitzMargin(margin=0.8, temperature=0.1, **dense, **small),
        "smoothing": Smoothing(noise=0.25, width=4, **small),
    }
    home = tmp_path_factory.mktemp("certifying")
    return {name: fit(r, dataset=digits, folder=home / name, progress=False) for name, r in made.items()}


@pytest.mark.parametrize("name", CERTIFYING)
def test_rows_of_a_certificate_that_is_meant_to_hold(name, certifying, digits):
    """In float64, less all rounding, and by every bound that the model's rule allows."""
    run = certifying[name]
    table = certificate_table(run, examples=40, dataset=digits)
    assert list(table) == [*ROW, "feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"]
    bounds = ["margin"] if name == "lip-linear" else list(HARD_BOUNDS)
    assert table["bound"].unique().tolist() == bounds
    where, pixels, labels = some_test_images(run, digits, 40)
    model = run.model().double()
    images = data.to_float(pixels).double()
    with torch.no_grad():
        embeddings, predicted = model.embed(images), model(images).argmax(dim=1)
    upper = lipschitz_upper_bound(model.encoder, (1, 8, 8))
    error = embedding_error(model.encoder, (1, 8, 8))
    assert 0 < error < 1e-8
    for bound in bounds:
        rows = table.query("bound == @bound")
        assert rows["index"].tolist() == where.tolist()
        assert rows["label"].tolist() == labels.tolist()
        assert rows["prediction"].tolist() == predicted.tolist()
        assert rows["correct"].tolist() == (predicted == labels).tolist()
        if bound == "margin":
            expected = margin_radius(embeddings, model.linear, embedding_error=error)
        else:
            options = {"bound": bound, "rule": "nearest", "embedding_error": error}
            expected = certified_radius(embeddings, model.clusters, **options)
        assert rows["feature_radius"].tolist() == pytest.approx(expected.tolist(), rel=1e-8, abs=1e-9)
        assert rows["radius"].tolist() == pytest.approx((expected / upper).tolist(), rel=1e-8, abs=1e-9)
    # tables hold nine digits or so
    assert table["lipschitz"].tolist() == pytest.approx([upper] * len(table), rel=1e-8)
    assert 0.99 < upper < 1 + 1e-5
    assert (table["lipschitz_lower_bound"] > 0.1).all()
    assert (table["lipschitz_lower_bound"] <= table["lipschitz"] + 1e-6).all()
    assert (table["radius"] > 0).mean() > 0.9
    ladder = table.pivot(index="index", columns="bound", values="radius")
    for lower, higher in pairwise(bounds):
        assert (ladder[lower] <= ladder[higher] + 1e-9).all()
        # one cluster a class leaves one bisector to each rival; two may all but coincide
        several = name == "clustr-lip" or lower == "triangle"
        assert not several or (ladder[lower] < ladder[higher] - 1e-6).any()


@pytest.mark.parametrize("name", [*CERTIFYING, "clustr", "smoothing"])
def test_an_interrupted_certificate_goes_on_and_more_images_certify_only_what_is_new(
    name, certifying, runs, digits, small_chunks, monkeypatch
):
    run = unmeasured(certifying[name] if name in certifying else runs[name])
    budget, chunks = replace(SMOOTHING, samples=20, selection_samples=5), []

    def certified(count):
        return certificate_table(run, examples=count, smoothing=replace(budget, examples=count), dataset=digits)

    kind = "_smoothing_rows" if name == "smoothing" else "certificate_rows"
    real = getattr(certified_module, kind)

    def rows(*arguments):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(arguments[-1])
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(certified_module, kind, rows)
        with pytest.raises(KeyboardInterrupt):
            certified(40)
    before = tables(run)
    assert len(before) == 2
    table = certified(40)
    assert before.items() <= tables(run).items()
    assert len(tables(run)) == 3
    assert sorted(set(table["index"])) == some_test_images(run, digits, 40)[0].tolist()
    assert not table.duplicated(["bound", "index"]).any()
    before = tables(run)
    # the chunk of 8 is another now, of 16; two of 16 and one of 12 more
    more = certified(60)
    assert before.items() <= tables(run).items()
    assert len(tables(run)) == 5
    kept = more[more["index"].isin(table["index"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, table, check_exact=False, rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(certified(40), table)


def test_a_certificate_embeds_each_image_once_and_computes_its_constants_once(
    certifying, digits, small_chunks, monkeypatch
):
    run, made = unmeasured(certifying["clustr-cert"]), []
    for name in ("lipschitz_upper_bound", "lipschitz_lower_bound", "embedding_error"):
        real = getattr(certified_module, name)

        def noted(encoder, given, real=real, name=name):
            made.append((name, given.dtype if isinstance(given, torch.Tensor) else None))
            return real(encoder, given)

        monkeypatch.setattr(certified_module, name, noted)
    real_embed, passes = ClusterClassifier.embed, []
    monkeypatch.setattr(ClusterClassifier, "embed", lambda self, x: passes.append(len(x)) or real_embed(self, x))
    certificate_table(run, examples=40, dataset=digits)
    assert passes == [16, 16, 8]
    assert sorted(made, key=str) == [
        ("embedding_error", None),
        # in the precision of all else
        ("lipschitz_lower_bound", torch.float64),
        ("lipschitz_upper_bound", None),
    ]


@pytest.mark.parametrize("share", [(0, 2), (3, 2), (1, 0)])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=f"share: expected i of n with i in 1..n, got {share[0]} of {share[1]}"):
        fill_cache([], share=share)


@pytest.mark.parametrize("name", CERTIFYING)
def test_no_attack_succeeds_where_an_image_is_certified(name, certifying, digits):
    run = certifying[name]
    protocols = [
        Protocol(norm="l2", eps=(0.1, 0.25, 0.5), steps=10, examples=60, losses=("ce", "margin")),
        Protocol(norm="linf", eps=(0.02, 0.05), steps=10, examples=60, losses=("margin",)),
    ]
    method = run.recipe.method
    attacked = [attack_table(run, each, dataset=digits, progress=False).assign(method=method) for each in protocols]
    certificates = certificate_table(run, examples=60, dataset=digits).assign(method=method)
    rows = pd.concat(attacked)
    assert broken_certificates(rows, certificates, pixels=64).empty
    # both had their say: some images fall, and of some it was certified that they would not
    assert (rows["correct"] & ~rows["robust"]).any()
    assert (best_bound(certificates)["radius"] >= 0.25).any()
    # twice the radius would have been believed too much
    twice = certificates.assign(radius=4 * certificates["radius"])
    assert not broken_certificates(rows, twice, pixels=64).empty


def test_rows_of_randomised_smoothing(certifying, digits):
    run = certifying["smoothing"]
    table = certificate_table(run, examples=99, smoothing=SMOOTHING, dataset=digits)
    assert list(table) == [*ROW, "feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"]
    assert table["bound"].tolist() == ["smoothing"] * 12
    where, images, labels = some_test_images(run, digits, 12)
    found = certify_smoothed(
        run.model(), data.to_float(images), indices=where, noise=0.25, samples=80, selection_samples=10,
        failure_prob=0.01,
    )  # fmt: skip
    assert table["index"].tolist() == where.tolist()
    assert table["label"].tolist() == labels.tolist()
    assert table["prediction"].tolist() == found.predictions.tolist()
    assert table["correct"].tolist() == (found.predictions == labels).tolist()
    assert table["radius"].tolist() == pytest.approx(found.radius.tolist(), abs=1e-8)
    assert table["feature_radius"].tolist() == table["radius"].tolist()
    assert table[["lipschitz", "lipschitz_lower_bound"]].isna().all(axis=None)
    abstained = table["prediction"] == -1
    assert abstained.any()
    assert not abstained.all()
    assert (table.loc[abstained, "radius"] == 0).all()
    assert not table.loc[abstained, "correct"].any()


def test_smoothing_without_a_budget_is_refused(certifying, digits):
    run = unmeasured(certifying["smoothing"])
    with pytest.raises(ValueError, match="smoothing: expected a budget in the profile for smoothing, got none"):
        certificate_table(run, dataset=digits)
    assert not (run.path / "tables").exists()


def test_another_smoothing_budget_is_another_measurement(certifying, digits, monkeypatch):
    run, made = unmeasured(certifying["smoothing"]), []
    real = certify_smoothed
    monkeypatch.setattr(certified_module, "certify_smoothed", lambda *a, **o: made.append(o) or real(*a, **o))
    few = replace(SMOOTHING, examples=2)
    first = certificate_table(run, smoothing=few, dataset=digits)
    pd.testing.assert_frame_equal(certificate_table(run, smoothing=few, dataset=digits), first)
    for count, changes in enumerate(({"samples": 40}, {"failure_prob": 0.1}, {"selection_samples": 5}), start=2):
        certificate_table(run, smoothing=replace(few, **changes), dataset=digits)
        assert len(made) == count


def test_certificates_of_a_profile_go_by_its_budgets(certifying, digits):
    profile = Profile("tiny", {}, {}, certified_examples=7, smoothing=SMOOTHING)
    for name, rows in (("clustr-cert", 4 * 7), ("lip-linear", 7), ("smoothing", 12)):
        table = certificates_of(certifying[name], profile, dataset=digits)
        assert list(table)[:2] == ["method", "bound"]
        assert table["method"].tolist() == [name] * rows
    assert heads_of(certifying["lip-linear"]) == heads_of(certifying["clustr-cert"]) == ("own",)


def test_prototypes_are_certified_without_a_run(digits, runs):
    profile = Profile("tiny", {"clustr": replace(runs["clustr"].recipe, per_class=3)}, {}, certified_examples=20)
    table = prototype_certificates(profile, digits)
    assert table["method"].unique().tolist() == ["prototypes"]
    where = some_test_images(runs["ce"], digits, 20)[0]
    expected = pixel_prototype_rows(digits, per_class=3, indices=where)
    pd.testing.assert_frame_equal(table.drop(columns="method"), expected)
    # the columns, the order and the images of every other certificate
    other = certificates_of(runs["clustr"], profile, dataset=digits)
    assert list(table) == list(other)
    assert table["index"].unique().tolist() == other["index"].unique().tolist()
    every = prototype_certificates(replace(profile, certified_examples=None), digits)
    assert every["index"].nunique() == len(digits.test_labels)


# the sandwich

BUDGET = SandwichBudget(examples=8, steps=15, restarts=2, points=20, apgd_eps=(0.5,))


@pytest.mark.parametrize("name", CERTIFYING)
def test_rows_of_a_sandwich(name, certifying, digits):
    run = certifying[name]
    budget = BUDGET if name == "clustr-cert" else replace(BUDGET, apgd_eps=())
    table = sandwich_table(run, budget, dataset=digits)
    assert list(table) == ["attack", "index", "label", "correct", "radius", "norm", "gradients"]
    tried = ["fmn", "ddn", *(["apgd"] if budget.apgd_eps else []), "pgd", "random"]
    where, _, labels = some_test_images(run, digits, 8)
    assert table["attack"].tolist() == [attack for attack in tried for _ in range(8)]
    assert table["index"].tolist() == where.tolist() * len(tried)
    assert table["label"].tolist() == labels.tolist() * len(tried)
    # what is certified is the best bound, for the images of the certificate
    certificates = best_bound(certificate_table(run, examples=8, dataset=digits).assign(method=name))
    correct = torch.tensor(certificates["correct"].tolist())
    radii = torch.tensor(certificates["radius"].tolist()) * correct
    for _, rows in table.groupby("attack"):
        assert rows["correct"].tolist() == correct.tolist()
        assert rows["radius"].tolist() == pytest.approx(radii.tolist(), rel=1e-6, abs=1e-8)
    right = table[table["correct"]]
    assert (right["norm"] >= right["radius"] - 1e-5).all()
    found = right[right["attack"].isin(["fmn", "ddn"])]
    assert found["norm"].map(math.isfinite).mean() > 0.9
    assert not (run.path / "counterexamples").exists()


def test_a_sandwich_is_measured_once_for_each_budget(certifying, digits, monkeypatch):
    run, made = unmeasured(certifying["lip-linear"]), []
    real = measure_sandwich
    monkeypatch.setattr(sandwiched_module, "measure_sandwich", lambda *a, **o: made.append(1) or real(*a, **o))
    budget = SandwichBudget(examples=4, steps=2, points=2)
    first = sandwich_table(run, budget, dataset=digits)
    pd.testing.assert_frame_equal(sandwich_table(run, budget, dataset=digits), first)
    assert len(made) == 1
    for count, changes in enumerate(({"steps": 3}, {"restarts": 2}, {"points": 3}, {"examples": 5}), start=2):
        sandwich_table(run, replace(budget, **changes), dataset=digits)
        assert len(made) == count
    # in chunks, each of its own images
    small_pieces(monkeypatch, 2)
    pieces = sandwich_table(run, replace(budget, steps=4), dataset=digits)
    assert len(made) == 5 + 2
    assert sorted(set(pieces["index"])) == sorted(set(first["index"]))
    assert len(pieces) == len(first)


def test_a_certificate_that_is_broken_is_kept_and_no_table_is_written(certifying, digits, monkeypatch):
    run = unmeasured(certifying["clustr-cert"])
    real = certificate_rows
    monkeypatch.setattr(
        certified_module, "certificate_rows", lambda *a: real(*a).assign(radius=lambda t: 3 * t["radius"])
    )
    with pytest.raises(CertificateBroken, match=r"counterexample-\w+-\d+\.safetensors"):
        sandwich_table(run, replace(BUDGET, apgd_eps=()), dataset=digits)
    (kept,) = (run.path / "counterexamples").iterdir()
    found = load_counterexample(kept)
    assert found.norm < found.radius
    assert torch.equal(found.image, data.to_float(digits.test_images[found.index][None])[0])
    assert found.label == digits.test_labels[found.index]
    with torch.no_grad():
        assert run.model()(found.adversarial[None]).argmax() != found.label
    assert not list(run.path.glob("tables/sandwich-*"))
    shutil.rmtree(run.path / "counterexamples")
    unmeasured(run)


def test_what_has_no_sandwich(certifying, runs, digits):
    for run in (*runs.values(), certifying["smoothing"]):
        method = run.recipe.method
        with pytest.raises(ValueError, match=f"run: expected a method on a 1-Lipschitz encoder, got {method}"):
            sandwich_table(run, BUDGET, dataset=digits)
    with pytest.raises(ValueError, match="profile tiny: expected an entry sandwich, got none"):
        sandwich_of(certifying["clustr-cert"], tiny(), dataset=digits)


def test_a_sandwich_of_a_profile_begins_with_the_method(certifying, digits):
    budget = SandwichBudget(examples=3, steps=2, points=2)
    table = sandwich_of(certifying["clustr-cert"], replace(tiny(), sandwich=budget), dataset=digits)
    assert list(table)[:3] == ["method", "attack", "index"]
    assert table["method"].tolist() == ["clustr-cert"] * 12


# the attacks of a profile


def tiny(**protocols):
    return Profile("tiny", {}, protocols, certified_examples=15)


def test_tables_of_a_profile_begin_with_the_method(run, digits):
    l2 = Protocol(norm="l2", eps=(0.5,), steps=2, examples=10, losses=("ce",))
    profile = tiny(linf=replace(l2, norm="linf"), l2=l2, walk=Protocol(attack="cell-walk", eps=(0.1,), examples=5))
    table = attacks_of(run, profile, dataset=digits, progress=False)
    method = run.recipe.method
    heads = ["ce", "ce-clusters"] if method == "ce" else ["clustr"]
    assert list(table) == ["method", *COLUMNS]
    assert table["method"].tolist() == [head for head in heads for _ in range(25)]
    assert table["norm"].tolist() == (["linf"] * 10 + ["l2"] * 10 + ["linf"] * 5) * len(heads)
    assert table["attack"].tolist() == (["pgd"] * 20 + ["cell-walk"] * 5) * len(heads)
    certified = certificates_of(run, profile, dataset=digits)
    assert certified.columns[0] == "method"
    assert len(certified) == 3 * 15


def test_cross_entropy_is_measured_with_clusters_as_well(runs, digits):
    run, protocol = unmeasured(runs["ce"]), Protocol(eps=(0.1,), steps=2, examples=40, losses=("margin",))
    table = attacks_of(run, tiny(linf=protocol), dataset=digits, progress=False)
    images = data.to_float(digits.test_images[table["index"][:40].tolist()])
    for name, model in (("ce", run.model()), ("ce-clusters", run.cluster_model())):
        rows = table[table["method"] == name]
        with torch.no_grad():
            assert rows["prediction"].tolist() == model(images).argmax(dim=1).tolist()
    plain = AdversarialTraining(epochs=1, width=4, train_examples=200)
    assert target_of(replace(run, recipe=plain), digits).name == "pgd-at"


def test_no_attack_is_transferred_from_a_model_to_itself(runs, digits, monkeypatch, attacked):
    shown = Protocol(eps=(0.1,), steps=1, examples=5, losses=("ce",))
    both = {"linf": shown, "transfer": replace(KINDS["transfer"], source="ce", eps=(0.1,), examples=5)}
    profile = Profile("tiny", {name: run.recipe for name, run in runs.items()}, both)
    folders = {run.recipe: run.path for run in runs.values()}
    monkeypatch.setattr(targets_module, "run_folder", folders.__getitem__)
    own = attacks_of(unmeasured(runs["ce"]), profile, dataset=digits, progress=False)
    assert own["attack"].unique().tolist() == ["pgd"]
    other = attacks_of(unmeasured(runs["clustr"]), profile, dataset=digits, progress=False)
    assert other["attack"].tolist() == ["pgd"] * 5 + ["transfer"] * 5
    # climbed was the source's model, and no other
    source = target_of(runs["ce"], digits)
    expected = attacked_module.measure(
        target_of(runs["clustr"], digits), both["transfer"], source=source, progress=False
    )
    pd.testing.assert_frame_equal(other[other["attack"] == "transfer"][COLUMNS].reset_index(drop=True), expected)
    assert source.identity == f"{runs['ce'].weights_sha256} own"


def test_a_source_that_was_never_trained_is_named(runs, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    profile = Profile("tiny", {"ce": CrossEntropy(epochs=3)}, {"transfer": replace(KINDS["transfer"], source="ce")})
    with pytest.raises(FileNotFoundError, match="folder: expected a finished run"):
        attacks_of(runs["clustr"], profile, dataset=digits, progress=False)


def test_a_profile_without_attacks_is_refused(runs):
    with pytest.raises(ValueError, match="profile bare: attacks: expected at least one on ce that is not"):
        attacks_of(runs["ce"], Profile("bare", {}, {}))


def test_a_method_that_is_only_transferred_from_has_no_table_of_attacks():
    recipes = {"ce": CrossEntropy(epochs=3), "other": CrossEntropy(epochs=4)}
    transfer = {"transfer": replace(KINDS["transfer"], source="ce")}
    assert Profile("tiny", recipes, transfer).measured["attacks"] == ["other"]
    assert Profile("tiny", recipes, transfer | {"linf": PROTOCOL}).measured["attacks"] == ["ce", "other"]


def test_a_changed_dataset_is_noticed(runs, digits):
    run, protocol = runs["ce"], Protocol(eps=(0.1,), steps=2, examples=10)
    fewer = replace(digits, test_images=digits.test_images[:20], test_labels=digits.test_labels[:20])
    every = replace(protocol, examples=None)
    assert len(attack_table(run, every, dataset=fewer, progress=False)) == 40
    assert len(attack_table(run, every, dataset=digits, progress=False)) == 2 * len(digits.test_labels)
    with pytest.raises(ValueError, match=r"was trained on other data named 'digits' \(\w{10}\) than those given"):
        attack_table(run, protocol, dataset=replace(digits, train_images=255 - digits.train_images))
    with pytest.raises(ValueError, match=r"dataset: expected 'digits' as in the run, got 'other'"):
        attack_table(run, protocol, dataset=replace(digits, name="other"))


@pytest.mark.parametrize(("memory", "expected"), [(140e9, 1024), (24e9, 128)])
def test_a_large_gpu_is_given_more_images_at_one_time(memory, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert pieces_module.attacked_at_once("cuda") == expected
    assert pieces_module.attacked_at_once("cpu") == 128
