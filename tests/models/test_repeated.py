"""Passes that are repeated from a recording give what the network gives, in whatever order they are asked for."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustr_core.attacks.autoattack import autoattack
from clustr_core.attacks.cells import cell_walk
from clustr_core.attacks.gradient import pgd
from clustr_core.attacks.paper import ScoreModel, paper_pgd
from clustr_core.measuring.attacked import attacked_targets
from clustr_core.measuring.pieces import GPU_CHUNK
from clustr_core.measuring.profile import Profile, Protocol
from clustr_core.models.classifiers import ClusterClassifier
from clustr_core.models.clusters import fit_clusters
from clustr_core.models.encoders import build_encoder
from clustr_core.models.repeated import SLOTS, Repeated, recorded


class Recording:
    """Passes as a CUDA graph has them: input, output, gradient and all values between lie where the last call's lay."""

    def __init__(self, network, example: Tensor) -> None:
        self.network, self.inputs = network, example.detach().clone().requires_grad_()
        self.outputs = network(self.inputs).detach()
        self.gradient = torch.zeros_like(example)
        self.graph = None
        self.passes = 0

    def __call__(self, images: Tensor) -> Tensor:
        return _Static.apply(images, self)


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, recording):
        assert images.shape == recording.inputs.shape
        recording.passes += 1
        with torch.enable_grad():
            recording.inputs.data.copy_(images)
            recording.graph = recording.network(recording.inputs)
            recording.outputs.copy_(recording.graph.detach())
        ctx.recording = recording
        return recording.outputs.detach()

    @staticmethod
    def backward(ctx, gradient):
        recording = ctx.recording
        if recording.graph is None:
            # a second replay finds what the first has written over
            return recording.gradient.fill_(torch.nan).detach(), None
        with torch.enable_grad():
            found = torch.autograd.grad(recording.graph, recording.inputs, gradient)[0]
        recording.graph = None
        return recording.gradient.copy_(found).detach(), None


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_encoder("small-cnn", (1, 8, 8), width=4).double().eval().requires_grad_(False)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def input_gradient(function, at: Tensor, weights: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad((function(leaf) * weights[: len(at)]).sum(), leaf)[0]


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(
        SLOTS[-1] + 1, network()(images(1)).shape[1], generator=torch.Generator().manual_seed(5)
    ).double()


def test_every_size_of_batch_gives_what_the_network_gives(weights: Tensor) -> None:
    plain, made = network(), []
    repeated = Repeated(plain, lambda given, example: made.append(Recording(given, example)) or made[-1])
    for count in (0, 1, 7, 8, 9, 33, 100, 128, SLOTS[-1] + 1, 5):
        at = images(count, seed=count)
        torch.testing.assert_close(repeated(at), plain(at))
        torch.testing.assert_close(input_gradient(repeated, at, weights), input_gradient(plain, at, weights))
    # none, and more than the largest size, pass as they would; 5 finds the recording of 1, 7, 8 and 9
    assert [len(each.inputs) for each in made] == [16, 64, 128]


def test_a_piece_of_an_attack_on_a_gpu_is_a_recorded_pass() -> None:
    assert SLOTS[-1] == GPU_CHUNK
    assert list(SLOTS) == sorted(SLOTS)
    # no large batch is padded to more than twice itself
    assert all(larger <= 2 * smaller for smaller, larger in pairwise(SLOTS[1:]))


def test_a_gradient_is_right_whatever_was_repeated_since(weights: Tensor) -> None:
    plain, made = network(), []
    repeated = Repeated(plain, lambda given, example: made.append(Recording(given, example)) or made[-1])
    first, second = images(6, seed=1).requires_grad_(), images(5, seed=2).requires_grad_()
    of_first, of_second = repeated(first), repeated(second)
    torch.testing.assert_close(of_first.detach(), plain(first.detach()))
    with torch.no_grad():
        repeated(images(3, seed=3))
    for output, at in ((of_first, first), (of_second, second), (of_first, first)):
        given = weights[: len(at)]
        (found,) = torch.autograd.grad(output, at, given, retain_graph=True)
        torch.testing.assert_close(found, input_gradient(plain, at.detach(), weights))
    assert made[0].passes == 3 + 3


def test_one_pass_is_enough_for_an_output_and_its_gradient(weights: Tensor) -> None:
    made = []
    repeated = Repeated(network(), lambda given, example: made.append(Recording(given, example)) or made[-1])
    for seed in range(3):
        input_gradient(repeated, images(6, seed), weights)
    assert made[0].passes == 3


def test_a_gradient_of_a_gradient_is_refused() -> None:
    repeated = Repeated(network(), Recording)
    leaf = images(4).requires_grad_()
    (gradient,) = torch.autograd.grad(repeated(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_every_attack_finds_the_same_with_and_without() -> None:
    at = images(40)
    encoder = network()
    with torch.no_grad():
        clusters, _ = fit_clusters(encoder(at), torch.arange(40) % 4, per_class=2)
    plain = ClusterClassifier(encoder, clusters).eval()
    other = ClusterClassifier(Repeated(encoder, Recording), clusters).eval()
    labels = plain(at).argmax(dim=1)
    size = {"eps": 0.05, "step_size": 0.02, "steps": 4}
    for attack in (
        lambda model: pgd(model, at, labels, restarts=2, loss="margin", **size),
        lambda model: cell_walk(model, at, labels, **size),
        lambda model: paper_pgd(ScoreModel(model), at, labels, eps=0.05, steps=4, restarts=2),
        # FAB takes several gradients of one pass
        lambda model: autoattack(
            lambda x: model(x.double()).float(), at[:12].float(), labels[:12], norm="l2", eps=0.3, parts=("fab-t",)
        ),
    ):
        expected, found = attack(plain), attack(other)
        torch.testing.assert_close(found.adversarial, expected.adversarial)
        assert torch.equal(found.success, expected.success)
        assert 0 < expected.success.sum() < len(expected.success)


@pytest.mark.parametrize("name", ["small-cnn", "resnet18"])
def test_a_pass_reads_nothing_off_its_device(name: str) -> None:
    encoder = build_encoder(name, (3, 32, 32), width=8).eval().requires_grad_(False).to("meta")
    leaf = torch.empty(8, 3, 32, 32, device="meta", requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder(leaf).sum(), leaf)
    assert gradient.is_meta


def test_a_cpu_has_nothing_to_record() -> None:
    with pytest.raises(ValueError, match="captured: expected images on a CUDA device, which alone has graphs, got cpu"):
        recorded(network(), images(8))


def test_a_leg_that_captures_attacks_repeated_encoders(runs: dict, digits) -> None:
    profile = Profile("tiny", {}, {"linf": Protocol(eps=(0.1,), steps=1, examples=8)})
    ((target, *_),) = attacked_targets(runs["clustr"], profile, digits, "cpu", captured=True)
    assert isinstance(target.model.encoder, Repeated)
    ((target, *_),) = attacked_targets(runs["clustr"], profile, digits, "cpu")
    assert not isinstance(target.model.encoder, Repeated)


@pytest.mark.gpu
def test_a_gpu_repeats_what_the_network_gives() -> None:
    # in double precision, since another algorithm rounds otherwise and a ReLU may then switch
    plain = build_encoder("resnet18", (3, 32, 32), width=16).double().cuda().eval().requires_grad_(False)
    repeated = Repeated(plain).eval()
    for count in (128, 20, 200, 3, 20):
        at = torch.rand(count, 3, 32, 32, device="cuda", dtype=torch.float64)
        leaves = at.clone().requires_grad_(), at.clone().requires_grad_()
        outputs = repeated(leaves[0]), plain(leaves[1])
        gradients = [
            torch.autograd.grad(F.normalize(output).sum(), leaf)[0]
            for output, leaf in zip(outputs, leaves, strict=True)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
