"""Files in the released layout, written from scratch, against a plain rewrite of what the released code computes."""

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from disk import contents, files_of_at_most
from torch import nn

from clustr_core.certificates.ladder import certify
from clustr_core.models.classifiers import ClusterClassifier, LinearClassifier
from clustr_core.models.clusters import Clusters
from clustr_core.models.encoders import ResNet18, SmallCNN
from clustr_core.models.official import CLUSTER_KEYS, load_official, save_official

CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
SVHN = ([0.4378, 0.4439, 0.4729], [0.1980, 0.2011, 0.1971])
STATISTICS = {"cifar10": CIFAR, "cifar100": CIFAR, "svhn": SVHN}
CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
STAGES = {"layer1": (1, 1), "layer2": (2, 2), "layer3": (4, 2), "layer4": (8, 2)}


def released_state(classes=10, width=2, seed=0):
    """A state dict under the released names, as after training: nothing at 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    state = OrderedDict()

    def convolution(name, inputs, outputs, size):
        scale = (2 / (inputs * size * size)) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(outputs, inputs, size, size, generator=g)

    def batch_norm(name, channels):
        state[f"{name}.weight"] = 0.5 + torch.rand(channels, generator=g)
        state[f"{name}.bias"] = 0.3 * torch.randn(channels, generator=g)
        state[f"{name}.running_mean"] = 0.3 * torch.randn(channels, generator=g)
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=g)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1234)

    convolution("conv1", 3, width, 3)
    batch_norm("bn1", width)
    inputs = width
    for stage, (factor, stride) in STAGES.items():
        outputs = factor * width
        for block in (0, 1):
            name = f"{stage}.{block}"
            convolution(f"{name}.conv1", inputs, outputs, 3)
            batch_norm(f"{name}.bn1", outputs)
            convolution(f"{name}.conv2", outputs, outputs, 3)
            batch_norm(f"{name}.bn2", outputs)
            if block == 0 and stride == 2:
                convolution(f"{name}.shortcut.0", inputs, outputs, 1)
                batch_norm(f"{name}.shortcut.1", outputs)
            inputs = outputs
    state["linear.weight"] = torch.randn(classes, 8 * width, generator=g)
    state["linear.bias"] = torch.randn(classes, generator=g)
    return state


def released_network(state, x):
    """Logits of the linear head, and embeddings, in double precision and from the state dict alone."""
    state = {name: value.double() for name, value in state.items()}

    def convolution(name, x, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def batch_norm(name, x):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    x = F.relu(batch_norm("bn1", convolution("conv1", x.double())))
    for stage, (_, first_stride) in STAGES.items():
        for block in (0, 1):
            name, stride = f"{stage}.{block}", first_stride if block == 0 else 1
            inner = F.relu(batch_norm(f"{name}.bn1", convolution(f"{name}.conv1", x, stride)))
            inner = batch_norm(f"{name}.bn2", convolution(f"{name}.conv2", inner))
            if f"{name}.shortcut.0.weight" in state:
                x = batch_norm(f"{name}.shortcut.1", convolution(f"{name}.shortcut.0", x, stride))
            x = F.relu(inner + x)
    embeddings = x.mean(dim=(2, 3))
    return embeddings @ state["linear.weight"].T + state["linear.bias"], embeddings


def normalised(images, dataset):
    mean, std = (torch.tensor(values).double().reshape(3, 1, 1) for values in STATISTICS[dataset])
    return (images.double() - mean) / std


def released_scores(embeddings, file):
    """Sums of exponentials, image by image: the L highest by their classes if normalised, else all by position."""
    centers = file["cluster_centers"].double()
    variance = torch.as_tensor(file["variance"]).double().expand(len(centers))
    rows = []
    for z in embeddings:
        each = [float(torch.exp(-0.5 * ((z - mu) ** 2).sum() / v)) for mu, v in zip(centers, variance, strict=True)]
        row = [0.0] * (len(centers) // file["K"])
        if file["normalize_probs"]:
            for j in sorted(range(len(each)), key=lambda j: -each[j])[: file["L"]]:
                row[int(file["cluster_classes"][j])] += each[j]
        else:
            for j, value in enumerate(each):
                row[j // file["K"]] += value
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def images(count=8, seed=3):
    """Smooth random pictures, so that their embeddings differ."""
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 3, 4, 4, generator=g), size=(32, 32), mode="nearest")


def clustered_file(dataset="cifar10", *, normalize=True, per_class=2, voters=7, seed=0, **changes):
    """What the released training saves; centroids lie among the embeddings."""
    g = torch.Generator().manual_seed(seed)
    count = CLASSES[dataset] * per_class
    state = released_state(CLASSES[dataset], seed=seed)
    embeddings = released_network(state, normalised(images(count, seed=9), dataset))[1]
    spread = embeddings.std(dim=0)
    centers = embeddings + 0.5 * spread * torch.randn(embeddings.shape, generator=g, dtype=torch.float64)
    file = {
        "state_dict": state,
        "test_acc": 91.03,
        "epoch": 24,
        "cluster_centers": centers.float(),
        "cluster_classes": torch.from_numpy(np.repeat(range(CLASSES[dataset]), per_class)),
        "variance": spread.square().sum().float().unsqueeze(0).expand(count),
        "normalize_probs": normalize,
        "K": per_class,
        "L": voters,
    }
    return file | changes


def saved(folder, content, name="model.pth", **options):
    path = folder / name
    torch.save(content, path, **options)
    return path


def logits_in_double(model, pictures):
    with torch.no_grad():
        return model.double()(pictures.double())


def assert_as_released(path, file, dataset):
    """Same class, and the logarithm of the same score wherever the released code gives one."""
    _, embeddings = released_network(file["state_dict"], normalised(images(), dataset))
    scores = released_scores(embeddings, file)
    assert (scores.amax(dim=1) > 0).all()
    model = load_official(path, dataset=dataset)
    assert isinstance(model, ClusterClassifier)
    logits = logits_in_double(model, images())
    assert torch.equal(logits.argmax(dim=1), scores.argmax(dim=1))
    voted = scores > 0
    torch.testing.assert_close(logits[voted], scores[voted].log(), rtol=1e-9, atol=1e-9)
    assert logits.isfinite().all()
    return voted, scores


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_a_clustered_file_scores_as_the_released_code_does(tmp_path, dataset, normalize):
    file = clustered_file(dataset, normalize=normalize)
    voted, scores = assert_as_released(saved(tmp_path, file), file, dataset)
    # only the L nearest vote, and only with normalize_probs; the pictures are not all of one class
    assert voted.sum(dim=1).lt(CLASSES[dataset]).all() == normalize
    assert scores.argmax(dim=1).unique().numel() > 2


def test_the_loaded_model_is_ready_to_evaluate(tmp_path):
    half = clustered_file()
    half["state_dict"] = {k: v.half() if v.is_floating_point() else v for k, v in half["state_dict"].items()}
    half |= {"cluster_centers": half["cluster_centers"].half(), "variance": half["variance"].double()}
    for file, neighbours in ((clustered_file(), 7), (clustered_file(normalize=False), None), (half, 7)):
        model = load_official(saved(tmp_path, file), dataset="cifar10")
        assert isinstance(model, ClusterClassifier)
        assert (model.neighbours, model.rule) == (neighbours, "soft")
        assert not any(module.training for module in model.modules())
        floating = [t for t in model.state_dict().values() if t.is_floating_point()]
        assert {(t.dtype, t.device.type) for t in floating} == {(torch.float32, "cpu")}
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model(images(2)).shape == (2, 10)
        radius = certify(model, images(2)).radius
        assert radius.isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_l_counts_only_with_normalised_probabilities(tmp_path, normalize):
    few, more = (clustered_file(normalize=normalize, voters=voters) for voters in (3, 11))
    logits = [
        load_official(saved(tmp_path, file, f"{i}.pth"), dataset="cifar10")(images())
        for i, file in enumerate((few, more))
    ]
    assert torch.equal(*logits) == (not normalize)


def test_l_of_all_clusters_and_any_l_that_is_not_used(tmp_path):
    file = clustered_file(voters=20)
    assert_as_released(saved(tmp_path, file), file, "cifar10")
    unused = clustered_file(normalize=False, voters=999)
    assert_as_released(saved(tmp_path, unused), unused, "cifar10")


@pytest.mark.parametrize("shape", ["number", "scalar", "one", "each"])
@pytest.mark.parametrize("normalize", [True, False])
def test_variance_may_have_any_of_its_shapes(tmp_path, shape, normalize):
    sigma2 = float(clustered_file()["variance"][0])
    variance = {
        "number": sigma2,
        "scalar": torch.tensor(sigma2),
        "one": torch.tensor([sigma2]),
        "each": sigma2 * torch.linspace(0.5, 2, 20),
    }[shape]
    # with L = 20 nobody is left out, so unequal variances cannot change who votes
    file = clustered_file(normalize=normalize, voters=20, variance=variance)
    assert_as_released(saved(tmp_path, file), file, "cifar10")


def test_clusters_in_another_order_are_found_by_their_classes(tmp_path):
    file = clustered_file()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    mixed = file | {key: file[key][order] for key in ("cluster_classes", "cluster_centers")}
    assert_as_released(saved(tmp_path, mixed), mixed, "cifar10")
    # without normalize_probs the released code goes by position and would score the wrong classes
    path = saved(tmp_path, mixed | {"normalize_probs": False})
    with pytest.raises(ValueError, match=r"cluster_classes: expected each of 0, ..., 9 2 times, in this order"):
        load_official(path, dataset="cifar10")


def test_cifar10_and_svhn_differ_by_their_normalisation_alone(tmp_path):
    path = saved(tmp_path, clustered_file())
    cifar, svhn = (load_official(path, dataset=name) for name in ("cifar10", "svhn"))
    assert not torch.allclose(cifar(images()), svhn(images()))
    assert torch.equal(cifar.encoder.conv1.weight, svhn.encoder.conv1.weight)  # pyright: ignore


def test_scores_that_underflow_still_have_a_class(tmp_path):
    file = clustered_file(variance=torch.tensor(1e-7))
    _, embeddings = released_network(file["state_dict"], normalised(images(), "cifar10"))
    assert (released_scores(embeddings, file) == 0).all()
    nearest = torch.cdist(embeddings, file["cluster_centers"].double()).argmin(dim=1)
    logits = logits_in_double(load_official(saved(tmp_path, file), dataset="cifar10"), images())
    assert torch.equal(logits.argmax(dim=1), file["cluster_classes"][nearest])
    assert logits.argmax(dim=1).any()


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_a_bare_state_dict_is_a_baseline_on_raw_pixels(tmp_path, dataset, prefix):
    state = released_state(CLASSES[dataset], width=3)
    path = saved(tmp_path, OrderedDict((prefix + name, value) for name, value in state.items()))
    model = load_official(path, dataset=dataset)
    assert isinstance(model, LinearClassifier)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits_in_double(model, images()), released_network(state, images())[0])


def test_a_clustered_file_may_carry_the_prefix_of_a_wrapper(tmp_path):
    file = clustered_file()
    wrapped = file | {"state_dict": {f"module.{name}": value for name, value in file["state_dict"].items()}}
    assert_as_released(saved(tmp_path, wrapped), file, "cifar10")


@pytest.mark.parametrize("zipped", [True, False])
def test_old_files_and_files_from_a_gpu(tmp_path, zipped, monkeypatch):
    file = clustered_file()
    for name in [name for name in file["state_dict"] if name.endswith("num_batches_tracked")]:
        del file["state_dict"][name]
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path, file, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    assert b"cuda:0" in path.read_bytes()
    monkeypatch.undo()
    assert_as_released(path, file, "cifar10")
    model = load_official(path, dataset="cifar10")
    counters = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 20
    assert not any(counters)


def test_parameters_are_copies_and_no_random_number_is_drawn(tmp_path):
    file = clustered_file()
    shared = file["state_dict"]["layer1.0.bn1.weight"]
    file["state_dict"]["layer1.0.bn2.weight"] = shared
    file["state_dict"] = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in file["state_dict"].items()}
    before = torch.get_rng_state()
    model = load_official(str(saved(tmp_path, file)), dataset="cifar10")
    assert torch.equal(torch.get_rng_state(), before)
    block = model.encoder.layer1[0]  # pyright: ignore
    with torch.no_grad():
        block.bn1.weight.add_(1)
    assert torch.equal(block.bn2.weight, shared)


def without(*names):
    def change(file):
        for name in names:
            del file["state_dict"][name]

    return change


def put(*keys, value):
    """Replace an entry of the file, or of its state dict."""

    def change(file):
        target = file["state_dict"] if len(keys) == 2 else file
        target[keys[-1]] = value

    return change


NAN = torch.full((20, 16), torch.nan)
TWICE = torch.arange(10).repeat_interleave(2)
TWICE[0] = 1
NEGATIVE = torch.arange(-1, 9).repeat_interleave(2)
FAULTS = {
    "missing": (
        without("layer3.1.conv2.weight", "linear.bias"),
        r"width 2, got missing layer3\.1\.conv2\.weight, linear\.bias$",
    ),
    "missing stem": (without("conv1.weight"), r"width 2, got missing conv1\.weight$"),
    "extra": (put("state_dict", "layer1.0.conv3.weight", value=torch.ones(2)), r"got extra layer1\.0\.conv3\.weight$"),
    "misshapen": (
        put("state_dict", "conv1.weight", value=torch.ones(5, 3, 3, 3)),
        r"width 2, got misshapen conv1\.weight \(expected \[2, 3, 3, 3\], got \[5, 3, 3, 3\]\)$",
    ),
    "integer weights": (
        put("state_dict", "bn1.weight", value=torch.ones(2, dtype=torch.int64)),
        r"misshapen bn1\.weight \(expected \[2\], got \[2\] torch\.int64\)$",
    ),
    "sparse": (
        put("state_dict", "bn1.bias", value=torch.ones(2).to_sparse()),
        r"bn1\.bias .*got \[2\] torch\.sparse_coo",
    ),
    "no tensor": (
        put("state_dict", "bn1.bias", value=[1.0, 2.0]),
        r"misshapen bn1\.bias \(expected \[2\], got list\)$",
    ),
    "counter": (
        put("state_dict", "bn1.num_batches_tracked", value=torch.tensor(0.5)),
        r"misshapen bn1\.num_batches_tracked",
    ),
    "head": (
        put("state_dict", "linear.weight", value=torch.ones(10, 3)),
        r"misshapen linear\.weight \(expected \[10, 16\], got \[10, 3\]\)$",
    ),
    "all at once": (
        lambda file: [without("bn1.bias")(file), put("state_dict", "odd", value=1)(file)],
        r"missing bn1\.bias; extra odd$",
    ),
    "twice": (put("state_dict", "model.bn1.bias", value=torch.ones(2)), r"expected each name once, got bn1\.bias"),
    "nan weights": (
        put("state_dict", "bn1.bias", value=torch.tensor([0.0, torch.inf])),
        r"state_dict: expected finite values, got NaN or infinity in bn1\.bias$",
    ),
    "no dict": (put("state_dict", value=3), r"state_dict: expected a dict of tensors, got int$"),
    "empty": (put("state_dict", value={}), r"missing conv1\.weight, bn1\.weight, .* and \d+ more$"),
    "other dataset": (
        put("state_dict", "linear.weight", value=torch.ones(100, 16)),
        r"dataset: expected a model of 10 classes for cifar10, got a linear head of 100$",
    ),
    "K": (put("K", value=3), r"cluster_classes: expected \[30\] classes, K=3 .* 10 classes of cifar10, got \[20\]"),
    "K zero": (put("K", value=0), r"K: expected a positive integer, got 0$"),
    "K fraction": (put("K", value=2.0), r"K: expected a positive integer, got 2\.0$"),
    "L zero": (put("L", value=0), r"L: expected a positive integer, got 0$"),
    "L none": (put("L", value=None), r"L: expected a positive integer, got None$"),
    "L large": (put("L", value=21), r"L: expected at most the number of clusters, 20, got 21$"),
    "normalize_probs": (put("normalize_probs", value=1), r"normalize_probs: expected True or False, got 1$"),
    "class without cluster": (
        put("cluster_classes", value=TWICE),
        r"cluster_classes: expected each of 0, ..., 9 2 times, got \[1, 0, 1, 1, 2",
    ),
    "negative class": (put("cluster_classes", value=NEGATIVE), r"cluster_classes: expected each of 0, ..., 9 2 times"),
    "float classes": (
        put("cluster_classes", value=torch.arange(10.0).repeat_interleave(2)),
        r"cluster_classes: expected \[20\] classes",
    ),
    "list of classes": (put("cluster_classes", value=[0] * 20), r"cluster_classes: expected \[20\] .* got list$"),
    "dimension": (
        put("cluster_centers", value=torch.ones(20, 15)),
        r"cluster_centers: expected \[20, 16\], .* 16 dimensions, got \[20, 15\]$",
    ),
    "one center": (put("cluster_centers", value=torch.ones(19, 16)), r"cluster_centers: .* got \[19, 16\]$"),
    "large center": (
        put("cluster_centers", value=torch.full((20, 16), 1e38)),
        r"cluster_centers: expected values whose squares single precision holds, got 1e\+38|got 9\.99",
    ),
    "nan center": (put("cluster_centers", value=NAN), r"cluster_centers: expected finite values, got NaN"),
    "variances": (put("variance", value=torch.ones(2)), r"variance: expected a number or \[20\], .* got \[2\]$"),
    "variance text": (put("variance", value="1"), r"variance: expected a number or \[20\], .* got str$"),
    "negative variance": (put("variance", value=-1.0), r"variance: expected positive finite values, got minimum -1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_off_is_named(tmp_path, fault, as_installed):
    change, message = FAULTS[fault]
    file = clustered_file()
    assert load_official(saved(tmp_path, file), dataset="cifar10")
    change(file)
    path = saved(tmp_path, file)
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: .*{message}"):
        load_official(path, dataset="cifar10")


@pytest.mark.parametrize("missing", [*[[key] for key in CLUSTER_KEYS], ["state_dict"], ["K", "L"], [*CLUSTER_KEYS]])
def test_a_missing_key_is_named(tmp_path, missing):
    file = {key: value for key, value in clustered_file().items() if key not in missing}
    with pytest.raises(ValueError, match="missing ") as caught:
        load_official(saved(tmp_path, file), dataset="cifar10")
    assert sorted(str(caught.value).rpartition("missing ")[2].split(", ")) == sorted(missing)


def test_a_baseline_with_faults_is_refused(tmp_path):
    state = released_state()
    del state["linear.weight"]
    with pytest.raises(ValueError, match=r"missing linear\.weight; extra epoch$"):
        load_official(saved(tmp_path, {"epoch": 3, **state}), dataset="svhn")
    with pytest.raises(ValueError, match=r"dataset: expected a model of 100 classes for cifar100, .* of 10$"):
        load_official(saved(tmp_path, released_state()), dataset="cifar100")
    with pytest.raises(ValueError, match=r"checkpoint: expected a dict, got Tensor$"):
        load_official(saved(tmp_path, torch.ones(3)), dataset="cifar10")


def test_files_of_another_dataset_are_refused(tmp_path):
    hundred, ten = saved(tmp_path, clustered_file("cifar100"), "100.pth"), saved(tmp_path, clustered_file(), "10.pth")
    with pytest.raises(ValueError, match=r"dataset: expected a model of 10 classes for svhn, got a linear head of 100"):
        load_official(hundred, dataset="svhn")
    with pytest.raises(ValueError, match=r"dataset: expected a model of 100 classes for cifar100"):
        load_official(ten, dataset="cifar100")
    # the clusters of another dataset under the right head
    file = clustered_file("cifar100") | {"state_dict": released_state()}
    with pytest.raises(ValueError, match=r"cluster_classes: expected \[20\] classes, .* of cifar10, got \[200\]"):
        load_official(saved(tmp_path, file), dataset="cifar10")
    with pytest.raises(ValueError, match=r"dataset: expected one of \['cifar10', 'cifar100', 'svhn'\], got 'mnist'"):
        load_official(ten, dataset="mnist")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_official(tmp_path / "nowhere.pth", dataset="cifar10")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Custom:
    """A class of somebody's own code."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["file", "metadata", "state_dict", "raw pickle"])
def test_nothing_in_a_file_is_executed(tmp_path, where, zipped, monkeypatch):
    # the switch by which torch makes its loading unsafe must not reach this one
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, payload = tmp_path / "executed", Payload(tmp_path / "executed")
    file = clustered_file()
    if where == "state_dict":
        file["state_dict"]["conv1.weight"] = payload
    path = tmp_path / "model.pth"
    if where == "raw pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2 if zipped else 5))
    else:
        content = {"file": payload, "metadata": file | {"epoch": payload}, "state_dict": file}[where]
        saved(tmp_path, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"expected .* tensors and plain values.*; .*nothing of it was executed"
    ) as caught:
        load_official(path, dataset="cifar10")
    assert not mark.exists()
    # the newest pickles do not name what they call where torch would report it
    assert ("asks for posix.mkdir; refused" in str(caught.value)) != (where == "raw pickle" and not zipped)
    # the payload is live: what unpickles it runs it
    if where == "raw pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "value", [Custom(), np.float64(91.0), np.ones(3)], ids=["class", "numpy scalar", "numpy array"]
)
def test_other_classes_are_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match=r"expected only tensors and plain values, got a pickle that asks for \w+"):
        load_official(saved(tmp_path, clustered_file(test_acc=value)), dataset="cifar10")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(tmp_path, zipped):
    whole = saved(tmp_path, clustered_file(), _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "part.pth"
    for length in [0, 1, 2, 5, 30, 1000, *range(2500, len(whole) - 1, 7919), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part\.pth: expected a file of torch\.save .* got something truncated"):
            load_official(path, dataset="cifar10")


def test_a_flipped_bit_is_never_taken_for_a_weight(tmp_path):
    file = clustered_file()
    buffer = io.BytesIO()
    torch.save(file, buffer)
    whole, path = bytearray(buffer.getvalue()), tmp_path / "model.pth"
    expected = logits_in_double(load_official(saved(tmp_path, file), dataset="cifar10"), images(1))
    refused = 0
    for position in range(11, len(whole), 1999):
        whole[position] ^= 64
        path.write_bytes(whole)
        whole[position] ^= 64
        try:
            model = load_official(path, dataset="cifar10")
        except ValueError as error:
            refused += "model.pth: expected a file of torch.save" in str(error)
            continue
        # a bit of padding between the records
        assert torch.equal(logits_in_double(model, images(1)), expected)
    assert refused > 20


def test_noise_and_text_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    for content in (b"<!DOCTYPE html>", b"PK\x03\x04", np.random.default_rng(0).bytes(5000), pickle.dumps("text")[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pth: expected a file of torch\.save"):
            load_official(path, dataset="cifar10")


def own_model(dataset="svhn", *, neighbours=None, rule="soft", counts=(2,) * 10, seed=0):
    """A model of ours, with the clusters of its classes mixed."""
    torch.manual_seed(seed)
    mean, std = STATISTICS[dataset]
    encoder = ResNet18(width=2, mean=mean, std=std)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    variance = 0.01 + 0.02 * torch.rand(len(labels))
    clusters = Clusters(torch.rand(len(labels), 16), labels, variance)
    return ClusterClassifier(encoder, clusters, neighbours=neighbours, rule=rule).eval()


@pytest.mark.parametrize("neighbours", [None, 5, 50])
def test_a_saved_model_comes_back_with_the_same_logits(tmp_path, neighbours):
    model = own_model(neighbours=neighbours)
    path = tmp_path / "new" / "model.pth"
    save_official(path, model, dataset="svhn")
    again = load_official(path, dataset="svhn")
    assert torch.equal(again(images()), model(images()))
    assert isinstance(again, ClusterClassifier)
    assert again.neighbours == (None if neighbours is None else min(neighbours, 20))
    # and once more: nothing drifts
    save_official(tmp_path / "second.pth", again, dataset="svhn")
    assert torch.equal(load_official(tmp_path / "second.pth", dataset="svhn")(images()), model(images()))


@pytest.mark.parametrize("neighbours", [None, 20])
def test_a_saved_model_is_what_the_released_code_expects(tmp_path, neighbours):
    path = tmp_path / "model.pth"
    save_official(path, own_model(neighbours=neighbours), dataset="svhn")
    file = torch.load(path, weights_only=True)
    assert set(file) == {"state_dict", *CLUSTER_KEYS}
    expected = released_state()
    assert {k: v.shape for k, v in file["state_dict"].items()} == {k: v.shape for k, v in expected.items()}
    assert (file["K"], file["normalize_probs"], file["L"]) == (2, neighbours is not None, 20)
    assert file["cluster_classes"].tolist() == [c for c in range(10) for _ in range(2)]
    assert_as_released(path, file, "svhn")


def test_what_the_format_has_no_room_for_is_refused(tmp_path, as_installed):
    path = tmp_path / "model.pth"
    with pytest.raises(ValueError, match=r"dataset: expected one of .*, got 'digits'"):
        save_official(path, own_model(), dataset="digits")
    with pytest.raises(ValueError, match=r"dataset: expected an encoder with the mean of cifar10, .* got \[0\.4378"):
        save_official(path, own_model(), dataset="cifar10")
    with pytest.raises(ValueError, match=r'model: expected rule "soft", .* got \'nearest\''):
        save_official(path, own_model(rule="nearest"), dataset="svhn")
    with pytest.raises(
        ValueError, match=r"model: expected equally many clusters .* got \[2, 2, 2, 2, 2, 2, 2, 2, 2, 1\]"
    ):
        save_official(path, own_model(counts=(2,) * 9 + (1,)), dataset="svhn")
    with pytest.raises(ValueError, match=r"model: expected equally many clusters .* 10 classes of svhn, got \[2, 2\]"):
        save_official(path, own_model(counts=(2, 2)), dataset="svhn")
    small = ClusterClassifier(SmallCNN((3, 32, 32), width=2, embedding_dim=16), own_model().clusters)
    with pytest.raises(ValueError, match=r"model: expected a ResNet18 encoder, got SmallCNN"):
        save_official(path, small, dataset="svhn")
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = Path(tmp_path / "model.pth")
    save_official(path, own_model(), dataset="svhn")
    before = contents(tmp_path)
    with files_of_at_most(5000), pytest.raises(OSError, match=f"File too large: '{path}'"):
        save_official(path, own_model(seed=1), dataset="svhn")
    assert contents(tmp_path) == before
