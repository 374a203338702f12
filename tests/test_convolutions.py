"""The comparison of 1-Lipschitz convolutions runs, and says what it measured."""

from dataclasses import replace

from benchmarks.convolutions import KINDS, comparison
from clustr_core import data


def test_each_convolution_is_trained_and_certified(digits: data.Dataset) -> None:
    few = replace(digits, train_images=digits.train_images[:300], train_labels=digits.train_labels[:300])
    table = comparison(few, width=16, minutes=0.005, examples=40)
    assert table["convolution"].tolist() == list(KINDS)
    assert (table["epochs"] >= 1).all()
    assert (table["cpu_seconds"] > 0).all()
    assert (table["lipschitz"] <= 1 + 1e-5).all()
    assert (table["lipschitz_lower_bound"] <= table["lipschitz"]).all()
    certified = table[[name for name in table if name.startswith("certified_")]]
    # a larger radius is certified for no more images, and none is certified that is not classified correctly
    assert (certified.diff(axis=1).iloc[:, 1:] <= 0).all(axis=None)
    assert (certified.iloc[:, 0] <= table["clean_accuracy"]).all()
