"""What the book says of a profile: its rows, and the tables that the chapters and the first page make of them.

The rows are the regenerated ones, ``results/<profile>/``, where every table of the profile is there, else the
published ones, ``results/published/<profile>/``, else they are measured now. PyTorch is imported only where something
is measured.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from clustr_core.attacks.names import Norm
from clustr_core.certificates.names import HARD_BOUNDS
from clustr_core.measuring.accuracy import (
    at_eps,
    best_bound,
    both_protocols,
    certified_accuracy,
    on_common_images,
    robust_accuracy,
    robust_accuracy_by_loss,
    summary_table,
)
from clustr_core.measuring.profile import PARTIAL, Profile, Protocol, load_profile
from clustr_core.measuring.written import are_of, asked_of, differing, is_current
from clustr_core.storage.files import home, read_json
from clustr_core.storage.gate import TABLE_LIMIT, brief, read_bytes
from clustr_core.storage.provenance import check_sidecar, note_read, read_checked, sidecar_of
from clustr_core.training.fields import build, field_value
from clustr_core.training.recipes import epochs_in_words, run_folder, run_keys

log = logging.getLogger(__name__)

# the profile that `make figures` runs, and whose run makes the twins
BOOK = "quick"
# what each method is called, in the order in which the book shows them
METHOD_NAMES = {
    "ce": "cross-entropy",
    "ce-clusters": "cross-entropy, clusters fitted after",
    "pgd-at": "PGD adversarial training",
    "trades": "TRADES",
    "free-at": "free adversarial training",
    "fast-at": "fast adversarial training",
    "clustr": "ClusTR",
    "clustr-qtrades": "ClusTR+QTRADES",
    "free-clustr": "free ClusTR",
    "clustr-cert": "ClusTR-cert",
    "clustr-lip": "ClusTR-lip",
    "lip-linear": "1-Lipschitz linear head",
    "smoothing": "randomised smoothing",
    "prototypes": "prototypes on raw pixels",
}
DATA_NAMES = {
    "mnist5k": "MNIST-5k",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "cifar10-jpeg": "CIFAR-10 (JPEG)",
}
# [channel, height, width] of the data sets that the book knows
SHAPES = {
    "digits": (1, 8, 8),
    "mnist5k": (1, 28, 28),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "svhn": (3, 32, 32),
    "folder:data/cifar10-jpeg": (3, 32, 32),
}
# L2 radii at which certificates are shown where a profile names none: those of the digits
RADII = (0.14, 0.28, 0.5)
HEADINGS = {
    "clean": "clean, %",
    "paper": "paper's protocol, %",
    "correct": "correct attacks, %",
    "certified": "certified, %",
}
CHANGES = ("released", "bookkeeping", "steps", "target", "surface", "all")
# attack and loss -> heading of a table
ATTACK_NAMES = {
    ("paper", "ce"): "paper's",
    ("pgd", "ce"): "PGD, ce",
    ("pgd", "margin"): "PGD, margin",
    ("pgd", "dlr"): "PGD, DLR",
    ("cell-walk", "cells"): "cell walk",
    ("transfer", "margin"): "transfer",
    ("square", "margin"): "Square",
    ("autoattack", "standard"): "AutoAttack",
}
# of claims.csv, on CIFAR-10 in L-infinity: defences by clusters, prototypes or distances, and after them what
# they are held against; what each is called, and whether it was trained on attacks
KIN = {
    "clustr-qtrades": ("ClusTR+QTRADES, the authors' model", "in one step"),
    "pcl": ("PCL", "no"),
    "mmc": ("MMC, retrained by others", "no"),
    "mmc-at": ("MMC", "yes"),
    "tla": ("TLA", "yes"),
    "he-trades": ("hypersphere embedding, TRADES", "yes"),
    "he-at": ("hypersphere embedding", "yes"),
    "madry": ("adversarial training alone", "yes"),
    "trades-authors": ("TRADES alone", "yes"),
}
LOSSES = {"ce": "ce", "margin": "margin", "dlr": "DLR"}
# networks that others trained, by the names of their tables
STRANGERS = {
    "standard": "ResNet-18 for CIFAR-10, no defence, 8/255",
    "adversarial": "small CNN for MNIST, adversarial training, 0.3",
}
# of the paper's ResNet-18
FULL_WIDTH = 64
ABSENT = "–"
Source = Literal["regenerated", "published", "measured now"]


@dataclass(frozen=True)
class Study:
    """One profile, its rows and where they come from.

    Args:
        folder: of its tables; None measures what is asked for.
        radii: L2, in pixels of [0, 1], at which its certificates are shown.
    """

    profile: Profile
    source: Source
    folder: Path | None
    radii: tuple[float, ...] = RADII

    @property
    def name(self) -> str:
        """The profile's."""
        return self.profile.name

    @property
    def dataset(self) -> str:
        """The data set, as its recipes name it."""
        return next(iter(self.profile.recipes.values())).dataset

    @property
    def data(self) -> str:
        """The data set without the folders in which it lies."""
        return self.dataset.split("/")[-1]

    @property
    def data_name(self) -> str:
        """The data set, as the prose calls it; with the width of the networks where it is the paper's."""
        name = DATA_NAMES.get(self.data, self.data)
        ordinary = self.profile.ordinary.values()
        wide = any(each.encoder == "resnet18" and each.width == FULL_WIDTH for each in ordinary)
        return f"{name}, width {FULL_WIDTH}" if wide else name

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[channel, height, width] of an image.

        Raises:
            ValueError: for images in a folder of which nothing is known yet.
        """
        if self.dataset in SHAPES:
            return SHAPES[self.dataset]
        for recipe in self.profile.recipes.values():
            if (record := run_folder(recipe) / "run.json").exists():
                return tuple(read_json(record)["image_shape"])
        raise ValueError(f"dataset: expected one of {sorted(SHAPES)} or a finished run on it, got {self.dataset!r}")

    @property
    def pixels(self) -> int:
        """Of an image, channels counted one by one."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def photographs(self) -> bool:
        """Whether its images have colours; their radii are then printed in steps of a byte, 8/255."""
        return self.shape[0] == 3

    def amount(self, radius: float) -> str:
        """A radius as it is printed: "8/255" for photographs where that is a whole number of bytes, else "0.1"."""
        steps = round(255 * radius)
        return f"{steps}/255" if self.photographs and abs(255 * radius - steps) < 1e-3 else f"{radius:.3g}"

    def eps(self, norm: Norm = "linf") -> float:
        """Where the methods are compared: the first eps of AutoAttack in that norm, else of the first attack in it.

        Raises:
            ValueError: if no attack of the profile is in that norm.
        """
        there = [each for each in self.profile.attacks.values() if each.norm == norm]
        if not there:
            raise ValueError(f"profile {self.name}: expected an attack in {norm}, got none")
        return next((each for each in there if each.attack == "autoattack"), there[0]).eps[0]

    @property
    def title(self) -> str:
        """The data and the eps of the comparison."""
        return f"{self.data_name}, eps {self.amount(self.eps())}"

    @property
    def paper(self) -> Protocol:
        """The paper's protocol, as the profile runs it.

        Raises:
            ValueError: if the profile does not.
        """
        for protocol in self.profile.attacks.values():
            if protocol.attack == "paper":
                return protocol
        raise ValueError(f"profile {self.name}: expected an attack 'paper', got none")

    @property
    def ordinary(self) -> list[str]:
        """The methods without a guarantee, "ce-clusters" among them, in the order in which they are shown."""
        return in_order(set(self.attacks["method"]) - set(self.profile.lipschitz))

    @property
    def lipschitz(self) -> list[str]:
        """The methods on 1-Lipschitz encoders, in the order in which they are shown."""
        return in_order(self.profile.lipschitz)

    @property
    def certifying(self) -> list[str]:
        """Whatever has a guarantee, prototypes included, in the order in which it is shown."""
        return in_order(set(self.certificates["method"]) - set(self.profile.ordinary))

    @cached_property
    def attacks(self) -> pd.DataFrame:
        """Rows of `attacked.measure`, of all methods."""
        return self._rows("attacks")

    @cached_property
    def certificates(self) -> pd.DataFrame:
        """Rows of `certified.certificate_table`, of all methods and of the prototypes."""
        return self._rows("certificates")

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """The findings of the battery, of all methods without a guarantee."""
        return self._rows("diagnostics")

    @cached_property
    def ablations(self) -> pd.DataFrame:
        """The paper's evaluation with one thing put right at a time, of all methods without a guarantee."""
        return self._rows("ablations")

    @cached_property
    def sandwich(self) -> pd.DataFrame:
        """What searches for the nearest misclassified image found, of all methods on 1-Lipschitz encoders."""
        return self._rows("sandwich")

    def _rows(self, kind: str) -> pd.DataFrame:
        methods = self.profile.measured[kind]
        if self.folder is None:
            tables = [_measured(self.profile, kind, method) for method in methods]
        else:
            tables = [read_checked(path) for method in methods if (path := _table(self.folder, kind, method)).exists()]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def read_study(
    profile: str | Path | Profile, *, published: bool = False, radii: Sequence[float] | None = None
) -> Study:
    """A profile with its rows: regenerated if all of its tables are, as it would make them today; else published, else
    measured when asked for.

    Args:
        profile: as `load_profile` takes it, or a profile.
        published: measure nothing, and take the published rows first: regenerated ones only where those are none of the
            profile's today.
        radii: for certificates; None takes those of the profile's chapter 7, else `RADII`.
    Raises:
        FileNotFoundError: if ``published`` and a table is not; the first that is missing is named.
        ValueError: if ``published`` and a table is of other recipes or protocols than the profile's today.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    shown = _radii(profile) if radii is None else tuple(radii)
    folders: dict[Source, Path] = {
        "regenerated": home() / "results" / profile.name,
        "published": home() / "results/published" / profile.name,
    }
    found: dict[Source, tuple[list[Path], Path | None]] = {}
    for source, folder in sorted(folders.items(), reverse=not published):
        missing = _missing(profile, folder)
        outdated = None if missing else _outdated(profile, folder, weights=source == "regenerated")
        if not missing and outdated is None:
            return Study(profile, source, folder, shown)
        found[source] = missing, outdated
    if published:
        missing, outdated = found["published"]
        if outdated is None:
            command = f"make publish PROFILE={profile.name}"
            raise FileNotFoundError(f"{missing[0]}: expected a published table, got none: {command} makes it")
        raise ValueError(f"{outdated}: expected rows of profile {profile.name} as it is today, got those of another")
    log.warning(
        "%s: expected rows in %s, got none: they are trained for and measured now, which may take long; "
        "make figures PROFILE=%s does it once, and goes on where it was killed",
        profile.name, folders["regenerated"], profile.name,
    )  # fmt: skip
    return Study(profile, "measured now", None, shown)


def studies_beside(mine: Study) -> dict[str, Study]:
    """A profile's study, and after it the published ones of the larger profiles, by name; not `BOOK`."""
    others = (name for name in published_profiles() if name not in (BOOK, mine.name))
    return {mine.name: mine, **{name: read_study(name, published=True) for name in others}}


def published_profiles() -> list[str]:
    """The names of the book's profiles of which all rows are published, as those would be measured today."""
    profiles = [(load_profile(folder.name), folder) for folder in _published()]
    whole = [(profile, folder) for profile, folder in profiles if not _missing(profile, folder)]
    return sorted(profile.name for profile, folder in whole if not _outdated(profile, folder, weights=False))


def studies_in_part() -> list[Study]:
    """The profiles of which some rows are published, as those that are made in legs: the methods that were attacked, by
    all attacks or by those that decide (`leg.plan`), with what else there is of them."""
    return [part for folder in _published() if (part := _in_part(load_profile(folder.name), folder)) is not None]


def as_far_as_published(name: str) -> Study:
    """A profile's published rows, whether they are all there or some.

    Raises:
        FileNotFoundError: if none are.
    """
    profile = load_profile(name)
    return _in_part(profile, home() / "results/published" / profile.name) or read_study(profile, published=True)


def _published() -> list[Path]:
    known = sorted(path.stem for path in (home() / "profiles").glob("*.yaml"))
    folders = [home() / "results/published" / name for name in known]
    for folder in folders:
        note_read(folder)
    return [folder for folder in folders if folder.is_dir()]


def _in_part(profile: Profile, folder: Path) -> Study | None:
    """The methods whose attacks are in a folder; None if all tables are, or of no method."""
    tables = {method: _table(folder, "attacks", method) for method in profile.attacked}
    there = {method: profile.recipes[method] for method, path in tables.items() if _is_of(profile, method, path)}
    if not _missing(profile, folder) or not there:
        return None
    attacks = {name: each for method in there for name, each in _attacks_asked(profile, tables[method]).items()}
    attacks = {name: each for name, each in attacks.items() if each.attack != "transfer" or each.source in there}
    return Study(replace(profile, recipes=there, attacks=attacks), "published", folder, _radii(profile))


def _is_of(profile: Profile, method: str, table: Path) -> bool:
    """Whether there are attacks on a method's run, by this version of its training or an earlier one; whole ones as the
    profile asks for them today."""
    if not table.exists():
        return False
    if not sidecar_of(table).exists():
        return True
    made, asked = check_sidecar(table)["made"], asked_of(profile, "attacks", method)
    said = made.get("protocol") or {}
    if table.parent.name == PARTIAL and are_of(profile, said):
        asked["protocol"] = said
    if made.get("run") in run_keys(profile.recipes[method]):
        del asked["run"]
    if wrong := differing(made, asked):
        log.warning("%s: expected rows of %s, got those of another %s: not shown", table, method, wrong[0])
    return not wrong


def _attacks_asked(profile: Profile, table: Path) -> Mapping[str, Protocol]:
    """The attacks whose rows a table holds: all of the profile's, but for a partial one."""
    if table.parent.name != PARTIAL:
        return profile.attacks
    asked = check_sidecar(table)["made"].get("protocol")
    if not asked:
        raise ValueError(f"{table}: expected a sidecar that says which attacks the rows are of, got {brief(asked)}")
    return {name: build(Protocol, values, f"{table.name}: {name}") for name, values in asked.items()}


def _table(folder: Path, kind: str, method: str) -> Path:
    """Where a table lies, or would: attacks that are not all there are among the partial ones."""
    whole = folder / f"{kind}-{method}.csv"
    partial = folder / PARTIAL / whole.name
    return partial if partial.exists() and not whole.exists() else whole


def _radii(profile: Profile) -> tuple[float, ...]:
    given = profile.chapters.get("07-certified", {}).get("radii", RADII)
    return field_value(given, tuple[float, ...], f"profile {profile.name}: chapters.07-certified: radii")


def in_order(methods: Sequence[str] | set[str] | Mapping[str, object]) -> list[str]:
    """Methods in the order of `METHOD_NAMES`, and after them those of one's own by name."""
    order = {name: place for place, name in enumerate(METHOD_NAMES)}
    return sorted(methods, key=lambda name: (order.get(name, len(order)), name))


def method_name(method: str) -> str:
    """What a method is called in a table or figure; a method of one's own by its name."""
    return METHOD_NAMES.get(method, method)


def where(table: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """The rows of a table for which a mask is true."""
    return pd.DataFrame(table[mask])


def with_interval(share: float, low: float, high: float) -> str:
    """A share with its interval, in per cent: "55.1 [52.0, 58.2]", which no line break divides."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}[{100 * low:.1f},\N{NO-BREAK SPACE}{100 * high:.1f}]"


def with_intervals(table: pd.DataFrame, value: str = "accuracy") -> list[str]:
    """`with_interval` of each row: a column of shares and the columns low and high."""
    return [with_interval(*row) for row in table[[value, "low", "high"]].itertuples(index=False)]


def beside(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of several data sets, one under the other, with what each is called in a first column ``data``."""
    if not tables:
        return pd.DataFrame({"data": ["no published rows"]})
    return pd.concat(tables, names=["data"]).reset_index(level="data").reset_index(drop=True)


def protocol_curves(study: Study) -> pd.DataFrame:
    """`accuracy.both_protocols` of the methods without a guarantee; correct attacks without AutoAttack, which comes on
    fewer images."""
    rows = study.attacks
    return both_protocols(where(rows, (rows["attack"] != "autoattack") & rows["method"].isin(study.ordinary)))


def summary(study: Study, norm: Norm = "linf") -> pd.DataFrame:
    """`accuracy.summary_table` at the eps of the comparison, with the column ``profile``."""
    eps, certificates = study.eps(norm), study.certificates
    found = summary_table(study.attacks, certificates, eps=eps, pixels=study.pixels, norm=norm)
    return found.assign(profile=study.name)


def protocol_table(study: Study) -> pd.DataFrame:
    """Claimed, epochs, clean, by the paper's protocol, correctly attacked, certified: in words, a row each method."""
    cells = _wide(summary(study), "column", study.ordinary + study.lipschitz, list(HEADINGS))
    cells.insert(0, "claimed", [_claimed_of(study, method) for method in cells.index])
    cells.insert(1, "epochs", [epochs_of(study, method) for method in cells.index])
    return _titled(cells.rename(columns=HEADINGS))


def epochs_of(study: Study, method: str) -> str:
    """How long a method was trained, in passes of its own: "12", or "12 + 5" after a start from cross-entropy."""
    recipes = study.profile.recipes
    return epochs_in_words(recipes[method if method in recipes else method.removesuffix("-clusters")])


def l2_table(study: Study) -> pd.DataFrame:
    """Clean, correctly attacked in L2, certified: in words, a row each method."""
    cells = _wide(summary(study, "l2"), "column", study.ordinary + study.lipschitz, ["clean", "correct", "certified"])
    cells.insert(0, "L₂ eps", study.amount(study.eps("l2")))
    return _titled(cells.rename(columns=HEADINGS))


def certified_table(study: Study, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """Clean, and certified at each of the study's radii (r1, r2, ...): in words, a row each method.

    Args:
        methods: those shown, in that order; None takes all that have a guarantee.
    """
    radii = [0.0, *study.radii]
    found = certified_accuracy(best_bound(study.certificates), radii)
    found = found.rename(columns={"certified_accuracy": "accuracy", "at": "column"})
    shown = [each for each in methods or study.certifying if each in set(found["method"])]
    cells = _wide(found, "column", shown, radii)
    first, *others = (f"at r{n}, %" for n in range(1, len(radii)))
    cells.columns = ["clean, %", f"certified {first}", *others]
    return _titled(cells.assign(images=found.groupby("method")["examples"].first().loc[shown]))


def attack_table(study: Study) -> pd.DataFrame:
    """Robust accuracy in % under each attack and loss on its own, and under all correct ones: a row each method."""
    rows = study.attacks
    here = on_common_images(_attacked_at(rows, study.eps()))
    alone = robust_accuracy_by_loss(here).query("eps > 0")
    alone = alone.assign(name=[ATTACK_NAMES.get(key, ", ".join(key)) for key in _pairs(alone, "attack", "loss")])
    together = robust_accuracy(where(here, here["attack"] != "paper")).query("eps > 0")
    together = together.assign(name="all but the paper's")
    wide = pd.concat([alone, together]).pivot(index="method", columns="name", values="robust_accuracy")
    order = [*ATTACK_NAMES.values(), *sorted(set(alone["name"]) - set(ATTACK_NAMES.values())), "all but the paper's"]
    methods = study.ordinary + study.lipschitz
    return _titled((100 * wide.loc[methods, [name for name in order if name in wide]]).round(1))


def full_width(kind: str = "attacks") -> pd.DataFrame:
    """Rows of one ClusTR of the paper's width (ResNet-18 of width 64, CIFAR-10): measured once, on a GPU.

    Args:
        kind: "attacks" or "certificates"; "again" for attacks on the same weights by this version on a CPU, on 64 of
            the images (`tools.given_weights`).
    Raises:
        FileNotFoundError: if there are none.
    """
    return read_checked(home() / "results/published/full-width" / f"{kind}-clustr.csv")


def measured_again(eps: float) -> pd.DataFrame:
    """Robust accuracy of the network of the paper's width under each attack, as measured then and again.

    Returns:
        columns ``attack first again``, each with its interval, in per cent: on the GPU, and on a CPU by this version
        with other starts, on the same images. The second time the weights were rounded to half precision, the paper's
        protocol had one restart in place of ten, and images were transferred from another network.
    """
    again = full_width("again")
    first = full_width()
    first = where(first, first["index"].isin(again["index"]))
    both = {"first": by_attack(first, eps), "again": by_attack(again, eps).iloc[:-1]}
    columns = {name: pd.Series(with_intervals(rows, "robust_accuracy"), rows["attack"]) for name, rows in both.items()}
    return pd.DataFrame(columns).loc[list(both["again"]["attack"])].rename_axis("attack").reset_index()


def by_attack(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    """Robust accuracy of one model under each attack and loss on its own, and under several together, with intervals.

    Args:
        rows: of `measure`, L-infinity; of an attack with several numbers of steps, the most count.
        eps: one of those at which the attacks were run.
    Returns:
        columns ``attack robust_accuracy low high examples``: the paper's protocol, PGD by each loss and by all of them
        on each image, the others, and last the worst case of all but the paper's.
    Raises:
        ValueError: if the rows have no attack in L-infinity at that eps.
    """
    here = _attacked_at(rows, eps)
    if here.empty:
        found = sorted(set(rows.loc[rows["norm"] == "linf", "eps"]))
        raise ValueError(f"eps: expected one of {found}, got {eps:g}")
    here = where(here, here["steps"] == here.groupby(["attack", "loss"])["steps"].transform("max"))
    parts = {name: where(here, here["attack"].eq(attack) & here["loss"].isin(losses)) for name, attack, losses in (
        ("paper's protocol", "paper", ("ce",)),
        *((f"PGD, {name}", "pgd", (loss,)) for loss, name in LOSSES.items()),
        ("PGD, the worst of the three", "pgd", tuple(LOSSES)),
        ("cell walk", "cell-walk", ("cells",)),
        ("Square", "square", ("margin",)),
        ("transfer", "transfer", ("ce", "margin")),
        ("AutoAttack", "autoattack", ("standard",)),
    )}  # fmt: skip
    parts["all but the paper's"] = where(here, here["attack"] != "paper")
    found = [robust_accuracy(part).query("eps > 0").assign(attack=name) for name, part in parts.items() if len(part)]
    return pd.DataFrame(
        pd.concat(found, ignore_index=True), columns=["attack", "robust_accuracy", "low", "high", "examples"]
    )


def widths() -> pd.DataFrame:
    """`by_attack` of ClusTR on CIFAR-10: the book's narrow network (profile cpu-cifar10), and one of the paper's width.

    Returns:
        the columns of `by_attack` with ``width``.
    """
    narrow = read_study("cpu-cifar10", published=True)
    mine = where(narrow.attacks, narrow.attacks["method"] == "clustr")
    found = {narrow.profile.recipes["clustr"].width: mine, FULL_WIDTH: full_width()}
    return pd.concat([by_attack(rows, narrow.eps()).assign(width=width) for width, rows in found.items()])


def disagreement(rows: pd.DataFrame, eps: float) -> float:
    """The share of images that PGD by one loss leaves robust and by another breaks."""
    here = _attacked_at(rows, eps)
    robust = where(here, here["attack"] == "pgd").groupby("index")["robust"].nunique()
    return float((robust > 1).to_numpy().mean())


def _attacked_at(rows: pd.DataFrame, eps: float) -> pd.DataFrame:
    """The rows of attacks in L-infinity at an eps."""
    return at_eps(where(rows, rows["norm"] == "linf"), eps)


def ablation_table(study: Study) -> pd.DataFrame:
    """Robust accuracy in % under the paper's rule, and with one thing put right: a row each method."""
    wide = study.ablations.pivot(index="method", columns="change", values="robust_accuracy")
    return _titled((100 * wide.loc[in_order(list(wide.index)), list(CHANGES)]).round(1))


def masked_methods(findings: pd.DataFrame) -> list[str]:
    """The methods whose evaluation the battery flags as a whole."""
    from clustr_core.measuring.diagnostics import verdict

    return [name for name in in_order(set(findings["method"])) if verdict(where(findings, findings["method"] == name))]


def battery_table(findings: pd.DataFrame) -> pd.DataFrame:
    """Of each method the battery's verdict, and the checks that flag it with their values: a row each method."""
    masked = masked_methods(findings)
    lines = []
    for method in in_order(set(findings["method"])):
        flagged = where(findings, (findings["method"] == method) & findings["flagged"].astype(bool))
        said = [f"{check} ({value:.3g})" for check, value in _pairs(flagged, "check", "value")]
        lines.append([method, "masked" if method in masked else "passes", ", ".join(said) or "none"])
    return _titled(pd.DataFrame(lines, columns=["method", "verdict", "checks that speak (value)"]).set_index("method"))


def checks_table(findings: pd.DataFrame) -> pd.DataFrame:
    """Of each check its threshold, the range of its values over the methods, and how many of them it flags."""
    lines = []
    for check, rows in findings.groupby("check", sort=False):
        low, high = rows["value"].min(), rows["value"].max()
        flags = f"{sum(map(bool, rows['flagged']))} of {len(rows)}"
        lines.append([check, f"{rows['threshold'].iloc[0]:.3g}", f"{low:.3g} to {high:.3g}", flags])
    return pd.DataFrame(lines, columns=["check", "threshold", "values", "methods flagged"])


def battery_summary(studies: Mapping[str, Study]) -> pd.DataFrame:
    """Of each study: what the battery flags, what it would flag without the check "no logits", and which checks speak
    about a method that passes."""
    lines = []
    for study in studies.values():
        found = study.diagnostics
        masked = masked_methods(found)
        alarms = found[found["flagged"] & ~found["method"].isin(masked)].groupby("check", sort=False)["method"]
        single = [f"{check} ({', '.join(methods)})" for check, methods in alarms]
        without = masked_methods(where(found, found["check"] != "no logits"))
        lines.append([study.title, ", ".join(masked), ", ".join(without), "; ".join(single) or "none"])
    return pd.DataFrame(lines, columns=["data", "flagged", "without 'no logits'", "single alarms about what passes"])


def silent_checks(studies: Mapping[str, Study]) -> list[str]:
    """The checks that flag no method of any study."""
    return _silent(pd.concat([study.diagnostics for study in studies.values()]))


def _silent(findings: pd.DataFrame) -> list[str]:
    speaking = set(findings.loc[findings["flagged"].astype(bool), "check"])
    return [check for check in dict.fromkeys(findings["check"]) if check not in speaking]


def certified_curve(study: Study, methods: Sequence[str], points: int) -> pd.DataFrame:
    """Certified accuracy of each method's best bound from radius 0 to twice the last of the study's."""
    best = best_bound(study.certificates)
    shown = where(best, best["method"].isin(list(methods)))
    return certified_accuracy(shown, _grid(study, points)).assign(profile=study.name)


def ladder_radii(study: Study, method: str) -> pd.DataFrame:
    """Certified radii of the images that a method classifies correctly: a row each image, a column each hard bound."""
    rows = study.certificates
    mine = rows[(rows["method"] == method) & rows["correct"]]
    return pd.DataFrame(mine.pivot(index="index", columns="bound", values="radius")[list(HARD_BOUNDS)])


def ladder_table(study: Study, methods: Sequence[str]) -> pd.DataFrame:
    """The mean of `ladder_radii`, in words: a row each method."""
    means = pd.DataFrame({method: ladder_radii(study, method).mean() for method in methods}).T
    return _titled(means.map("{:.4f}".format).rename_axis("method"))


def sandwich_at(study: Study, method: str, radii: Sequence[float]) -> pd.DataFrame:
    """`chain.sandwich_curve` of a method at some radii, checked to be in order."""
    from clustr_core.measuring import chain

    curve = chain.sandwich_curve(where(study.sandwich, study.sandwich["method"] == method), radii)
    chain.check_chain(curve)
    return curve


def sandwich_curve(study: Study, method: str, points: int) -> pd.DataFrame:
    """`sandwich_at` from radius 0 to twice the last of the study's; APGD at the radii at which it is run alone."""
    curve = sandwich_at(study, method, _grid(study, points))
    budget = study.profile.sandwich
    grid = sorted(budget.apgd_eps) if budget else []
    marks = sandwich_at(study, method, grid) if grid else curve
    kept = pd.concat([where(curve, curve["column"] != "apgd"), where(marks, marks["column"] == "apgd")])
    return kept.assign(profile=study.name, method=method)


def nearest_found(study: Study, method: str) -> pd.DataFrame:
    """Of each correctly classified image the certified radius and the smallest norm at which any attack broke it.

    Images that no attack broke are left out.
    """
    rows = study.sandwich
    mine = rows[(rows["method"] == method) & rows["correct"]].groupby("index")
    found = mine.agg(radius=("radius", "first"), norm=("norm", "min")).reset_index().assign(profile=study.name)
    return where(found, found["norm"] < float("inf"))


def bought(study: Study, prices: pd.DataFrame) -> pd.DataFrame:
    """What each method's training costs, and what it buys: robust accuracy at the eps of the comparison and certified
    accuracy at the first radius.

    Args:
        prices: columns ``method`` and ``training_ratio``.
    Returns:
        columns ``method training_ratio what accuracy``.
    """
    robust = summary(study).query("column == 'correct'")
    certain = certified_accuracy(best_bound(study.certificates), [study.radii[0]])
    certain = certain.rename(columns={"certified_accuracy": "accuracy"})
    headings = (
        f"worst case of correct attacks, $L_\\infty$ {study.amount(study.eps())}",
        f"certified, $L_2$ {study.amount(study.radii[0])}",
    )
    parts = [
        rows[["method", "accuracy"]].assign(what=what) for what, rows in zip(headings, (robust, certain), strict=True)
    ]
    both = prices[["method", "training_ratio"]].merge(pd.concat(parts), on="method")
    return pd.DataFrame(both[["method", "training_ratio", "what", "accuracy"]])


def claims(**conditions: str) -> pd.DataFrame:
    """What others print, as text with its source: the rows of ``results/claims.csv`` with these values.

    Returns:
        columns ``method dataset norm eps metric value note source where``; ``value`` as printed there, in per cent;
        ``source`` is a key of references.bib.
    """
    content = read_bytes(path := home() / "results/claims.csv", limit=TABLE_LIMIT)
    note_read(path, content)
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8")
    for column, value in conditions.items():
        table = where(table, table[column] == value)
    return pd.DataFrame(table)


def claim(**conditions: str) -> str:
    """The one value that others print under these conditions, in per cent.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = claims(**conditions)
    if len(found) != 1:
        raise ValueError(f"claims.csv: expected one row with {conditions}, got {len(found)}")
    return str(found["value"].iloc[0])


def systems_table(ours: Study | None = None) -> pd.DataFrame:
    """What systems certify in L2 on CIFAR-10, as they print it, in per cent: a row each system.

    Args:
        ours: a study of such images, whose ClusTR-cert is put beside them in a last row.
    """
    rows = claims(metric="certified", dataset="cifar10")
    wide = rows.pivot(index="method", columns="eps", values="value").loc[list(dict.fromkeys(rows["method"]))]
    radii = sorted(wide, key=Fraction)
    wide = wide[radii].astype(float).rename_axis(None, axis=1)
    wide["source"] = rows.drop_duplicates("method").set_index("method")["where"]
    if ours is not None:
        mine = where(ours.certificates, ours.certificates["method"] == "clustr-cert")
        found = certified_accuracy(best_bound(mine), [float(Fraction(radius)) for radius in radii])
        shares = (100 * found.sort_values("at")["certified_accuracy"]).round(1)
        wide.loc[f"ClusTR-cert, profile {ours.name}"] = [*shares, "this page"]
    headings = {radius: f"{'clean' if radius == '0' else radius}, %" for radius in radii}
    return wide.rename(columns=headings).rename_axis("system").reset_index()


def kin_table() -> pd.DataFrame:
    """What became of clusters, prototypes and distances as a defence, as others print it: a row each, CIFAR-10, 8/255
    (with TRADES: 0.031).

    Returns:
        columns ``name attacks network clean reported autoattack source where``; ``attacks`` says whether it was trained
        on them, the accuracies are in per cent.
    """
    rows = []
    for method, (name, attacks) in KIN.items():
        printed = claims(method=method, dataset="cifar10").set_index("metric")
        reported = printed.loc["reported" if "reported" in printed.index else "pgd"]
        autoattack = printed.loc["autoattack"]
        rows.append(
            {
                "name": name,
                "attacks": attacks,
                "network": "ResNet-18" if method == "clustr-qtrades" else reported["note"] or ABSENT,
                "clean": float(printed.loc["clean", "value"]),
                "reported": float(reported["value"]),
                "autoattack": float(autoattack["value"]),
                "source": reported["source"],
                "where": autoattack["where"],
            }
        )
    return pd.DataFrame(rows)


def strangers_table() -> pd.DataFrame:
    """Robust accuracy of networks that others trained and ship, in per cent with intervals: a row each attack, and a
    column each network."""
    columns = {}
    for name, title in STRANGERS.items():
        rows = read_checked(home() / f"results/published/strangers/attacks-{name}.csv")
        clean = robust_accuracy(rows).query("eps == 0").assign(attack="none: clean accuracy")
        found = pd.concat([clean, by_attack(rows, float(rows["eps"].iloc[0]))])
        columns[title] = pd.Series(with_intervals(found, "robust_accuracy"), found["attack"])
    return pd.DataFrame(columns).rename_axis("attack").reset_index()


def answer_table(study: Study, methods: Sequence[str] = ("clustr", "ce-clusters", "pgd-at")) -> pd.DataFrame:
    """The book's answer in a few rows: what is reported and what correct attacks leave in L-infinity, the authors'
    model first, and what is certified and what attacks leave in L2 of the methods on 1-Lipschitz encoders.

    Returns:
        columns ``part method name column accuracy``; ``part`` is "attacked" or "certified", ``column`` "reported" and
        "attacked", or "certified" and "attacked".
    """
    rows = []
    both = summary(study).set_index(["method", "column"])["accuracy"].to_dict()
    known = claims(method="clustr-qtrades", norm="linf", eps=study.amount(study.eps()))
    known = known.set_index("metric")["value"].to_dict()
    if study.data.startswith("cifar10") and {"pgd", "autoattack"} <= set(known):
        name = f"{METHOD_NAMES['clustr-qtrades']}, the authors' model"
        for column, metric in (("reported", "pgd"), ("attacked", "autoattack")):
            rows.append(("attacked", "clustr-qtrades", name, column, float(known[metric]) / 100))
    for method in methods:
        for column, protocol in (("reported", "paper"), ("attacked", "correct")):
            rows.append(("attacked", method, method_name(method), column, float(both[method, protocol])))
    for method in study.lipschitz:
        curve = sandwich_at(study, method, [study.radii[0]]).set_index("column")["accuracy"].to_dict()
        for column, name in (("certified", "certified"), ("attacked", "worst case")):
            rows.append(("certified", method, method_name(method), column, float(curve[name])))
    return pd.DataFrame(rows, columns=["part", "method", "name", "column", "accuracy"])


def protocol_lines(study: Study) -> list[str]:
    """The first page's lines of clean, the paper's protocol, correct attacks, and what is certified of it."""
    return _lines(protocol_table(study).drop(columns="claimed"))


def certified_lines(study: Study) -> list[str]:
    """The first page's lines of clean and certified accuracy at the study's radii."""
    return _lines(certified_table(study).drop(columns="images"))


def _lines(table: pd.DataFrame) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in table.itertuples(index=False)]


def _wide(table: pd.DataFrame, columns: str, methods: list[str], shown: Sequence) -> pd.DataFrame:
    """Accuracies with their intervals: a row each method, a column each of ``shown``."""
    cells = table.assign(cell=with_intervals(table)).pivot(index="method", columns=columns, values="cell")
    return cells.reindex(columns=list(shown)).loc[methods].astype(object).fillna(ABSENT).rename_axis(None, axis=1)


def _titled(table: pd.DataFrame) -> pd.DataFrame:
    """The methods of the index as a first column, by what they are called."""
    return table.rename(index=METHOD_NAMES).rename_axis(None, axis=1).reset_index()


def _pairs(table: pd.DataFrame, first: str, second: str) -> list[tuple[Any, Any]]:
    return list(zip(table[first], table[second], strict=True))


def _grid(study: Study, points: int) -> list[float]:
    return np.linspace(0, 2 * study.radii[-1], points).tolist()


def _claimed_of(study: Study, method: str) -> str:
    """What was claimed of a method on these data, at the eps of the comparison."""
    known = claims(method=method, norm="linf", eps=study.amount(study.eps()), metric="pgd")
    for dataset, value, note in zip(known["dataset"], known["value"], known["note"], strict=True):
        if study.data.startswith(dataset):
            return f"{value} % ({note})" if value else note
    return ABSENT


def _missing(profile: Profile, folder: Path) -> list[Path]:
    note_read(folder)
    names = (f"{kind}-{method}.csv" for kind, method in profile.tables)
    return [folder / name for name in names if not (folder / name).exists()]


def _outdated(profile: Profile, folder: Path, *, weights: bool) -> Path | None:
    """The first table that was made by another protocol, version or run than the profile's today, if there is one.

    Args:
        weights: whether it must be of the weights that are here, too.
    """
    for kind, method in profile.tables:
        table = folder / f"{kind}-{method}.csv"
        if not sidecar_of(table).exists():
            continue
        made = check_sidecar(table)["made"]
        held = (
            is_current(made, profile, kind, method) if weights else not differing(made, asked_of(profile, kind, method))
        )
        if not held:
            log.warning(
                "%s: expected rows as the profile would measure them today, got those of another protocol, version or "
                "run: none in this folder are shown; make figures PROFILE=%s makes them anew",
                table, profile.name,
            )  # fmt: skip
            return table
    return None


def _measured(profile: Profile, kind: str, method: str) -> pd.DataFrame:
    """A table that nobody has written yet: the run is trained, if need be, and measured."""
    from clustr_core.data import load_dataset
    from clustr_core.measuring import attacked, certified, examination, sandwiched
    from clustr_core.training.loop import fit

    if method == "prototypes":
        return certified.prototype_certificates(profile, load_dataset(next(iter(profile.recipes.values())).dataset))
    measure = {
        "attacks": attacked.attacks_of,
        "certificates": certified.certificates_of,
        "diagnostics": examination.diagnostics_of,
        "ablations": examination.ablations_of,
        "sandwich": sandwiched.sandwich_of,
    }
    return measure[kind](fit(profile.recipes[method]), profile)
