"""What measurements share is done once: models, temperatures, predictions, certificates, the order of the images."""

from collections import Counter

import pytest

from clustr_core import data
from clustr_core.cli import main
from clustr_core.measuring import certified, pieces, targets
from clustr_core.measuring.evaluation import Evaluation
from clustr_core.measuring.targets import AttackTarget
from clustr_core.training import run as run_module

PROFILE = """\
shared: {dataset: digits, width: 8, train_examples: 150, epochs: 1}
methods:
  ce: {}
  clustr: {per_cluster: 4}
  clustr-cert: {encoder: lip-mlp, learning_rate: 0.02, per_class: 1}
attacks:
  linf: {norm: linf, eps: [0.05, 0.1], steps: 2, examples: 150, losses: [ce, margin]}
  l2: {norm: l2, eps: [0.5], steps: 2, examples: 150, losses: [ce]}
  paper: {attack: paper, eps: [0.1], steps: 2, restarts: 1, examples: 20}
  walk: {attack: cell-walk, eps: [0.1], steps: 2, restarts: 1, examples: 20}
  transfer: {attack: transfer, eps: [0.05, 0.1], steps: 2, examples: 20, source: ce}
  square: {attack: square, eps: [0.1], steps: 2, examples: 20}
certified_examples: 150
examination: {eps: 0.1, examples: 6, steps: 2, restarts: 1, queries: 2}
sandwich: {examples: 140, steps: 2, points: 2}
"""
# test images of the digits
TESTED = 360
# two chunks of 150 images and one of 20: for each eps and loss
PIECES, BATCHES = 2 * (2 * 2 + 1) + 1 + 1 + 2 + 1, 3


@pytest.fixture
def counted(tiny_book, monkeypatch):
    """How often each thing was done since the last training."""
    done = Counter()

    def count(owner, name, key=None, amount=lambda *args: 1):
        real = getattr(owner, name)

        def noted(*args, **options):
            done[key or name] += amount(*args)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    count(run_module, "load", "models")
    count(targets, "rescaled", "temperatures")
    count(data, "load_dataset", "datasets")
    count(data, "digest_of", "digests", lambda images, labels: len(labels) == TESTED)
    count(certified, "certificate_rows", "certified images", lambda certified, indices: len(indices))
    # those with one image are of an image that was planted
    count(Evaluation, "__post_init__", "evaluations", lambda evaluation: len(evaluation.labels) > 1)
    real = AttackTarget.clean_predictions

    def predicted(self, indices):
        before = len(self._clean)
        found = real(self, indices)
        done["predictions asked for"] += 1
        done["predictions"] += len(self._clean) - before
        return found

    monkeypatch.setattr(AttackTarget, "clean_predictions", predicted)
    return done


def clustr(command, method, counted):
    """What a command did, the run being there."""
    given = ["--profile", "tiny", "--method", method, "--device", "cpu"]
    assert main(["train", *given]) == 0
    counted.clear()
    pieces._permutation.cache_clear()
    assert main([command, *given]) == 0
    assert pieces._permutation.cache_info().misses == 1
    return dict(counted)


@pytest.mark.parametrize(("method", "heads", "sources"), [("clustr", 1, 1), ("ce", 2, 0)])
def test_all_attacks_on_a_method_load_its_model_once(method, heads, sources, counted):
    main(["train", "--profile", "tiny", "--method", "ce", "--device", "cpu"])
    asked = PIECES - (0 if sources else 2)
    first = clustr("attack", method, counted)
    assert first == {
        "models": heads + sources, "temperatures": heads, "datasets": 1, "digests": 1,
        "predictions asked for": heads * asked, "predictions": heads * BATCHES,
    }  # fmt: skip
    # a second time everything is there
    assert clustr("attack", method, counted) == {"datasets": 1, "digests": 1}


def test_certificates_and_the_sandwich_share_one_certificate_of_each_image(counted):
    assert clustr("certify", "clustr-cert", counted) == {
        "models": 1, "datasets": 1, "digests": 1, "certified images": 150
    }  # fmt: skip
    # the radii are read: only the model that is attacked is loaded
    assert clustr("sandwich", "clustr-cert", counted) == {
        "models": 1, "temperatures": 1, "datasets": 1, "digests": 1
    }  # fmt: skip


def test_a_sandwich_that_comes_first_leaves_the_certificates_to_be_read(counted):
    first = clustr("sandwich", "clustr-cert", counted)
    assert (first["models"], first["certified images"]) == (1, 150)
    assert "certified images" not in clustr("certify", "clustr-cert", counted)


def test_a_diagnosis_loads_each_model_once_and_judges_one_evaluation(counted):
    main(["train", "--profile", "tiny", "--method", "ce", "--device", "cpu"])
    # the second evaluation is the one with every change of the ablation
    assert clustr("diagnose", "clustr", counted) == {"models": 2, "datasets": 1, "digests": 1, "evaluations": 2}
