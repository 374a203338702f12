"""A study in legs: as much of a profile as fits into some minutes, packed so that the next leg goes on from there.

A leg works where every command does, in the book's ``runs/`` and ``results/<profile>/``; the folder only carries what
it leaves there to another machine. Trainings go on after their last epoch, measurements after the last piece that they
kept, so that the rows are those of one uninterrupted run.
"""

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from clustr_core import data
from clustr_core.measuring.attacked import attacked_targets, attacks_of, measure_pieces
from clustr_core.measuring.certified import certificate_pieces, certificates_of, prototype_certificates
from clustr_core.measuring.counterexamples import load_counterexample
from clustr_core.measuring.examination import examined
from clustr_core.measuring.pieces import CachedRows, fill_cache
from clustr_core.measuring.profile import PARTIAL, Profile, Protocol, reduced_protocol
from clustr_core.measuring.sandwiched import sandwich_of, sandwich_pieces
from clustr_core.measuring.targets import AttackTarget
from clustr_core.measuring.versions import VERSIONS, columns_of
from clustr_core.measuring.written import are_of, is_current, is_written, made_by, made_of, write_rows
from clustr_core.numerics.rounding import full_precision
from clustr_core.storage.files import alone, copy_whole, home
from clustr_core.storage.gate import check_own, shown
from clustr_core.storage.pack import Bounds, Member, Packed, pack, read_index, unpack
from clustr_core.storage.provenance import check_sidecar, sidecar_of
from clustr_core.storage.tables import read_sealed, read_table
from clustr_core.storage.tensors import read_tensors
from clustr_core.training.captured import check_captured
from clustr_core.training.loop import fit
from clustr_core.training.names import CHECKPOINT, DONE, HISTORY, WEIGHTS
from clustr_core.training.recipes import CrossEntropy, Recipe, run_folder, training_version
from clustr_core.training.run import SNAPSHOT, Run, check_stored_dtype, load_run
from clustr_core.training.state import check_checkpoint, data_kept, epochs_kept

log = logging.getLogger(__name__)
Kind = Literal["train", "attacks", "certificates", "diagnostics", "sandwich"]
# these first: with them alone the paper's claim can be judged, beside the adversarial training that takes least
HEADLINE = ("ce", "clustr", "clustr-qtrades", "fast-at")
# attacks that decide whether a claim holds, where they are in the norm of the paper's protocol; the last is the referee
DECISIVE = ("paper", "transfer", "pgd", "autoattack")
PROTOTYPES = "prototypes"
# work of a kind that was not timed yet is taken to need this share of the leg
UNKNOWN_SHARE = 0.1
# packing may take this share of the time since it was last done
PACKING_SHARE = 0.05
# gradients an image that AutoAttack spends at most: APGD on cross-entropy, targeted APGD and FAB on nine classes each
# (100 steps), and 5,000 queries of Square
_AUTOATTACK_GRADIENTS = 100 + 9 * 100 + 9 * 100 + 5000 / 3


class TimeIsUp(Exception):
    """What would come next could not be done before the end of the leg."""


@dataclass(frozen=True)
class Step:
    """One step of a method's unit.

    Args:
        attacks: of a step of the kind "attacks", all protocols whose rows the table holds after it, the step's own
            last.
    """

    method: str
    kind: Kind
    attacks: Mapping[str, Protocol] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[str, ...]:
        """The kinds of tables that the method lacks as long as this step is left."""
        if self.kind == "train":
            return ()
        return ("diagnostics", "ablations") if self.kind == "diagnostics" else (self.kind,)


@dataclass
class Clock:
    """How long a leg may go on, and how long each kind of work took last.

    Args:
        seconds: of the leg.
        now: the time, in seconds.
        reserve: seconds kept for packing.
    """

    seconds: float
    now: Callable[[], float] = time.monotonic
    reserve: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    _running: tuple[str, float, float] | None = None

    def __post_init__(self) -> None:
        """The clock starts."""
        self.begun = self.now()

    @property
    def left(self) -> float:
        """Seconds until work must end."""
        return self.begun + self.seconds - self.reserve - self.now()

    def begin(self, kind: str, work: float = 1.0) -> None:
        """Begin a piece of work, after noting how long the last one took.

        Args:
            kind: pieces of one kind take times in proportion to ``work``.
        Raises:
            TimeIsUp: if it would not be done in time, as far as is known.
        """
        self.end()
        fresh = not self.rates
        expected = self.rates[kind] * work if kind in self.rates else UNKNOWN_SHARE * self.seconds
        # the first piece of all has the whole leg
        if self.left <= (0 if fresh else expected):
            raise TimeIsUp
        self._running = (kind, work, self.now())

    def end(self) -> None:
        """The last piece of work is done."""
        if self._running is not None:
            kind, work, begun = self._running
            self.rates[kind] = (self.now() - begun) / work
            self._running = None


# what is to be done


def plan(profile: Profile) -> list[Step]:
    """All steps of a profile in the order of the legs.

    The headline methods come first: of each the training, then what decides (certificates of a method with a guarantee;
    the paper's protocol with one restart at one eps, and the correct attacks in its norm). The other attacks follow as
    a unit of their own for each of them, and after these what is costly (certificates that promise nothing,
    diagnostics, sandwich, the paper's protocol in full); then the other methods in the same way. Prototypes come last.
    """
    headline = [method for method in HEADLINE if method in profile.recipes]
    others = [method for method in profile.recipes if method not in headline]
    steps: list[Step] = []
    for methods in (headline, others):
        for unit in (first_unit, second_unit, later_unit):
            steps += [step for method in methods for step in unit(profile, method)]
    return steps + ([Step(PROTOTYPES, "certificates")] if profile.recipes else [])


def first_unit(profile: Profile, method: str) -> list[Step]:
    """The training of a method, and the rows that decide."""
    steps = [Step(method, "train")]
    if profile.recipes[method].guarantee != "none" and _is_certified(profile, method):
        steps.append(Step(method, "certificates"))
    return steps + _early_steps(profile, method, decisive=True)


def second_unit(profile: Profile, method: str) -> list[Step]:
    """The other attacks, but for the paper's protocol in full."""
    return _early_steps(profile, method, decisive=False)


def _early_steps(profile: Profile, method: str, *, decisive: bool) -> list[Step]:
    """A step for each early attack that is decisive, or is not."""
    if method not in profile.attacked:
        return []
    early = list(early_attacks(profile).items())
    return [
        Step(method, "attacks", dict(early[: place + 1]))
        for place, (_, protocol) in enumerate(early)
        if _is_decisive(protocol) == decisive
    ]


def later_unit(profile: Profile, method: str) -> list[Step]:
    """The costly rows of a method."""
    steps = []
    if profile.recipes[method].guarantee == "none":
        steps.append(Step(method, "certificates"))
    if method in profile.ordinary and profile.examination is not None:
        steps.append(Step(method, "diagnostics"))
    if method in profile.lipschitz and profile.sandwich is not None:
        steps.append(Step(method, "sandwich"))
    early, whole = early_attacks(profile), profile.attacks
    if method in profile.attacked:
        late = [name for name in whole if early[name] != whole[name]]
        held = {name: protocol for name, protocol in early.items() if name not in late}
        steps += [
            Step(method, "attacks", {**held, **{name: whole[name] for name in late[:count]}})
            for count in range(1, len(late) + 1)
        ]
    return steps


def early_attacks(profile: Profile) -> dict[str, Protocol]:
    """A profile's attacks, the paper's protocol with one restart at one eps: first those that decide, in the order of
    `DECISIVE`, then the others from cheap to costly."""

    def place(protocol: Protocol) -> tuple[int, float]:
        rank = DECISIVE.index(protocol.attack) if _is_decisive(protocol) else len(DECISIVE)
        return rank, gradients(protocol)

    reduced = {name: reduced_protocol(each, profile) for name, each in profile.attacks.items()}
    return dict(sorted(reduced.items(), key=lambda item: place(item[1])))


def _is_decisive(protocol: Protocol) -> bool:
    return protocol.attack in DECISIVE and protocol.norm == "linf"


def gradients(protocol: Protocol) -> float:
    """Input gradients that an attack may spend on an image, over all of its eps and losses; a query is a third."""
    return len(protocol.eps) * len(protocol.climbed) * _gradients_once(protocol)


def _gradients_once(protocol: Protocol) -> float:
    if protocol.attack == "autoattack":
        return _AUTOATTACK_GRADIENTS
    return protocol.steps / 3 if protocol.attack == "square" else protocol.steps * protocol.restarts


def _is_certified(profile: Profile, method: str) -> bool:
    return profile.recipes[method].guarantee != "smoothing" or profile.smoothing is not None


def steps_left(profile: Profile) -> list[Step]:
    """The steps of a plan whose tables are neither in ``results/<profile>`` nor published."""
    folders = [_results(profile), home() / "results/published" / profile.name]

    def is_done(kind: str, method: str) -> bool:
        return any(is_written(folder, profile, kind, method) for folder in folders)

    steps = plan(profile)
    tables = [step for step in steps if any(not is_done(kind, step.method) for kind in step.tables)]
    unfinished = {step.method for step in tables}
    return [step for step in steps if step in tables or (step.kind == "train" and step.method in unfinished)]


def tables_left(profile: Profile) -> list[str]:
    """The names of the tables that are left, in the order of the plan."""
    steps = steps_left(profile)
    return list(dict.fromkeys(f"{kind}-{step.method}" for step in steps for kind in step.tables))


# a leg


@dataclass(frozen=True)
class Leg:
    """What a leg did.

    Args:
        written: the tables that it wrote, by their paths below ``results/<profile>``.
        left: the names of the tables that are left for later legs.
        packed: what the folder holds now.
    """

    written: tuple[str, ...]
    left: tuple[str, ...]
    packed: Packed


def run_leg(
    profile: Profile,
    folder: Path,
    clock: Clock,
    bounds: Bounds,
    *,
    half: bool = False,
    captured: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Leg:
    """Do as much of a profile as fits, and pack it; go on from what an earlier leg left in the folder.

    Tables that are published already are put beside the new ones, so that the last leg leaves the whole study in
    ``results/<profile>``. Nothing is begun that would not be done in time, as far as is known: the first piece of a
    kind is not known, and a first epoch or piece that takes longer than the leg is done all the same. Whatever ends the
    leg, an error too, what is there is packed; a killed leg has packed shortly before.

    Args:
        folder: of the pack. What it holds is put where it is missing here, or has gone further than here.
        half: keep finished networks in half precision (`run.stored_dtype`), so that they travel in half the bytes.
            Their rows are measured on exactly those weights, and their sidecars and ``run.json`` say so.
        captured: as `loop.fit` takes it, and `targets.target_of` for the attacks.
    Raises:
        ValueError: before any work is done, if the folder holds the leg of another profile, version or precision, or
            lacks a part, or has a damaged one, or if its finished runs are not those that are here; after the work, if
            a method failed, such as one that diverged: the others have had their turn.
    """
    if captured:
        check_captured(torch.device(device), 1)
    # so that nothing is made where the leg is refused
    _check_leg(profile, folder, half=half, captured=captured)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, busy=f"--into: expected a folder in which no other leg is at work, got {folder}"):
        _prepare(profile, folder, bounds, half=half, captured=captured)
        return _go_on(_Work(profile, folder, clock, bounds, half, captured, torch.device(device), progress))


def _go_on(work: "_Work") -> Leg:
    """As `run_leg`, from what is there."""
    profile = work.profile
    failed: dict[str, str] = {}
    try:
        for step in steps_left(profile):
            if failed.keys() & _methods_needed(profile, step.method):
                continue
            try:
                work.take(step)
            except (ValueError, RuntimeError) as error:
                failed[step.method] = str(error)
                log.error("%s: %s; the other methods go on", step.method, error)
            work.clock.end()
            work.pack_if_due()
    except TimeIsUp:
        log.info("the time is up")
    finally:
        packed = work.pack()
        _take_published(profile)
    if failed:
        raise ValueError("; ".join(f"{method}: {error}" for method, error in failed.items()))
    # a partial table may have given way to the whole one
    written = [name for name in dict.fromkeys(work.written) if (_results(profile) / name).exists()]
    return Leg(tuple(written), tuple(tables_left(profile)), packed)


@dataclass
class _Work:
    """A leg at work."""

    profile: Profile
    folder: Path
    clock: Clock
    bounds: Bounds
    half: bool
    captured: bool
    device: torch.device
    progress: bool
    packed_at: float = 0.0
    packing: float = 0.0
    # the models of the method that is attacked, and the last step whose rows are not in a table yet
    attacked: tuple[str, list] | None = None
    partial: dict[str, Step] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    datasets: dict[str, data.Dataset] = field(default_factory=dict)
    # what a later pack must have, too
    kept: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.packed_at = self.clock.now()
        self.index = read_index(self.folder)
        self._check_kept(_groups(self.profile))

    def take(self, step: Step) -> None:
        """Do one step."""
        log.info("%s: %s", step.method, _said(step))
        if step.method == PROTOTYPES:
            self.clock.begin(PROTOTYPES)
            rows = prototype_certificates(self.profile, self._dataset(next(iter(self.profile.recipes.values()))))
            self._write(step.kind, PROTOTYPES, None, rows)
            return
        if step.kind == "train":
            self._train(step.method)
            return
        recipe = self.profile.recipes[step.method]
        run = load_run(run_folder(recipe), expected=recipe)
        {
            "attacks": self._attack,
            "certificates": self._certify,
            "diagnostics": self._diagnose,
            "sandwich": self._sandwich,
        }[step.kind](step, run)

    def _train(self, method: str) -> None:
        for recipe in _needed(self.profile, method):
            before = partial(self._before, f"epoch of {recipe.method}")
            options = {"half": self.half, "captured": self.captured, "device": self.device, "progress": self.progress}
            fit(recipe, dataset=self._dataset(recipe), before_epoch=before, **options)

    def _attack(self, step: Step, run: Run) -> None:
        profile, (name, protocol) = self.profile, list(step.attacks.items())[-1]
        if self.attacked is None or self.attacked[0] != step.method:
            early = {f"{each}, reduced": reduced for each, reduced in early_attacks(profile).items()}
            both = replace(profile, attacks=profile.attacks | early)
            where = self._dataset(run.recipe), self.device
            self.attacked = step.method, attacked_targets(run, both, *where, captured=self.captured)
        attacked: list[AttackTarget] = []
        for target, its, source in self.attacked[1]:
            if its == protocol and target not in attacked:
                attacked.append(target)
                pieces = measure_pieces(target, protocol, source=source)
                kind = f"{protocol.attack} on {target.name}"
                self._fill(pieces, kind, _gradients_once(protocol), f"{target.name} {name}")
        self.partial[step.method] = step
        if dict(step.attacks) == profile.attacks:
            self._write_attacks(step)

    def _write_attacks(self, step: Step) -> None:
        """The table of all attacks so far: in place if these are the profile's, else among the partial ones."""
        recipe, profile = self.profile.recipes[step.method], self.profile
        run = load_run(run_folder(recipe), expected=recipe)
        attacks = {name: step.attacks[name] for name in profile.attacks if name in step.attacks}
        mine = replace(profile, attacks=attacks)
        if attacked_targets(run, mine, self._dataset(recipe), self.device):
            rows = attacks_of(run, mine, dataset=self._dataset(recipe), device=self.device, progress=False)
            whole = attacks == profile.attacks
            self._write("attacks", step.method, run, rows, profile=mine, folder="" if whole else PARTIAL)
            if whole:
                _remove_table(_results(profile) / PARTIAL / f"attacks-{step.method}.csv")
        del self.partial[step.method]

    def _certify(self, step: Step, run: Run) -> None:
        options = {"dataset": self._dataset(run.recipe), "device": self.device}
        self._fill(certificate_pieces(run, self.profile, **options), f"certificates of {step.method}")
        self._write(step.kind, step.method, run, certificates_of(run, self.profile, progress=False, **options))

    def _diagnose(self, step: Step, run: Run) -> None:
        found = examined(run, self.profile, dataset=self._dataset(run.recipe), device=self.device)
        for piece in found.pieces():
            self._fill([piece], piece.path.name.partition("-")[0])
        self._write("diagnostics", step.method, run, found.diagnostics())
        self._write("ablations", step.method, run, found.ablations())

    def _sandwich(self, step: Step, run: Run) -> None:
        options = {"dataset": self._dataset(run.recipe), "device": self.device}
        # the attacked model must compute in float32, as its certificate assumes: TF32 is coarser
        with full_precision(self.device):
            self._fill(sandwich_pieces(run, self.profile, **options), f"sandwich of {step.method}")
            self._write(step.kind, step.method, run, sandwich_of(run, self.profile, progress=False, **options))

    def _fill(self, pieces: Sequence[CachedRows], kind: str, work: float = 1.0, title: str = "") -> None:
        before = partial(self._before, kind, work)
        options = {"device": self.device, "title": title or kind, "progress": self.progress}
        fill_cache(pieces, before_piece=before, **options)
        self.clock.end()

    def _before(self, kind: str, work: float = 1.0) -> None:
        """Between two epochs or pieces."""
        self.clock.end()
        self.pack_if_due()
        self.clock.begin(kind, work)

    def _dataset(self, recipe: Recipe) -> data.Dataset:
        if recipe.dataset not in self.datasets:
            self.datasets[recipe.dataset] = data.load_dataset(recipe.dataset)
        return self.datasets[recipe.dataset]

    def _write(
        self,
        kind: str,
        method: str,
        run: Run | None,
        rows: pd.DataFrame,
        *,
        profile: Profile | None = None,
        folder: str = "",
    ) -> None:
        made = made_by(profile or self.profile, kind, str(self.device)) | made_of(method, run)
        table = Path(folder) / f"{kind}-{method}.csv"
        write_rows(_results(self.profile) / table, rows, made)
        self.written.append(table.as_posix())

    def pack_if_due(self) -> None:
        """Pack if that costs little of the time since it was last done."""
        if self.packing <= PACKING_SHARE * (self.clock.now() - self.packed_at):
            self.pack()

    def pack(self) -> Packed:
        """Pack what is there, with a table of the attacks so far."""
        begun = self.clock.now()
        for step in list(self.partial.values()):
            self._write_attacks(step)
        # where two machines share a folder, and no locks
        if read_index(self.folder) not in (None, self.index):
            raise ValueError(
                f"--into: expected the pack that this leg began from, got one that another leg has written since in "
                f"{self.folder}; what this leg did lies in {home() / 'runs'} and {_results(self.profile)}: begin again"
            )
        groups = _groups(self.profile)
        self._check_kept(groups)
        packed = pack(
            self.folder,
            groups,
            self.bounds,
            _facts(self.profile, half=self.half, captured=self.captured),
        )
        self.index = read_index(self.folder)
        self.packed_at = self.clock.now()
        self.packing = self.packed_at - begun
        self.clock.reserve = max(self.clock.reserve, 1.5 * self.packing)
        return packed

    def _check_kept(self, groups: Sequence[Sequence[Member]]) -> None:
        """Finished runs and measured rows do not vanish: a pack of what is left would take the place of theirs."""
        names = {member.name for group in groups for member in group}
        kept = {name for name in names if name.endswith(f"/{DONE}") or "/tables/" in name}
        if lost := sorted(self.kept - kept):
            raise ValueError(
                f"{home() / lost[0]}: expected the file that this leg has seen there, got none: the pack in "
                f"{self.folder} stays as it is"
            )
        self.kept = kept


def _said(step: Step) -> str:
    return f"{step.kind}, {list(step.attacks)[-1]}" if step.attacks else step.kind


def _needed(profile: Profile, method: str) -> list[Recipe]:
    """The recipes that must have been trained before a method is measured, its own last."""
    recipe = profile.recipes[method]
    sources = {each.source for each in profile.attacks.values() if each.attack == "transfer"}
    if method in profile.ordinary and profile.examination is not None:
        sources |= {CrossEntropy.method} & set(profile.recipes)
    needed = [profile.recipes[name] for name in sorted(sources)] if method in profile.attacked else []
    return list(dict.fromkeys(each for one in (*needed, recipe) for each in _with_starts(one)))


def _methods_needed(profile: Profile, method: str) -> set[str]:
    return {method} | ({recipe.method for recipe in _needed(profile, method)} if method != PROTOTYPES else set())


def _with_starts(recipe: Recipe) -> Iterator[Recipe]:
    if recipe.warm_start is not None:
        yield from _with_starts(recipe.warm_start)
    yield recipe


def _results(profile: Profile) -> Path:
    return home() / "results" / profile.name


def _remove_table(table: Path) -> None:
    for path in (table, sidecar_of(table)):
        path.unlink(missing_ok=True)


# what travels


def _facts(profile: Profile, *, half: bool, captured: bool) -> dict[str, Any]:
    """By what a pack is known."""
    versions = {method: training_version(recipe) for method, recipe in profile.recipes.items()}
    return {
        "profile": {"name": profile.name, "sha256": profile.sha256},
        "training_versions": versions,
        "measurement_versions": VERSIONS,
        "half": half,
        "captured": captured,
    }


def _groups(profile: Profile) -> list[list[Member]]:
    """What is there, the most important first: tables, rows, weights that later steps need (those of the next ones
    first), trainings under way, other weights, snapshots."""
    root = home()
    left = dict.fromkeys(step.method for step in steps_left(profile) if step.method in profile.recipes)
    needed = list(dict.fromkeys(run_folder(recipe) for method in left for recipe in _needed(profile, method)))
    runs = list(dict.fromkeys(run_folder(each) for recipe in profile.recipes.values() for each in _with_starts(recipe)))
    published = _visible(home() / "results/published" / profile.name)
    everywhere = {path.name: path.read_bytes() for path in published if path.suffix == ".csv"}
    tables = [
        path
        for folder in (_results(profile), _results(profile) / PARTIAL)
        for path in _visible(folder)
        if path.suffix == ".csv" and sidecar_of(path).is_file() and path.read_bytes() != everywhere.get(path.name)
    ]
    groups = [[table, sidecar_of(table)] for table in tables]
    groups += [[path] for run in runs for kind in ("tables", "counterexamples") for path in _visible(run / kind)]
    done = [run for run in runs if (run / DONE).exists()]
    groups += [[run / name for name in (WEIGHTS, HISTORY, DONE)] for run in needed if run in done]
    groups += [[run / CHECKPOINT] for run in runs if run not in done and (run / CHECKPOINT).exists()]
    groups += [[run / name for name in (WEIGHTS, HISTORY, DONE)] for run in done if run not in needed]
    groups += [[path] for run in runs for path in _visible(run / "snapshots")]
    files = [group for group in groups if not any(map(_is_link, group))]
    return [[Member(path.relative_to(root).as_posix(), path) for path in group] for group in files]


def _is_link(path: Path) -> bool:
    """Whether a path is a link, which may lead to what nobody meant to give away; it is named."""
    if path.is_symlink():
        log.warning("%s: a link, which does not travel; put the file itself there", path)
    return path.is_symlink()


def _visible(folder: Path) -> list[Path]:
    """The whole files of a folder: what is being written is hidden, and what is no file does not travel."""
    if _is_link(folder):
        return []
    return sorted(path for path in folder.glob("*") if not path.name.startswith(".") and path.is_file())


def _check_has_sidecar(table: Path) -> None:
    """Refuse a table that the book has not written, since it has no sidecar, before another takes its place."""
    if table.exists() and not sidecar_of(table).exists():
        raise ValueError(
            f"expected no table without a sidecar in the place of the book's, got {shown(table)}: move it away"
        )


def _take_published(profile: Profile) -> None:
    """Put published tables that are what the profile would make into ``results/<profile>``, where none such is."""
    published = home() / "results/published" / profile.name
    for kind, method in profile.tables:
        if is_written(published, profile, kind, method) and not is_written(_results(profile), profile, kind, method):
            table = published / f"{kind}-{method}.csv"
            # the first tables do not say of which run they are: they are no reason to leave one out
            if method in profile.recipes and check_sidecar(table)["made"].get("run") is None:
                continue
            _check_has_sidecar(_results(profile) / table.name)
            # a table alone would be taken at its word
            for path in (sidecar_of(table), table):
                copy_whole(path, _results(profile) / path.name)


def _check_leg(profile: Profile, folder: Path, *, half: bool, captured: bool) -> bool:
    """Check all that can be checked; whether the folder holds a pack."""
    for place in (home() / "runs", home() / "results"):
        if folder.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"--into: expected a folder outside of {place}, where a leg works, got {folder}")
    index = read_index(folder)
    if index is not None:
        _check_facts(index, _facts(profile, half=half, captured=captured), folder)
    for recipe in profile.recipes.values():
        if (run_folder(recipe) / DONE).exists():
            run = load_run(run_folder(recipe), expected=recipe)
            check_stored_dtype(run, half=half)
            run.check_same()
    return index is not None


def _prepare(profile: Profile, folder: Path, bounds: Bounds, *, half: bool, captured: bool) -> None:
    """Put what the folder holds where it belongs, if it is this leg's."""
    if not _check_leg(profile, folder, half=half, captured=captured):
        # so that a folder whose index was lost is told from one whose first leg was killed
        pack(folder, [], bounds, _facts(profile, half=half, captured=captured))
        return
    with _scratch() as unpacked:
        unpack(folder, unpacked)
        _restore(unpacked, home(), profile)


NAMES_OF_FACTS = {"half": "half precision (--half)", "captured": "captured updates (--captured)"}


def _check_facts(index: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    for name, value in expected.items():
        # packs of before say nothing of `captured`, and were not
        if (found := index.get(name, False)) != value:
            what = NAMES_OF_FACTS.get(name, name.replace("_", " "))
            said, got = _differing(value, found), _differing(found, value)
            raise ValueError(f"--into: expected a leg of {what} {said}, got one of {got} in {folder}")


def _differing(value: Any, other: Any) -> str:
    """A value, of which only what differs from the other is said."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return str({key: item for key, item in value.items() if other.get(key) != item})
    return str(value)


@contextmanager
def _scratch() -> Iterator[Path]:
    """An empty folder beside the runs, for one leg at a time; what a killed one left in it is removed."""
    runs = home() / "runs"
    folder = runs / ".unpacked"
    runs.mkdir(parents=True, exist_ok=True)
    with alone(runs):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _restore(unpacked: Path, root: Path, profile: Profile) -> None:
    """Move what was unpacked to where it is missing, damaged or behind; what is here otherwise stays.

    Raises:
        ValueError: before anything is moved, if a run there is no run of the profile's, or is finished here as another,
            or a table here has no sidecar.
    """
    _check_places(unpacked, profile)
    recipes = _runs_of(profile)
    runs = [(run, root / "runs" / run.name) for run in sorted((unpacked / "runs").glob("*"))]
    for theirs, mine in runs:
        _check_run(theirs, mine, recipes[theirs.name])
    results = Path("results") / profile.name
    tables = [path for path in sorted(_files(unpacked / results)) if path.suffix == ".csv"]
    places = {theirs: root / results / theirs.relative_to(unpacked / results) for theirs in tables}
    for mine in places.values():
        _check_has_sidecar(mine)
    for theirs, mine in runs:
        mine.mkdir(parents=True, exist_ok=True)
        # not while it is trained
        with alone(mine):
            _restore_run(theirs, mine)
    check_own(root / results / PARTIAL)
    for theirs, mine in places.items():
        if _worth(theirs, profile) > _worth(mine, profile):
            # a table alone would be taken at its word
            for path, target in ((sidecar_of(theirs), sidecar_of(mine)), (theirs, mine)):
                _move(path, target)
    for kind, method in profile.tables:
        if is_written(root / results, profile, kind, method):
            _remove_table(root / results / PARTIAL / f"{kind}-{method}.csv")


def _check_places(unpacked: Path, profile: Profile) -> None:
    """Raises a ValueError if a pack has what no leg of the profile puts into one, or a table without its sidecar."""
    runs = _runs_of(profile)
    for path in sorted(each for each in unpacked.rglob("*") if each.is_file() or not any(each.iterdir())):
        match path.relative_to(unpacked).parts:
            case ("runs", run, name):
                is_ours = run in runs and name in (CHECKPOINT, WEIGHTS, HISTORY, DONE)
            case ("runs", run, kind, _):
                is_ours = run in runs and kind in READERS
            case ("results", profile.name, _) | ("results", profile.name, "partial", _):
                both = (path.with_suffix(".csv"), path.with_suffix(".json"))
                is_ours = path in both and all(each.is_file() for each in both)
            case _:
                is_ours = False
        if not is_ours or not path.is_file() or path.name.startswith("."):
            raise ValueError(
                f"--into: expected a pack of runs and tables, got one with {shown(path.relative_to(unpacked))}"
            )


def _runs_of(profile: Profile) -> dict[str, Recipe]:
    """The recipes of a profile, and what they start from, by the names of their runs' folders."""
    return {run_folder(each).name: each for recipe in profile.recipes.values() for each in _with_starts(recipe)}


def _check_run(theirs: Path, mine: Path, recipe: Recipe) -> None:
    """Raises a ValueError if what a pack has of a run could not be loaded here, or is another finished run."""
    try:
        if any((theirs / name).exists() for name in (WEIGHTS, HISTORY, DONE)):
            load_run(theirs, expected=recipe).weights()
        if (theirs / CHECKPOINT).exists():
            check_checkpoint(theirs / CHECKPOINT, recipe)
    except (ValueError, OSError) as error:
        raise ValueError(f"--into: expected a pack of runs that are whole, got {error}") from error
    if (theirs / DONE).exists() and (mine / DONE).exists():
        _check_same_weights(theirs, mine)
    of_theirs, of_mine = _data_of(theirs), _data_of(mine)
    if of_theirs and of_mine and of_theirs != of_mine:
        raise ValueError(
            f"--into: expected of the run {mine.name} one on the training data {of_mine[:10]}, as in {mine.parent}, "
            f"got one on {of_theirs[:10]}; move one of the two away"
        )


def _data_of(run: Path) -> str | None:
    """The digest of the training data of a run, finished or under way; None where there is none, or a damaged one."""
    with suppress(ValueError, OSError):
        if (run / DONE).exists():
            return load_run(run).train_data_sha256
        if (run / CHECKPOINT).exists():
            return data_kept(run / CHECKPOINT)
    return None


def _worth(table: Path, profile: Profile) -> int:
    """What a table of a profile is worth: none or a damaged one nothing, one of an earlier protocol or of other weights
    little, and else the more, the more attacks it is of."""
    try:
        sidecar = check_sidecar(table)
    except (ValueError, OSError):
        return 0
    made, (kind, _, method) = sidecar["made"], table.stem.partition("-")
    if (kind, method) not in profile.tables or sidecar["table"]["columns"] != columns_of(kind):
        return 1
    said = {}
    if table.parent.name == PARTIAL:
        said, made = made.get("protocol") or {}, {**made, "protocol": None}
        if not are_of(profile, said):
            return 1
    return 2 + len(said) if is_current(made, profile, kind, method) else 1


def _check_same_weights(theirs: Path, mine: Path) -> None:
    found, expected = (load_run(folder).weights_sha256[:10] for folder in (theirs, mine))
    if found != expected:
        raise ValueError(
            f"--into: expected the run {mine.name} with the weights {expected}, as in {mine.parent}, got {found}; "
            "move one of the two away"
        )


# what lies in the folders of a run, and knows its digest
READERS: Mapping[str, Callable[[Path], object]] = {
    "tables": read_sealed,
    "snapshots": lambda path: read_tensors(path, SNAPSHOT),
    "counterexamples": load_counterexample,
}


def _restore_run(theirs: Path, mine: Path) -> None:
    finished, behind = (mine / DONE).exists(), _is_behind(mine, theirs)
    gives_way = behind or ((theirs / DONE).exists() and not finished)
    if gives_way and (noted := _losses(mine)) != _losses(theirs)[: len(noted)]:
        # snapshots of another training than the one that takes its place
        check_own(mine / "snapshots")
        shutil.rmtree(mine / "snapshots", ignore_errors=True)
    # what says that a run is whole comes last
    for path in sorted(_files(theirs), key=lambda path: (path.name == DONE, path)):
        target = mine / path.relative_to(theirs)
        # what a killed finish left here without run.json is not the finished run from there
        wanted = {CHECKPOINT: behind, WEIGHTS: not finished, HISTORY: not finished}
        if target.parent != mine:
            check_own(target.parent)
        if wanted.get(path.name, not _is_sound(target, READERS.get(path.parent.name, Path.stat))):
            _move(path, target)


def _is_sound(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether a file is there and can be read as what it is; one that cannot gives way to the one that travelled."""
    try:
        read(path)
    except (ValueError, OSError):
        return False
    return path.exists()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _losses(run: Path) -> list[str]:
    """What a training has noted so far, to the digits that tables keep: by this, two of one recipe are told apart."""
    try:
        if (run / DONE).exists():
            rows = read_table(run / HISTORY).to_dict("records")
        elif (run / CHECKPOINT).exists():
            rows = read_tensors(run / CHECKPOINT, "a checkpoint")[1]["history"]
        else:
            rows = []
        return [f"{row['loss']:.9g}" for row in rows]
    except (ValueError, KeyError, TypeError, OSError):
        # what is damaged is like no other
        return [str(run)]


def _is_behind(mine: Path, theirs: Path) -> bool:
    """Whether a training has gone further there than here."""
    if (mine / DONE).exists() or not (theirs / CHECKPOINT).exists():
        return False
    here = epochs_kept(mine / CHECKPOINT) if (mine / CHECKPOINT).exists() else -1
    return epochs_kept(theirs / CHECKPOINT) > here


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.replace(target)
    except OSError as error:
        # runs and results may lie on two disks
        if error.errno != errno.EXDEV:
            raise
        copy_whole(path, target)
        path.unlink()
