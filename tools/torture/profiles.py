"""Hostile profiles, words of the command line, and names."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from clustr_core import cli
from clustr_core.measuring.profile import Protocol, load_profile
from clustr_core.training.fields import read_yaml
from clustr_core.training.recipes import METHODS
from tools.torture.forks import Case

GOOD = """\
shared: {dataset: digits, width: 4, train_examples: 100}
methods:
  ce: {epochs: 1}
  clustr: {warm_start: ce, epochs: 1, per_cluster: 4}
attacks:
  linf: {norm: linf, eps: [0.1], steps: 1, losses: [ce], examples: 8}
certified_examples: 8
"""
VALUES = {
    "nothing": "~",
    "text": "abc",
    "quoted": "'3'",
    "list": "[1]",
    "nested": "[[1]]",
    "map": "{a: 1}",
    "true": "true",
    "yes": "yes",
    "negative": "-1",
    "zero": "0",
    "half": "0.5",
    "huge": "1e300",
    "infinite": ".inf",
    "nan": ".nan",
    "digits": "9" * 400,
    "octal": "010",
    "sexagesimal": "1:30",
    "underscore": "1_0",
    "fraction": "8/4",
    "by-zero": "1/0",
    "date": "2020-01-01",
    "binary": "!!binary aGVsbG8=",
    "long": "x" * 5000,
    "control": '"\\e[31m\\0"',
}
_LAUGH = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
_MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 10)}]\n" for i in range(1, 9))


def cases(folder: Path, canaries: Path) -> Iterator[Case]:
    """All of them; what they need lies in ``folder``, a book of its own."""
    yield from _texts(folder, canaries)
    yield from _fields(folder)
    yield from _names(folder)
    yield from _words(folder, canaries)


def _loading(folder: Path, content: str | bytes) -> Callable[[], object]:
    """Load a profile and take a recipe of it."""

    def call() -> object:
        path = folder / "profiles" / "hostile.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return load_profile("hostile").recipes["ce"].epochs

    return call


def _texts(folder: Path, canaries: Path) -> Iterator[Case]:
    touch = f"['touch {canaries}/yaml']"
    inner = _LAUGH.replace("\n", "\n  ")
    refused = {
        **{
            f"tag {tag}": f"methods:\n  ce:\n    epochs: !!python/{tag} {touch}\n"
            for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os", "tuple")
        },
        "tag at the root": f"!!python/object/apply:os.system {touch}",
        "tag in a key": f"? !!python/object/apply:os.system {touch}\n: 1\n",
        "own tag": "!evil x",
        "aliases at the root": _LAUGH,
        "aliases of methods": f"chapters:\n  {inner}\nmethods: *a9\n",
        **{
            f"aliases in {name}": f"chapters:\n  {inner}\nmethods:\n  ce: {{epochs: 1, {name}: *a9}}\n"
            for name in ("dataset", "milestones", "encoder", "optimiser", "warm_start")
        },
        "merges": _MERGES,
        "deep lists": "methods: " + "[" * 20_000 + "]" * 20_000,
        "lists, 300 deep": "methods: " + "[" * 300 + "]" * 300,
        "deep maps": "methods: " + "{a: " * 20_000 + "1" + "}" * 20_000,
        "deep indents": "\n".join(" " * i + "a:" for i in range(1500)),
        "contains itself": "methods: &m {ce: *m}",
        "a list that contains itself": "methods: &m [*m]",
        "a key twice": "methods:\n  ce: {epochs: 1, epochs: 9}\n",
        "a method twice": "methods:\n  ce: {epochs: 1}\n  ce: {epochs: 9}\n",
        "a section twice": GOOD + "methods:\n  ce: {epochs: 9}\n",
        "unknown section": GOOD + "evil: 1",
        "unknown method": "methods: {magic: {}}",
        "dunder method": "methods: {__class__: {}}",
        "dunder field": "methods: {ce: {__class__: 1}}",
        "class variable": "methods: {ce: {guarantee: lipschitz}}",
        "a number for a key": "methods: {1: {epochs: 1}}",
        "nothing for a key": "methods: {~: {epochs: 1}}",
        "a list for a key": "methods: {[1]: {epochs: 1}}",
        "root is a list": "- a",
        "root is text": "x",
        "methods are a list": "methods: [ce]",
        "warm start is itself": "methods: {ce: {epochs: 1, warm_start: ce}}",
        "warm start comes later": "methods: {clustr: {warm_start: ce}, ce: {epochs: 1}}",
        "two documents": f"{GOOD}---\n{GOOD}",
        "NUL": b"methods: {ce: {epochs: \x001}}",
        "no UTF-8": b"methods: {ce: {dataset: \xff\xfe}}",
        "UTF-16": GOOD.encode("utf-16"),
        "tabs": b"methods:\n\tce: {}\n",
        "all bytes": bytes(range(256)),
        "10 MB of comment": GOOD.encode() + b"# " + b"x" * 10_000_000,
        "20 MB in a value": b"methods: {ce: {dataset: " + b"x" * 20_000_000 + b"}}",
        "20,000 methods": b"methods:\n" + b"".join(b"  m%d: {}\n" % i for i in range(20_000)),
        "a plugin outside": GOOD + f"plugins: ['{canaries}/../none.py']\n",
        "a plugin that is none": GOOD + "plugins: [os.system]\n",
        "an escape for a method": b'methods: {"\\e[31mred\\e[0m": {}}',
    }
    yield Case("profile", "a good one", _loading(folder, GOOD), "accepted")
    yield Case("profile", "with \\r\\n", _loading(folder, GOOD.replace("\n", "\r\n")), "accepted")
    yield Case("profile", "with a byte order mark", _loading(folder, "\ufeff" + GOOD), "either")
    yield Case("profile", "aliases unused", _loading(folder, f"chapters:\n  {inner}\n{GOOD}"), "either")
    for name, content in refused.items():
        yield Case("profile", name, _loading(folder, content))


def _fields(folder: Path) -> Iterator[Case]:
    """Each value in each field of a method, of an attack, and of what else has a size."""
    for item in fields(METHODS["clustr-qtrades"]):
        for name, value in VALUES.items():
            text = f"methods:\n  clustr-qtrades: {{{item.name}: {value}}}\n  ce: {{}}\n"
            yield Case("field", f"{item.name} {name}", _loading(folder, text), "either")
    for item in fields(Protocol):
        for name in ("nothing", "text", "list", "negative", "infinite", "digits", "long"):
            text = f"{GOOD.partition('attacks')[0]}attacks: {{a: {{eps: [0.1], {item.name}: {VALUES[name]}}}}}\n"
            expected = "refused" if item.name == "eps" and name != "list" else "either"
            yield Case("attack", f"{item.name} {name}", _loading(folder, text), expected)
    whole = read_yaml(GOOD, "good")
    sections = (
        "shared",
        "attacks",
        "chapters",
        "certified_examples",
        "examination",
        "sandwich",
        "smoothing",
        "plugins",
    )
    for section in sections:
        # what JSON writes is YAML, too
        rest = json.dumps({key: value for key, value in whole.items() if key != section})
        for name in ("text", "list", "negative", "digits", "true", "long"):
            text = f"{rest[:-1]}, {section}: {VALUES[name]}}}"
            yield Case("section", f"{section} {name}", _loading(folder, text), "either")


def _names(folder: Path) -> Iterator[Case]:
    """Names and places of profiles, and of the book."""
    places = folder / "profiles"

    def at(name: str, make: Callable[[Path], object]) -> Callable[[], object]:
        def call() -> object:
            make(places / f"{name}.yaml")
            return load_profile(name)

        return call

    makes: dict[str, Callable[[Path], object]] = {
        "directory": Path.mkdir,
        "fifo": os.mkfifo,
        "devzero": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
        "dangling": lambda path: path.symlink_to("/nowhere"),
        "memory": lambda path: path.symlink_to("/proc/self/mem"),
    }
    for name, make in makes.items():
        yield Case("place", name, at(name, make))
    for name in (
        "",
        ".",
        "..",
        "/",
        "a\0b",
        "a\nb",
        "x" * 5000,
        "--x",
        "../../../../etc/passwd",
        "/etc/passwd.yaml",
        "http://127.0.0.1/x.yaml",
        "$(touch x)",
        "a b",
        "a;b.yaml",
        "\udcff",
    ):
        yield Case("place", f"named {name[:20]!a}", lambda name=name: load_profile(name))
    yield Case("place", "dots.yaml", at("...", lambda path: path.write_text(GOOD, encoding="utf-8")))


def _words(folder: Path, canaries: Path) -> Iterator[Case]:
    """Words of the command line. What could be trained is asked for with a method that there is none of."""
    good = folder / "profiles" / "words.yaml"
    good.write_text(GOOD, encoding="utf-8")

    def run(*words: str) -> Callable[[], object]:
        return lambda: cli.main([*words])

    ce = ("--profile", "words", "--method", "ce", "--device", "cpu")
    bad_sets = {
        "a tag": f"epochs=!!python/object/apply:os.system ['touch {canaries}/set']",
        "no equals": "epochs",
        "no name": "=1",
        "dunder": "__class__=1",
        "the method": "method=clustr",
        "two lines": "epochs=1\nwidth=2",
        "deep": "epochs=" + "[" * 20_000,
        "aliases": "epochs=["
        + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]" for i in range(9))
        + "]",
        "a word for a warm start": "warm_start=ce",
        "a map for a warm start": "warm_start={method: ce}",
        "data outside": "dataset=folder:../../../etc",
        "data in /etc": "dataset=folder:/etc",
        "data with NUL": "dataset='folder:a\\0b'",
        "data of a shell": f"dataset=folder:$(touch {canaries}/data)",
        "data of the net": "dataset=http://127.0.0.1/",
        "an import for an encoder": "encoder=__import__",
        "a huge width": "width=100000000",
        "a huge batch": "batch_size=1000000000000000000",
        "many clusters": "per_class=1000000",
        "a negative seed": "seed=-1",
        "a seed of 2^64": f"seed={2**64}",
        "a long seed": f"seed={2**70}",
        "a true seed": "seed=true",
        "a huge rate": "learning_rate=1e300",
        "a negative rate": "learning_rate=-1",
        "a negative decay": "weight_decay=-1",
        "no decay": "weight_decay=.nan",
        "nothing": "epochs=",
        "another precision": "precision=16-true",
        "a huge crop": "crop_padding=100000",
        "a long name": "x" * 100_000 + "=1",
        "a long value": "encoder=" + "x" * 100_000,
    }
    for name, word in bad_sets.items():
        yield Case("word", f"--set {name}", run("train", *ce, "--set", word))
    yield Case("word", "--set twice", run("train", *ce, "--set", "epochs=1", "--set", "epochs=2"))
    options = {
        "no threads": ("train", *ce, "--threads", "0"),
        "many threads": ("train", *ce, "--threads", "100000"),
        "negative threads": ("train", *ce, "--threads", "-1"),
        "an unknown device": ("train", *ce[:-1], "evil"),
        "meta": ("train", *ce[:-1], "meta"),
        "mps": ("train", *ce[:-1], "mps"),
        "a long device": ("train", *ce[:-1], "x" * 10_000),
        "no method": ("train", "--profile", "words", "--method", ""),
        "a method outside": ("train", "--profile", "words", "--method", "../x"),
        "a long method": ("train", "--profile", "words", "--method", "x" * 10_000),
        "share 0": ("attack", *ce, "--shard", "0/3"),
        "a negative share": ("attack", *ce, "--shard", "-1/3"),
        "a huge share": ("attack", *ce, "--shard", "9" * 30 + "/3"),
        "a share in other digits": ("attack", *ce, "--shard", "²/3"),
        "a share of nothing trained": ("attack", *ce, "--shard", "1/3"),
        "an output that is a folder": ("attack", *ce, "--output", str(folder)),
        "an output with NUL": ("attack", *ce, "--output", "a\0b.csv"),
        "an output without an end": ("attack", *ce, "--output", str(folder / "table")),
        "an empty output": ("attack", *ce, "--output", ""),
        "no minutes": ("leg", "--profile", "words", "--minutes", "0"),
        "minutes without a number": ("leg", "--profile", "words", "--minutes", "nan"),
        "a pack of no size": ("leg", "--profile", "words", "--minutes", "1", "--pack", "0MB"),
        "an unknown word": ("train", *ce, "--evil"),
        "a model that is none": ("diagnose", "--model", "no_such:build", "--data", "digits", "--eps", "0.1"),
        "a model that is no function": ("diagnose", "--model", "math:pi", "--data", "digits", "--eps", "0.1"),
        "a released file without data": ("attack", "--official", "/dev/null"),
        "an eps of 2": ("diagnose", "--model", "math:sin", "--data", "digits", "--eps", "2"),
    }
    for name, words in options.items():
        yield Case("word", name, run(*words))
