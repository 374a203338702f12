"""Measurements of runs: one row an example, done once, and going on where they were interrupted."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch

from clustr_core import attacks, data, evaluation, recipes
from clustr_core.accuracy import robust_accuracy
from clustr_core.certify import certified_radius
from clustr_core.evaluation import (
    Subject,
    attack_table,
    attacks_of,
    certificate_table,
    certificates_of,
    some_test_images,
    subject_of,
)
from clustr_core.paper import ScoreModel, paper_pgd
from clustr_core.recipes import AdversarialTraining, CrossEntropy, Profile, Protocol
from clustr_core.training import embed_all, fit

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

    real = evaluation.run_attack
    monkeypatch.setattr(evaluation, "run_attack", counted)
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
    cooled = attacks.rescaled(model, sample)
    match protocol.attack:
        case "pgd":
            return attacks.pgd(
                cooled, images, labels, **size, restarts=protocol.restarts, loss=loss, norm=protocol.norm
            )
        case "paper":
            surface = ScoreModel(model) if run.recipe.method == "clustr" else model
            return paper_pgd(surface, images, labels, eps=eps, steps=4, restarts=3)
        case "cell-walk":
            return attacks.cell_walk(model, images, labels, **size, rivals=2)
        case "transfer":
            return attacks.transfer(source.model(), model, images, labels, **size, loss="margin")
        case "square":
            return attacks.square(cooled, images, labels, norm="linf", eps=eps, queries=20)
        case "autoattack":
            return attacks.autoattack(cooled, images, labels, norm="linf", eps=eps)


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
    monkeypatch.setattr(evaluation, "CHUNK", 16)


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

    counted = evaluation.run_attack
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "run_attack", interrupted)
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
    monkeypatch.setattr(evaluation, "CHUNK", 16)
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
        return Subject("mine", lambda: loads.append(1) or network, identity, tmp_path)

    for identity, count in (("a", 1), ("b", 2), ("a", 2)):
        evaluation.measure(subject(identity), protocol, digits, progress=False)
        assert len(attacked) == len(loads) == len(list(tmp_path.iterdir())) == count


@pytest.mark.parametrize("module", ["ascent", "losses", "attacks", "verdicts", "autoattack", "paper", "evaluation"])
def test_other_attack_code_is_another_measurement(runs, measure, attacked, monkeypatch, module):
    run, protocol = unmeasured(runs["ce"]), Protocol(eps=(0.1,), steps=1, examples=2, losses=("ce",))
    measure(run, protocol)
    assert module in recipes.ATTACK_CODE
    real = evaluation.code_digest
    monkeypatch.setattr(evaluation, "code_digest", lambda modules: real(modules) + ("x" if module in modules else ""))
    measure(run, protocol)
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

    monkeypatch.setattr(evaluation, "certified_radius", forbidden)
    pd.testing.assert_frame_equal(certificate_table(run, examples=20, dataset=digits), first)
    with pytest.raises(AssertionError, match="certified again"):
        certificate_table(run, examples=21, dataset=digits)


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
    assert subject_of(replace(run, recipe=plain)).name == "pgd-at"


def test_no_attack_is_transferred_from_a_model_to_itself(runs, digits, monkeypatch, attacked):
    shown = Protocol(eps=(0.1,), steps=1, examples=5, losses=("ce",))
    both = {"linf": shown, "transfer": replace(KINDS["transfer"], source="ce", eps=(0.1,), examples=5)}
    profile = Profile("tiny", {name: run.recipe for name, run in runs.items()}, both)
    folders = {run.recipe: run.path for run in runs.values()}
    monkeypatch.setattr(evaluation, "run_folder", folders.__getitem__)
    own = attacks_of(unmeasured(runs["ce"]), profile, dataset=digits, progress=False)
    assert own["attack"].unique().tolist() == ["pgd"]
    other = attacks_of(unmeasured(runs["clustr"]), profile, dataset=digits, progress=False)
    assert other["attack"].tolist() == ["pgd"] * 5 + ["transfer"] * 5
    # climbed was the source's model, and no other
    source = subject_of(runs["ce"])
    expected = evaluation.measure(
        subject_of(runs["clustr"], source=runs["ce"]), both["transfer"], digits, progress=False
    )
    pd.testing.assert_frame_equal(other[other["attack"] == "transfer"][COLUMNS].reset_index(drop=True), expected)
    assert source.identity == f"{runs['ce'].path.name} own"


def test_a_source_that_was_never_trained_is_named(runs, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    profile = Profile("tiny", {"ce": CrossEntropy(epochs=3)}, {"transfer": replace(KINDS["transfer"], source="ce")})
    with pytest.raises(FileNotFoundError, match="folder: expected a finished run"):
        attacks_of(runs["clustr"], profile, dataset=digits, progress=False)


def test_a_profile_without_attacks_is_refused(runs):
    with pytest.raises(ValueError, match="profile bare: expected at least one entry under attacks, got none"):
        attacks_of(runs["ce"], Profile("bare", {}, {}))


def test_a_changed_dataset_is_noticed(runs, digits):
    run, protocol = runs["ce"], Protocol(eps=(0.1,), steps=2, examples=10)
    fewer = replace(digits, test_images=digits.test_images[:20], test_labels=digits.test_labels[:20])
    every = replace(protocol, examples=None)
    assert len(attack_table(run, every, dataset=fewer, progress=False)) == 40
    assert len(attack_table(run, every, dataset=digits, progress=False)) == 2 * len(digits.test_labels)
    with pytest.raises(ValueError, match=r"expected the images that .* was trained on; digits has changed"):
        attack_table(run, protocol, dataset=replace(digits, train_images=255 - digits.train_images))
    with pytest.raises(ValueError, match=r"dataset: expected 'digits' as in the run, got 'other'"):
        attack_table(run, protocol, dataset=replace(digits, name="other"))
