"""A stranger's model on the command line: built, judged, and printed on a page."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clustr_core.cli import main
from clustr_core.measuring import stranger
from clustr_core.measuring.checks import CHECKS
from clustr_core.measuring.diagnostics import ask_all

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()
    def forward(self, x):
        return self.inner((3 * x).round() / 3)

def flat():
    return Flat()

class Fine(Flat):
    def forward(self, x):
        return self.inner((300 * x).round() / 300)

def fine():
    return Fine()

class Backwards(Flat):
    def forward(self, x):
        return -self.inner(x)

def backwards():
    return Backwards()

class Sparse(Flat):
    def forward(self, x):
        return self.inner(x).to_sparse()

class Nested(Flat):
    def forward(self, x):
        return torch.nested.nested_tensor(list(self.inner(x)), layout=torch.jagged)

def nested():
    return Nested()

def sparse():
    return Sparse()

class Empty(Flat):
    def forward(self, x):
        return self.inner(x).to("meta")

def empty():
    return Empty()

class Cut(Flat):
    def forward(self, x):
        return self.inner(x.detach())

def cut():
    return Cut()

class One(Flat):
    def forward(self, x):
        assert len(x) == 1, "one at a time"
        return self.inner(x)

def one():
    return One()

class Round(Flat):
    def forward(self, x):
        return self.inner(x + (torch.round(3 * x) / 3 - x).detach())

def out_of_place():
    return Round()

class InPlace(Round):
    def forward(self, x):
        x.data.mul_(3).round_().div_(3)
        return self.inner(x)

def in_place():
    return InPlace()

class Buffered(Flat):
    # its outputs in the same memory each time, as of a network that was captured
    kept = None
    def forward(self, x):
        outputs = self.inner(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return outputs
        if self.kept is None or self.kept.shape != outputs.shape:
            self.kept = outputs.clone()
        return self.kept.copy_(outputs)

def buffered():
    return Buffered()

class Growing(Flat):
    calls = 0
    def forward(self, x):
        self.calls += 1
        outputs = self.inner(x)
        return torch.cat([outputs, outputs], dim=1) if self.calls > 3 else outputs

def growing():
    return Growing()

class Brain(Flat):
    def forward(self, x):
        return self.inner(x).to(torch.bfloat16)

def brain():
    return Brain()

class Shifted(Flat):
    def forward(self, x):
        x -= 0.5
        x *= 2
        return self.inner(x)

def shifted():
    return Shifted()

class Trained(Flat):
    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:
            raise self.error
        return self.inner(x)

def key():
    model = Trained()
    model.error = KeyError("weights")
    return model

def quits():
    model = Trained()
    model.error = SystemExit(0)
    return model

class Tires(Flat):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 8:
            raise RuntimeError("no more")
        return self.inner(x)

def tires():
    return Tires()

class Backward(torch.autograd.Function):
    calls = 0
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, slope):
        Backward.calls += 1
        if Backward.calls > 4:
            raise KeyError("slopes")
        return slope

class Refuses(Flat):
    def forward(self, x):
        return self.inner(Backward.apply(x))

def refuses():
    return Refuses()

class Fewer(Flat):
    def forward(self, x):
        return self.inner(x)[: 8 if len(x) == 8 else 1]

def fewer():
    return Fewer()

class Complex(Flat):
    def forward(self, x):
        return self.inner(x).to(torch.complex64)

def complex_():
    return Complex()

class Elsewhere(Flat):
    def forward(self, x):
        return self.inner(x.detach()) + torch.zeros(10, requires_grad=True)

def elsewhere():
    return Elsewhere()

def leaves():
    raise SystemExit(3)

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))

def nothing():
    return None

def fails():
    raise KeyError("weights")

a_number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a stranger's module in the folder where the command runs; another one for each test."""
    name = "stranger_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


ASKED = ["--data", "digits", "--eps", "0.1", "--examples", "8", "--steps", "3", "--restarts", "1", "--threads", "1"]


def test_a_page_says_whether_the_number_is_to_be_trusted(here, capsys, tmp_path):
    assert main(["diagnose", "--model", f"{here}:flat", *ASKED, "--html", "page.html"]) == 0
    printed = capsys.readouterr().out
    assert f"{here}:flat on digits" in printed
    assert "8 test images, L-infinity 0.1; PGD, 3 steps x 1" in printed
    assert "zero gradients: 1 (share of images whose input gradient" in printed
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    for check in CHECKS:
        assert check in page or check == "black box: transfer"
    # nothing from elsewhere
    assert "http" not in page


def test_what_the_attack_climbs_may_be_another_network(here, capsys):
    assert main(["diagnose", "--model", f"{here}:build", "--surface", f"{here}:fine", *ASKED]) == 0
    assert "zero gradients: 1" in capsys.readouterr().out


def test_outputs_of_half_the_bits_are_judged(here, capsys):
    assert main(["diagnose", "--model", f"{here}:brain", *ASKED]) == 0
    assert f"{here}:brain on digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "my_module", *ASKED], "model: expected MODULE:FUNCTION, such as my_module:build, got 'my_module'"),
        (["--model", "no_such_module:build", *ASKED], "expected no_such_module:build to build a network, got Module"),
        (["--model", "{}:absent", *ASKED], "to build a network, got AttributeError"),
        (["--model", "{}:fails", *ASKED], "to build a network, got KeyError: 'weights'"),
        (["--model", "{}:a_number", *ASKED], "to build a network, got TypeError"),
        (["--model", "{}:nothing", *ASKED], "to return a torch.nn.Module, got NoneType"),
        (["--model", "{}:wide", *ASKED], "model: expected outputs of shape [8, 10] for digits, got [8, 7]"),
        (["--model", "{}:other", *ASKED], "model: expected one that takes images of shape [batch, 1, 8, 8]"),
        (["--model", "{}:build", "--data", "digits"], "--eps: expected one with --model, got none"),
        (["--model", "{}:build", "--eps", "0.1"], "--data: expected one with --model, got none"),
        (["--model", "{}:build", "--method", "ce"], "--method, --model: expected one of the two"),
        ([], "--method, --model: expected one of the two"),
        (["--method", "ce", "--eps", "0.1"], "--eps: expected only with --model, since the profile says it, got 0.1"),
        (["--model", "{}:build", "--profile", "quick"], "--profile: expected none with --model, which has no recipe"),
        (["--model", "{}:build", *ASKED, "--html", "page.txt"], "--html: expected a file name that ends in .html"),
        (["--model", "{}:build", *ASKED, "--examples", "0"], "examples: expected a positive whole number, got 0"),
        (["--model", "{}:build", *ASKED, "--eps", "8"], "--eps: expected a number above 0 and at most 1"),
        (["--model", "{}:build", *ASKED, "--eps", "nan"], "--eps: expected a number above 0 and at most 1"),
        (["--model", "{}:build", *ASKED, "--html", "mine.html"], "--html: expected no file, or an earlier call's page"),
        (["--model", "{}:build", *ASKED, "--html", "no/page.html"], "in a folder that is there, got no/page.html"),
        (["--model", "{}:build", *ASKED, "--precision", "tf32"], "--precision: expected none with --model"),
        (["--model", "{}:leaves", *ASKED], "to build a network, got SystemExit: 3"),
        (["--model", "{}:one", *ASKED], "takes images of shape [batch, 1, 8, 8], got AssertionError: one at a time"),
        (["--model", "{}:cut", *ASKED], "model: expected outputs with a gradient in the image, got none"),
        (["--model", "{}:elsewhere", *ASKED], "model: expected outputs with a gradient in the image, got none"),
        (["--model", "{}:key", *ASKED], "takes images of shape [batch, 1, 8, 8], got KeyError: 'weights'"),
        (["--model", "{}:quits", *ASKED], "takes images of shape [batch, 1, 8, 8], got SystemExit: 0"),
        (["--model", "{}:tires", *ASKED], "takes images of shape [batch, 1, 8, 8], got RuntimeError: no more"),
        (["--model", "{}:refuses", *ASKED], "model: expected one that the battery can attack, got KeyError: 'slopes'"),
        (["--model", "{}:fewer", *ASKED], "model: expected outputs of shape ["),
        (["--model", "{}:complex_", *ASKED], "that are dense real numbers on cpu, got torch.strided torch.complex64"),
        (["--model", "{}:nested", *ASKED], "class], got list"),
        (["--model", "{}:sparse", *ASKED], "outputs that are dense real numbers on cpu, got torch.sparse_coo"),
        (["--model", "{}:empty", *ASKED], "expected outputs that are dense real numbers on cpu, got torch.strided"),
        (["--model", "{}:growing", *ASKED], "model: expected as many classes at each call, got 10, then 20"),
        (["--model", "{}:build", *ASKED, "--html", "/proc/x.html"], "--html: expected a file that can be written, got"),
        (["--model", "{}:build", *ASKED, "--html", "a\0.html"], "--html: expected a file that can be written, got"),
        (["--model", "{}:build", *ASKED, "--steps", "9" * 400], "--steps: expected at most 1,000,000, got an integer"),
        (["--model", "{}:build", *ASKED, "--restarts", "9" * 20], "--restarts: expected at most 100,000, got 999"),
        (["--model", "{}:build", "--surface", "{}:other", *ASKED], "surface: expected one that takes images of shape"),
        (["--model", "{}:build", "--surface", "{}:backwards", *ASKED], "surface: expected the classes that the model"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(here, capsys, tmp_path, given, message):
    (tmp_path / "mine.html").write_text("mine", encoding="utf-8")
    assert main(["diagnose", *(each.format(here) if "{}" in each else each for each in given)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_witnesses_bound_the_number_from_above(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    evaluation = stranger.evaluation_of(model, digits, eps=0.1, examples=8, steps=2, restarts=1)
    table = ask_all(evaluation, queries=5)
    kept = int(evaluation.robust.sum())

    def lines(**values: float) -> list[str]:
        spoken = table.assign(value=0.0, flagged=False)
        for check, value in values.items():
            row = spoken["check"] == check.replace("_", " ")
            spoken.loc[row, "value"], spoken.loc[row, "flagged"] = value, True
        return stranger.page("it", evaluation, spoken)

    assert "No sign that the reported number is wrong. That is no proof: other attacks may find more." in lines()
    two = lines(slices=0.125, budget=0.25)
    assert "The reported number is not to be trusted." in two
    left = f"{100 * (kept / 8 - 0.25):.1f} %"
    assert f"At most {left} of these images are robust: the others were broken by a check." in two
    # that one compares two other attacks
    assert not any(line.startswith("At most") for line in lines(loss_disagreement=0.5))
    assert "One kind of symptom: not enough to call the number wrong, and worth a look." in lines(no_logits=1.0)
    # a network that draws may have broken an image by luck
    assert not any(line.startswith("At most") for line in lines(slices=0.125, randomised=1.0))
    # an indicator decides nothing
    assert "Indicators of others:" in lines(binarisation=1.0)
    assert "The reported number is not to be trusted." not in lines(binarisation=1.0)


def test_the_search_path_is_left_as_it_was(here):
    import sys

    before = list(sys.path)
    model = stranger.built(f"{here}:build")
    assert sys.path == before
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert torch.equal(model(torch.zeros(1, 1, 8, 8)), stranger.built(f"{here}:build")(torch.zeros(1, 1, 8, 8)))


def printed(capsys, name):
    assert main(["diagnose", "--model", name, *ASKED]) == 0
    return capsys.readouterr().out.splitlines()[1:]


def test_a_model_that_changes_its_images_changes_none_of_ours(here, capsys):
    assert printed(capsys, f"{here}:in_place") == printed(capsys, f"{here}:out_of_place")


def test_a_model_may_normalise_in_place(here, capsys):
    assert "robust as reported" in "\n".join(printed(capsys, f"{here}:shifted"))


def test_outputs_in_a_buffer_of_the_models_own_are_those_of_their_call(here):
    model = stranger.built(f"{here}:buffered")
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, kept = model(images), model(images).clone()
        model(1 - images)
    assert torch.equal(first, kept)
