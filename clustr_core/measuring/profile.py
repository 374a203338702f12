"""A scale at which the whole book is computed: methods, attacks, budgets, chapters' parameters, from YAML.

This module reads no tensors, so that a pipeline can ask it for names in no time.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from clustr_core.attacks.names import ATTACKS, LOSSES, PAPER_STEP_SIZE, Norm
from clustr_core.storage.files import PROFILE_NAME, digest, expanded, home
from clustr_core.storage.gate import PROFILE_LIMIT, brief, check_file, listed, read_text, shortened, shown
from clustr_core.training.fields import build, field_value, mapping, read_yaml
from clustr_core.training.recipes import METHODS, Recipe

# tables of attacks that do not hold all of a profile's attacks yet lie in this folder beside the others
PARTIAL = "partial"
# what nobody asks of an attack or a certificate: pixels lie in [0, 1], and more steps would never end
MOST = {
    "eps": 1000.0, "apgd_eps": 1000.0, "step_size": 1000.0, "steps": 1_000_000, "restarts": 100_000,
    "queries": 10_000_000, "points": 10_000_000, "samples": 100_000_000, "selection_samples": 100_000_000,
    "examples": 100_000_000, "seed": 2**63 - 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How robustness is measured: one kind of attack over a grid of eps, once for each loss; the worst of them counts.

    Args:
        attack: "pgd"; "paper" (the released rule, `paper.paper_pgd`); "cell-walk" (``restarts`` is the number of rival
            cells); "transfer" (PGD on ``source``); "square" (``steps`` is the number of queries); "autoattack"; or
            one's own (`attacks.registry.register_attack`).
        eps: the grid, in units of pixels in [0, 1].
        steps, restarts: of each attack; AutoAttack has its own.
        step_size: of every attack; None takes 2.5 eps / steps, which can cross the ball, and for "paper" the paper's
            2/255.
        losses: what "pgd", "paper" and "transfer" climb, as `gradient.pgd` takes it; empty for the usual ones.
        examples: how many test images, in an order drawn once; None for all.
        source: the method whose model "transfer" climbs.
    Raises:
        ValueError: if a number is not positive or is out of all reason, or a choice unknown.
    """

    attack: str = "pgd"
    norm: Norm = "linf"
    eps: tuple[float, ...] = ()
    steps: int = 20
    restarts: int = 1
    step_size: float | None = None
    losses: tuple[str, ...] = ()
    examples: int | None = None
    seed: int = 0
    source: str = "ce"

    def __post_init__(self) -> None:
        """Check the numbers and the choices."""
        _check_numbers(self)
        if self.attack not in ATTACKS:
            raise ValueError(f"attack: expected one of {sorted(ATTACKS)}, got {self.attack!r}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm: expected one of {get_args(Norm)}, got {self.norm!r}")
        if self.attack == "paper" and self.norm != "linf":
            raise ValueError(f"norm: expected 'linf' for attack 'paper', got {self.norm!r}")
        if not self.eps:
            raise ValueError(f"eps: expected at least one, got {self.eps}")
        if self.losses and self.attack not in ("pgd", "paper", "transfer"):
            raise ValueError(f"losses: expected none for attack {self.attack!r}, got {self.losses}")
        if unknown := [loss for loss in self.losses if loss not in LOSSES]:
            raise ValueError(f"losses: expected some of {LOSSES}, got {brief(unknown[0])}")
        if (longest := self.step_size_at(max(self.eps))) > MOST["step_size"]:
            raise ValueError(f"eps: expected steps of at most {MOST['step_size']:,}, 2.5 eps / steps, got {longest:,}")

    @property
    def climbed(self) -> tuple[str, ...]:
        """What the attack climbs: one measurement for each."""
        return self.losses or ATTACKS[self.attack]

    def step_size_at(self, eps: float) -> float:
        """The length of a step in a ball of radius ``eps``."""
        if self.step_size is not None:
            return self.step_size
        return PAPER_STEP_SIZE if self.attack == "paper" else 2.5 * eps / self.steps


@dataclass(frozen=True, kw_only=True)
class Examination:
    """On what the diagnostics judge the paper's evaluation of each method.

    Args:
        eps: radius of the ball, in units of pixels in [0, 1].
        examples: how many test images, in an order drawn once.
        steps, restarts: of the evaluation that is judged; with less than 10 restarts the paper's is reduced.
        queries: for Square.
    Raises:
        ValueError: if a number is not positive.
    """

    eps: float
    examples: int = 64
    steps: int = 20
    restarts: int = 2
    queries: int = 300

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class SandwichBudget:
    """What each attack that searches for the nearest misclassified image may spend.

    Args:
        examples: how many test images, in an order drawn once; None for all.
        steps, restarts: of fmn, ddn, and of PGD inside the certified balls (under each of its two losses); the r-th
            restart of fmn and ddn heads for the r-th likeliest wrong class.
        points: random directions on the sphere of the certified radius.
        apgd_eps: radii, in units of pixels in [0, 1], at which AutoAttack's APGD is run; none leaves it out.
    Raises:
        ValueError: if a number is not positive.
    """

    examples: int | None = None
    steps: int = 100
    restarts: int = 1
    points: int = 1000
    apgd_eps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self)


@dataclass(frozen=True, kw_only=True)
class SmoothingBudget:
    """What the certificate of randomised smoothing may spend.

    Args:
        examples: how many test images, in an order drawn once; None for all.
        samples, selection_samples: noisy copies of an image for the bound, and for the choice of the class.
        failure_prob: with which a certificate may be wrong.
    Raises:
        ValueError: if a number is not positive, or the probability not below 1.
    """

    examples: int | None = None
    samples: int = 1000
    selection_samples: int = 100
    failure_prob: float = 0.001

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self)
        if self.failure_prob >= 1:
            raise ValueError(f"failure_prob: expected less than 1, got {self.failure_prob}")


def _check_numbers(asked: Protocol | Examination | SandwichBudget | SmoothingBudget) -> None:
    """Numbers are positive, a seed may be 0, and none is larger than anybody means."""
    for item in fields(asked):
        value = getattr(asked, item.name)
        most = MOST.get(item.name, math.inf)
        if isinstance(value, tuple) and len(set(map(_as_in_a_table, value))) < len(value):
            raise ValueError(f"{item.name}: expected each once, got {brief(value)}")
        for number in value if isinstance(value, tuple) else (value,):
            if number is None or isinstance(number, str):
                continue
            if not (0 < number < math.inf or (item.name == "seed" and number == 0)):
                raise ValueError(f"{item.name}: expected a positive number, got {brief(number)}")
            if number > most:
                raise ValueError(f"{item.name}: expected at most {most:,}, got {brief(number)}")
        if item.type in (int, int | None) and value is not None and type(value) is not int:
            raise ValueError(f"{item.name}: expected a whole number, got {brief(value)}")


def _as_in_a_table(value: float | str) -> str:
    """A number with the digits that tables keep."""
    return value if isinstance(value, str) else f"{value:.9g}"


@dataclass(frozen=True)
class Profile:
    """A scale at which the whole book is computed: its runs, its measurements, its chapters' parameters.

    Args:
        name: its tables lie in ``results/<name>/``.
        sha256: of the file that it was read from.
        path: that file, by which other programs read it too; None for a profile that no file holds.
    """

    name: str
    recipes: dict[str, Recipe]
    attacks: dict[str, Protocol]
    certified_examples: int | None = None
    examination: Examination | None = None
    sandwich: SandwichBudget | None = None
    smoothing: SmoothingBudget | None = None
    chapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    sha256: str = ""
    path: Path | None = None

    def __post_init__(self) -> None:
        """An attack can only be transferred from a method of the profile."""
        for name, protocol in self.attacks.items():
            if protocol.attack == "transfer" and protocol.source not in self.recipes:
                expected = sorted(self.recipes)
                raise ValueError(f"attacks.{name}.source: expected one of {expected}, got {protocol.source!r}")

    @property
    def ordinary(self) -> dict[str, Recipe]:
        """The methods without a guarantee: the paper's, and what it is compared with."""
        return {name: recipe for name, recipe in self.recipes.items() if recipe.guarantee == "none"}

    @property
    def lipschitz(self) -> dict[str, Recipe]:
        """The methods on 1-Lipschitz encoders, which certify."""
        return {name: recipe for name, recipe in self.recipes.items() if recipe.guarantee == "lipschitz"}

    @property
    def attacked(self) -> dict[str, Recipe]:
        """The methods that attacks are run on: all but smoothing, whose base classifier is not what it certifies."""
        return self.ordinary | self.lipschitz

    def attacks_on(self, method: str) -> dict[str, Protocol]:
        """The attacks that a method is asked: all but those that would be transferred from it to itself."""
        return {name: each for name, each in self.attacks.items() if each.attack != "transfer" or each.source != method}

    @property
    def measured(self) -> dict[str, list[str]]:
        """Which methods each kind of table covers: ``results/<name>/<kind>-<method>.csv``."""
        return {
            "attacks": [method for method in self.attacked if self.attacks_on(method)],
            "certificates": [*self.recipes, "prototypes"] if self.recipes else [],
            "diagnostics": [*self.ordinary] if self.examination else [],
            "ablations": [*self.ordinary] if self.examination else [],
            "sandwich": [*self.lipschitz] if self.sandwich else [],
        }

    @property
    def tables(self) -> list[tuple[str, str]]:
        """Kind and method of each table of `measured`."""
        return [(kind, method) for kind, methods in self.measured.items() for method in methods]

    def protocol(self, table: str) -> dict[str, Any]:
        """What the rows of a kind of table follow: the pipeline makes them anew when it changes, their sidecar says it.

        Args:
            table: "attacks", "certificates", "diagnostics", "ablations" or "sandwich".
        """
        return {
            "attacks": lambda: {name: asdict(protocol) for name, protocol in self.attacks.items()},
            "certificates": lambda: {"examples": self.certified_examples, "smoothing": _as_dict(self.smoothing)},
            "diagnostics": lambda: {"examination": _as_dict(self.examination)},
            "ablations": lambda: {"examination": _as_dict(self.examination)},
            "sandwich": lambda: {"sandwich": _as_dict(self.sandwich), "certified_examples": self.certified_examples},
        }[table]()


def _check_told_apart(protocols: dict[str, Protocol], where: str) -> None:
    """Raises a ValueError if two attacks are of one kind, norm, eps and loss, by which alone rows tell them apart."""
    seen: dict[tuple[object, ...], str] = {}
    for name, each in protocols.items():
        radii = map(_as_in_a_table, each.eps)
        for mark in ((each.attack, each.norm, eps, loss) for eps, loss in product(radii, each.climbed)):
            if (other := seen.setdefault(mark, name)) != name:
                raise ValueError(
                    f"{where}: attacks.{name}: expected another attack, norm, eps or loss than {other}, got both "
                    f"with {', '.join(map(str, mark))}; put the other strength into a profile of its own"
                )


def _as_dict(budget: Examination | SandwichBudget | SmoothingBudget | None) -> dict[str, Any] | None:
    return None if budget is None else asdict(budget)


# profiles in a message
MOST_NAMED = 12
# folders of results/ and results/published/ that are of no profile
OTHERS = ("published", "bench", "full-width", "strangers")
_BUDGETS = {"examination": Examination, "sandwich": SandwichBudget, "smoothing": SmoothingBudget}


def reduced_protocol(protocol: Protocol, profile: Profile) -> Protocol:
    """The paper's protocol with one restart, at the eps at which AutoAttack is run if it is one of its own, else at its
    first; any other attack as it is."""
    if protocol.attack != "paper":
        return protocol
    referees = [each for each in profile.attacks.values() if each.attack == "autoattack" and each.norm == protocol.norm]
    shared = [eps for each in referees for eps in each.eps if eps in protocol.eps]
    return replace(protocol, eps=((*shared, *protocol.eps)[0],), restarts=1)


def load_profile(name: str | Path) -> Profile:
    """The profile ``profiles/<name>.yaml`` of the book's root, or a YAML file (.yaml, .yml) by its path.

    A file in the book's own folder is called by its stem; any other, and one there that ends in .yml, by its stem and
    six digits of its path's digest, so that two files of one name do not overwrite each other's tables.

    Keys: ``shared`` (fields of every recipe), ``methods`` (the fields of each; ``warm_start`` names another method),
    ``attacks`` (a `Protocol` each), ``certified_examples`` (at least as many as all attacks see at one eps; None for
    all), ``examination``, ``sandwich`` and ``smoothing`` (an `Examination`, a `SandwichBudget`, a `SmoothingBudget`),
    ``chapters`` (parameters of each notebook), ``plugins`` (modules, or Python files beside the profile, that register
    methods, encoders and attacks of one's own; they are imported, which runs them). Fractions such as 8/255 are
    numbers, everywhere; numbers are decimal; no key may stand twice.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key or method, or a value without meaning; the key is named.
    """
    path = _path_of(name)
    try:
        return _loaded(path)
    except ValueError as error:
        raise ValueError(shortened(str(error))) from error


def _loaded(path: Path) -> Profile:
    text = read_text(path, limit=PROFILE_LIMIT)
    content = mapping(read_yaml(text, path.name), path.name)
    parts = ("shared", "methods", "attacks", "chapters")
    known = [*parts, "certified_examples", "plugins", *_BUDGETS]
    if unknown := sorted(set(content) - set(known), key=str):
        raise ValueError(f"{path.name}: unknown key {unknown}, expected some of {known}")
    shared, methods, attacks, chapters = (mapping(content.get(key), f"{path.name}: {key}") for key in parts)
    # before anything that may be named by what they register
    for plugin in field_value(content.get("plugins") or (), tuple[str, ...], f"{path.name}: plugins"):
        _import_plugin(plugin, path)
    chapters = {key: mapping(values, f"{path.name}: chapters.{key}") for key, values in chapters.items()}
    protocols = {key: _protocol(values, f"{path.name}: attacks.{key}") for key, values in attacks.items()}
    _check_told_apart(protocols, path.name)
    where = f"{path.name}: certified_examples"
    examples = field_value(content.get("certified_examples"), int | None, where)
    if examples is not None and examples < 1:
        raise ValueError(f"{where}: expected a positive number, got {examples}")
    _check_covered(protocols, examples, where)
    budgets = {
        key: build(kind, mapping(content[key], f"{path.name}: {key}"), f"{path.name}: {key}")
        for key, kind in _BUDGETS.items()
        if content.get(key) is not None
    }
    recipes, source = _recipes(methods, shared, path.name), {"sha256": digest(text), "path": path}
    if len(datasets := sorted({recipe.dataset for recipe in recipes.values()})) > 1:
        raise ValueError(f"{path.name}: methods: expected one data set for all, got {listed(datasets)}")
    try:
        return Profile(_name_of(path), recipes, protocols, examples, chapters=chapters, **source, **budgets)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _check_covered(protocols: Mapping[str, Protocol], examples: int | None, where: str) -> None:
    """Certificates of as many images as any accuracy under attack stands on: tables print the two side by side."""
    if examples is None:
        return
    balls = {(each.norm, eps) for each in protocols.values() for eps in each.eps}
    for norm, eps in sorted(balls):
        seen = [each.examples for each in protocols.values() if each.norm == norm and eps in each.eps]
        if (fewest := min((count for count in seen if count is not None), default=None)) is None or fewest > examples:
            expected = "no number (all test images)" if fewest is None else f"{fewest} at least"
            raise ValueError(f"{where}: expected {expected}, as the attacks at {norm} {eps:g} have, got {examples}")


def _path_of(name: str | Path) -> Path:
    """The file of a profile, absolute."""
    folder = home() / "profiles"
    path = expanded(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not os.path.lexists(path):
        known = sorted(p.stem for p in folder.glob("*.yaml"))[:MOST_NAMED]
        raise FileNotFoundError(f"profile: expected one of {known} or a YAML file, got {shown(str(name))}")
    check_file(path, limit=PROFILE_LIMIT)
    if not PROFILE_NAME.fullmatch(path.stem):
        raise ValueError(f"profile: expected a file name of letters, digits, - and _, got {brief(path.name)}")
    return path.resolve()


def _name_of(path: Path) -> str:
    own = path.parent == (home() / "profiles").resolve() and path.suffix == ".yaml"
    if own and path.stem in OTHERS:
        raise ValueError(
            f"profile: expected another name than those of folders in results/, {list(OTHERS)}, got {path.stem}"
        )
    if own and _is_number(path.stem):
        raise ValueError(f"profile: expected a name that no command line takes for a number, got {path.stem}")
    return path.stem if own else f"{path.stem}-{digest(str(path))[:6]}"


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def _import_plugin(name: str, profile: Path) -> None:
    """A module by its name, or a Python file beside the profile, which is then a module of its stem's name."""
    where = f"{profile.name}: plugins"
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = (profile.parent / name).resolve()
        known = sys.modules.get(path.stem)
        if known is not None and Path(getattr(known, "__file__", None) or "").resolve() != path:
            raise ValueError(f"expected another file name, since a module {path.stem!r} is there already")
        if known is None:
            _load_file(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: expected modules that can be imported, got {name!r} ({error})") from error


def _load_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _protocol(values: Any, where: str) -> Protocol:
    return build(Protocol, mapping(values, where), where)


def _recipes(methods: dict[str, dict], shared: dict[str, Any], where: str) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for method, values in methods.items():
        if method not in METHODS:
            expected = f"some of {sorted(METHODS)}, or one that a module under plugins registers"
            raise ValueError(f"{where}: unknown method {brief(method)}, expected {expected}")
        values = {**shared, **mapping(values, f"{where}: methods.{method}")}
        if (start := values.pop("warm_start", None)) is not None:
            if not isinstance(start, str) or start not in recipes:
                key = f"{where}: methods.{method}.warm_start"
                raise ValueError(f"{key}: expected a method above it, got {brief(start)}")
            values["warm_start"] = recipes[start]
        recipes[method] = build(METHODS[method], values, where=f"{where}: methods.{method}")
    return recipes
