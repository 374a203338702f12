"""What is read off a pickle before PyTorch reads it."""

import collections
import io
import pickle
import zipfile

import pytest
import torch

from clustr_core.storage import pickles
from clustr_core.storage.pickles import NotPlain, check_pickles


def saved(content, **how):
    written = io.BytesIO()
    torch.save(content, written, **how)
    return written.getvalue()


def pickle_of(content):
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))


PLAIN = {
    "tensors": {"a": torch.ones(2), "b": torch.nn.Parameter(torch.zeros(3).half()), "c": torch.ones(2).bool()},
    "kinds": [torch.float32, torch.bfloat16, torch.Size([1, 2]), torch.device("cpu")],
    "an ordered dict": collections.OrderedDict(a=1, b=collections.Counter("aab"), c={1, 2}),
    "words and numbers": {"x": [1, 2.0, None, True, "y" * 1000, 10**30], (1, (2, 3)): ((),) * 100},
    "half precision and whole": [torch.ones(2, dtype=kind) for kind in (torch.uint8, torch.int64, torch.complex64)],
}


@pytest.mark.parametrize("content", PLAIN.values(), ids=PLAIN.keys())
def test_plain_content_is_let_through_in_both_formats(content):
    check_pickles(pickle_of(content))
    check_pickles(saved(content, _use_new_zipfile_serialization=False), 5)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (bytearray(3), "builtins.bytearray|__builtin__.bytearray"),
        (torch.UntypedStorage(3), "torch.storage"),
        (1j, "complex"),
    ],
)
def test_what_else_is_asked_for_is_named(content, name):
    with pytest.raises(NotPlain, match=name):
        check_pickles(pickle.dumps(content, 2) if isinstance(content, bytearray | complex) else pickle_of(content))


@pytest.mark.parametrize("protocol", [4, 5])
def test_names_from_the_stack_are_refused(protocol):
    with pytest.raises(NotPlain, match="the instruction STACK_GLOBAL"):
        check_pickles(pickle.dumps(collections.OrderedDict(), protocol))


def nested(levels, width):
    value = ()
    for _ in range(levels):
        value = (value,) * width
    return value


@pytest.mark.parametrize(("levels", "width"), [(60, 2), (6, 100)])
def test_a_value_that_could_not_be_hashed_in_a_lifetime_is_refused(levels, width):
    bomb = pickle.dumps({"x": nested(levels, width)}, 2)
    with pytest.raises(NotPlain, match="values in values"):
        check_pickles(bomb)
    check_pickles(pickle.dumps({nested(12, 2): 1}, 2))


def test_many_hashes_are_too_many_as_one_is():
    heavy = nested(14, 2)
    check_pickles(pickle.dumps([{heavy: 1}], 2))
    head = b"\x80\x02]" + pickle.dumps(heavy, 2)[2:-1] + b"q\xff0"
    with pytest.raises(NotPlain, match="values in values"):
        check_pickles(head + b"}h\xffNsa" * 100 + b".")


def test_what_is_kept_grows_with_what_is_put_into_it():
    heavy = pickle.dumps(nested(14, 2), 2)[2:-1]
    content = b"\x80\x02}q\xfe" + heavy + b"q\xff" + b"Ns" + b"h\xfeh\xff\x85\x85Ns0" * 20
    values = pickles._Values()
    for instruction, argument, _ in pickles.pickletools.genops(content + b"."):
        values.take(instruction, argument)
        if values.kept.get(254, [0])[0] > 2**15:
            break
    assert values.kept[254][0] > 2**15


def test_the_words_of_the_last_pickle_are_returned():
    assert check_pickles(pickle.dumps("a", 2) + pickle.dumps(["b", "c"], 2), 2) == {"b", "c"}


def test_too_many_instructions_and_too_many_bytes(monkeypatch):
    content = pickle.dumps([None] * 1000, 2)
    check_pickles(content)
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 500)
    with pytest.raises(ValueError, match="more than 500 instructions"):
        check_pickles(content)
    monkeypatch.setattr(pickles, "MOST_BYTES", 50)
    with pytest.raises(ValueError, match="a pickle of 1,0"):
        check_pickles(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02N",
        b"0.",
        b"a.",
        b"(a.",
        b"\x80\x02t.",
        b"(q\x00.",
        b"q\x00.",
        b"\x80\x02NN\x87.",
        b"\xff.",
    ],
)
def test_a_damaged_pickle_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"[a-z]"):
        check_pickles(content)
