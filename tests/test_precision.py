import torch

from benchmarks.precision import InBfloat16, precision_table


def test_every_precision_has_its_row():
    table = precision_table(["ce", "clustr-cert"], [111], steps=2, epochs=1)
    assert list(table["method"]) == ["ce"] * 4 + ["clustr-cert"] * 4
    assert list(table["trained"]) == ["32-true", "32-true", "bf16-mixed", "bf16-mixed"] * 2
    assert list(table["climbed"]) == ["float32", "bfloat16"] * 4
    assert (table["robust"] <= table["clean"]).all()
    certifying = table[table["method"] == "clustr-cert"]
    assert certifying[["certified", "too_much"]].notna().all(axis=None)
    # what float32 promises beyond float64 is less than 1e-5; bfloat16 promises some images too much
    assert (certifying.loc[certifying["climbed"] == "float32", "too_much"] == 0).all()
    assert (certifying.loc[certifying["climbed"] == "bfloat16", "too_much"] > 0).all()


def test_the_surface_rounds_to_bfloat16():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    images = torch.rand(5, 1, 2, 2)
    rounded = InBfloat16(linear)(images)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, linear(images), rtol=0.02, atol=0.02)
