"""`clustr train | attack | diagnose | certify | sandwich | leg`: the package's calls, from a shell."""

import argparse
import contextlib
import io
import logging
import math
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import pandas as pd
import torch

from clustr_core import data
from clustr_core.attacks.ball import check_counts
from clustr_core.attacks.names import PAPER_RESTARTS, PAPER_STEPS
from clustr_core.measuring import diagnostics, stranger
from clustr_core.measuring.accuracy import at_shared_eps, both_protocols, robust_accuracy_by_loss
from clustr_core.measuring.attacked import attack_pieces, attacks_of, measure, measure_pieces
from clustr_core.measuring.certified import certificate_pieces, certificates_of, prototype_certificates
from clustr_core.measuring.counterexamples import CertificateBroken
from clustr_core.measuring.evaluation import random_state_kept
from clustr_core.measuring.examination import examined
from clustr_core.measuring.leg import Clock, run_leg
from clustr_core.measuring.pieces import CachedRows, Share, fill_cache
from clustr_core.measuring.profile import MOST, Examination, Profile, load_profile
from clustr_core.measuring.sandwiched import sandwich_of, sandwich_pieces
from clustr_core.measuring.targets import AttackTarget, check_source
from clustr_core.measuring.written import check_output, made_by, made_of, write_rows
from clustr_core.models.official import NUM_CLASSES, official_model
from clustr_core.storage.files import digest, expanded, home, write_string
from clustr_core.storage.gate import (
    RELEASED_LIMIT,
    VALUE_LIMIT,
    brief,
    is_stream,
    printable,
    read_bytes,
    shortened,
    target_of,
)
from clustr_core.storage.pack import Bounds, parse_size
from clustr_core.training.fields import read_yaml
from clustr_core.training.loop import fit
from clustr_core.training.names import DONE
from clustr_core.training.processes import count, device_here, is_first
from clustr_core.training.recipes import CERTIFIABLE, METHODS, CrossEntropy, Precision, Recipe, override, run_folder
from clustr_core.training.run import Run
from clustr_core.training.stopping import NAMES, deferred

EPILOG = """\
examples:
  clustr train   --profile quick --method clustr
  clustr train   --profile quick --method clustr --set epochs=5 --set gap=5
  clustr train   --profile cpu --method ce --set dataset=folder:data/cifar10-jpeg
  clustr attack  --profile quick --method clustr       writes results/quick/attacks-clustr.csv
  clustr diagnose --profile quick --method clustr      writes results/quick/diagnostics-clustr.csv, ablations-clustr.csv
  clustr diagnose --model my_module:build --data digits --eps 0.1 --html verdict.html
                                                       the same checks on a model of your own, on one page
  clustr certify --profile quick --method clustr-cert  writes results/quick/certificates-clustr-cert.csv
  clustr certify --profile quick --method prototypes   certifies nearest prototypes on raw pixels, without training
  clustr sandwich --profile quick --method clustr-cert searches for counterexamples; fails if it finds one
  clustr attack  --official model_best.pth --dataset cifar10 --examples 256
                                                       attacks the authors' released model under both protocols

A profile (profiles/NAME.yaml) names the dataset, the recipe of each method, and the attacks. The folder runs/ holds one
folder per run; its name is made of the recipe and the version of the training. A finished run is loaded. If a command
is killed, run it again: it resumes. Beside every table X.csv, X.json says how the table was made.

Several processes, each with its own GPU or CPU, share a training, an attack, a certificate or a sandwich:
  torchrun --nproc_per_node 8 -m clustr_core train --profile paper --method clustr
Independent jobs share a measurement of a finished run; a later call without --shard writes the table:
  clustr attack  --profile paper --method clustr --shard 3/20
Minutes on any machine add up to a study: each leg goes on from what the last one left in the folder.
  clustr leg     --profile gpu --minutes 8 --into legs/gpu

Figures come from the notebooks alone: make figures PROFILE=quick.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with one clear line and status 2, Ctrl-C and SIGTERM with one and 130 or 143."""
    _open_streams()
    options = _parser().parse_args(arguments)
    if options.precision is not None:
        options.set.append(f"precision={options.precision}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    try:
        # the first process speaks for all; any process reports its own error
        spoken = contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(io.StringIO())
        if options.threads is not None:
            _set_threads(options.threads)
        _check_output(options)
        with spoken, deferred(_WAITS):
            options.command(options)
    except KeyboardInterrupt as asked:
        number = signal.Signals(asked.args[0] if asked.args else signal.SIGINT)
        _say(f"ended by {NAMES[number]}; {_KEPT}")
        return 128 + number
    except (ValueError, TypeError, OSError, CertificateBroken) as error:
        _say(shortened(" ".join(str(error).split())))
        return 2
    except (RuntimeError, MemoryError) as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not memory:
            raise
        first = str(error).partition(". ")[0] or "out of memory"
        _say(f"{first}; take a device with more memory")
        return 2
    return 0


def _open_streams() -> None:
    """Give the null device to standard streams that are closed, as under some schedulers: else the next file that is
    opened takes their place, and bars of progress have nothing to write to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    # what is said at the end may be a path that a terminal's letters cannot spell
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(what: str) -> None:
    """One line for the user, if anybody listens: a pipe may have ended before."""
    with contextlib.suppress(OSError):
        # it may come from a stranger's file
        print("clustr:", printable(what), file=sys.stderr, flush=True)


_WAITS = "clustr: {}: the epoch or piece under way is finished first; once more ends at once"
_KEPT = "epochs and pieces that were finished are kept, and the same command goes on from there"


def _check_output(options: argparse.Namespace) -> None:
    """Refuse an --output that could not be written as asked, before any work is done for it."""
    given = getattr(options, "output", None)
    if given is None:
        return
    if options.shard is not None:
        raise ValueError(f"--output: expected none with --shard, which writes no table, got {given}")
    check_output(Path(given))


def _profile(options: argparse.Namespace, usual: str = "quick") -> Profile:
    """The profile that is asked for; an empty name, as of a variable that is not set, is none that anybody means."""
    if options.profile == "":
        raise ValueError("--profile: expected a name or the path of a YAML file, got an empty one")
    return load_profile(options.profile or usual)


def _train(options: argparse.Namespace) -> None:
    run = _run(options)
    # of a run that was finished before
    run.check_same()
    print(f"{os.path.relpath(run.path)}: {run.recipe.epochs} epochs")
    # a stranger's run may have cells that a terminal would act on
    print("\n".join(map(printable, run.history.tail(3).to_string(index=False).split("\n"))))


def _attack(options: argparse.Namespace) -> None:
    if (options.method is None) == (options.official is None):
        raise ValueError("--method, --official: expected one of the two")
    if options.official is not None:
        _attack_official(options)
        return
    for name in ("dataset", "examples"):
        if (given := getattr(options, name)) is not None:
            raise ValueError(f"--{name}: expected only with --official, since the profile says it, got {given}")
    profile, run, device = _profile(options), _run(options), _device(options)
    if options.shard is not None:
        _compute_share(attack_pieces(run, profile, device=device), options, device)
        return
    table = attacks_of(run, profile, device=device)
    _write(table, profile, options, "attacks", run)
    _print_protocols(table)


def _attack_official(options: argparse.Namespace) -> None:
    """The authors' file under the attacks of a profile, but for those that need one of our runs."""
    if options.dataset is None:
        raise ValueError(f"--dataset: expected one of {', '.join(NUM_CLASSES)} with --official, got none")
    if options.set:
        raise ValueError(f"--set: expected none with --official, which has no recipe, got {options.set}")
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples: expected a positive number, got {options.examples}")
    if options.dataset not in NUM_CLASSES:
        raise ValueError(f"dataset: expected one of {sorted(NUM_CLASSES)}, got {options.dataset!r}")
    device, path = _device(options), Path(options.official)
    # once: a training that goes on may write the file again meanwhile
    written = read_bytes(path, limit=RELEASED_LIMIT)
    target = _official_target(written, path, options.dataset, device)
    profile = _profile(options, "paper")
    protocols = {
        name: replace(each, examples=options.examples or each.examples)
        for name, each in profile.attacks.items()
        if each.attack != "transfer"
    }
    if options.shard is not None:
        pieces = [piece for each in protocols.values() for piece in measure_pieces(target, each)]
        _compute_share(pieces, options, device)
        return
    tables = [measure(target, each) for each in protocols.values()]
    table = pd.concat(tables, ignore_index=True).assign(method=target.name)
    size = "" if options.examples is None else f"-{options.examples}"
    usual = target.tables.parent / f"attacks-{profile.name}{size}.csv"
    _write_at(Path(options.output or usual), table, {
        **made_by(profile, "attacks", str(device)),
        "protocol": {name: asdict(each) for name, each in protocols.items()},
        "method": target.name, "dataset": options.dataset, "run": None, "seed": None,
        "weights_sha256": digest(written),
    }, options)  # fmt: skip
    _print_protocols(table)


def _official_target(written: bytes, path: Path, dataset: str, device: torch.device) -> AttackTarget:
    """The file's model; its rows are kept under a digest of the file."""
    model = official_model(written, path, dataset=dataset).to(device)
    identity = digest(written, dataset)
    tables = home() / "runs" / f"official-{dataset}-{identity[:10]}" / "tables"
    return AttackTarget(path.stem, lambda: model, identity, tables, data.load_dataset(dataset), device)


# of `diagnose --model`, with what they are unless given
STRANGERS = {"data": None, "eps": None, "surface": None, "html": None, "examples": 64, "steps": 20, "restarts": 2}


def _diagnose(options: argparse.Namespace) -> None:
    if count() > 1:
        raise ValueError(f"diagnose: expected one process, since processes cannot share it, got {count()}")
    if (options.method is None) == (options.model is None):
        raise ValueError("--method, --model: expected one of the two")
    if options.model is not None:
        _diagnose_stranger(options)
        return
    for name in STRANGERS:
        if (given := getattr(options, name)) is not None:
            raise ValueError(f"--{name}: expected only with --model, since the profile says it, got {given}")
    profile, run = _profile(options), _run(options)
    found = examined(run, profile, device=_device(options))
    table = found.diagnostics()
    _write(table, profile, options, "diagnostics", run)
    _write(found.ablations(), profile, options, "ablations", run)
    shown = table[["method", "check", "value", "threshold", "flagged"]]
    print(shown.to_string(index=False, float_format="%.3g"))
    for method, rows in table.groupby("method", sort=False):
        verdict = "is not to be trusted" if diagnostics.verdict(pd.DataFrame(rows)) else "shows no sign of masking"
        print(f"{_protocol_name(profile.examination)} of {method} {verdict}")


def _diagnose_stranger(options: argparse.Namespace) -> None:
    """The battery on a model of somebody else's: a page of text, and one of HTML where it is asked for."""
    # precision first: it is among what is set, too
    for name in ("profile", "precision", "set"):
        if given := getattr(options, name):
            raise ValueError(f"--{name}: expected none with --model, which has no recipe, got {given}")
    for name in ("data", "eps"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name}: expected one with --model, got none")
    size = {name: getattr(options, name) for name in ("examples", "steps", "restarts")}
    size = {name: STRANGERS[name] if given is None else given for name, given in size.items()}
    check_counts(**size)
    for name, given in size.items():
        if given > MOST[name]:
            raise ValueError(f"--{name}: expected at most {MOST[name]:,}, got {brief(given)}")
    if not 0 < options.eps <= 1:
        raise ValueError(f"--eps: expected a number above 0 and at most 1, in pixels of [0, 1], got {options.eps}")
    # absolute: the module that is asked about may leave the folder
    html = None if options.html is None else Path(options.html).absolute()
    if html is not None and (html.suffix != ".html" or html.is_dir() or not html.parent.is_dir()):
        raise ValueError(
            f"--html: expected a file name that ends in .html, in a folder that is there, got {options.html}"
        )
    if html is not None:
        _check_writable("html", html)
        if html.is_file() and stranger.MARK.encode() not in read_bytes(html, limit=RELEASED_LIMIT)[:1000]:
            raise ValueError(
                f"--html: expected no file, or an earlier call's page, got another that would be lost: {html}"
            )
    device, dataset = _device(options), data.load_dataset(options.data)
    model = stranger.built(options.model, device)
    surface = None if options.surface is None else stranger.built(options.surface, device, argument="surface")
    title = f"{options.model} on {options.data}"
    with random_state_kept():
        # for a network that draws
        torch.manual_seed(0)
        evaluation = stranger.evaluation_of(model, dataset, eps=options.eps, surface=surface, device=device, **size)
        # its backward passes are its own, too
        with stranger.named_here("model: expected one that the battery can attack"):
            table = diagnostics.ask_all(evaluation)
        lines = stranger.page(title, evaluation, table)
        if html is not None:
            from clustr_core.drawing.verdict import verdict_page

            # first, since nobody may listen any more
            try:
                write_string(html, verdict_page(title, lines, evaluation, table), asked_for=True)
            except OSError:
                print("\n".join(lines))
                raise
            lines += ["", f"{html}: the same with pictures, and the source of each check"]
        print("\n".join(lines))


def _check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written at the end, before hours of work are done for it."""
    try:
        if not is_stream(path):
            os.fsencode(path)
            with tempfile.TemporaryFile(dir=target_of(path).absolute().parent):
                pass
    except (OSError, ValueError) as error:
        raise ValueError(f"--{option}: expected a file that can be written, got {path} ({error})") from error


def _protocol_name(asked: Examination | None) -> str:
    """The paper's evaluation, and by how much it is reduced, if it is."""
    if asked is None or (asked.steps in PAPER_STEPS and asked.restarts == PAPER_RESTARTS):
        return "the paper's evaluation"
    return f"the paper's evaluation (reduced: {asked.steps} steps x {asked.restarts})"


def _print_protocols(table: pd.DataFrame) -> None:
    """Every attack on its own; then, where the paper's protocol meets another attack, what each leaves."""
    shown = {"each attack": robust_accuracy_by_loss(table)}
    if len(at_shared_eps(table)):
        shown["both protocols, on the same images"] = both_protocols(table)
    for name, rows in shown.items():
        print(f"\n{name}\n{rows.to_string(index=False, float_format='%.3f')}")


def _certify(options: argparse.Namespace) -> None:
    profile = _profile(options)
    if options.method == "prototypes":
        if options.set:
            raise ValueError(f"--set: expected none with prototypes, which have no recipe, got {options.set}")
        if options.shard is not None:
            raise ValueError("--shard: expected none with prototypes, which are certified at once")
        # one process certifies them: they take no time
        if not is_first():
            return
        run, table = None, prototype_certificates(profile)
    else:
        run, device = _run(options), _device(options)
        if options.shard is not None:
            _compute_share(certificate_pieces(run, profile, device=device), options, device)
            return
        table = certificates_of(run, profile, device=device)
    _write(table, profile, options, "certificates", run)
    numbers = ["correct", "feature_radius", "radius", "lipschitz", "lipschitz_lower_bound"]
    print(pd.DataFrame(table.groupby("bound")[numbers].mean()).to_string(float_format="%.4g"))


def _sandwich(options: argparse.Namespace) -> None:
    profile, recipe = _profile(options), _recipe(options)
    if recipe.guarantee != "lipschitz":
        raise ValueError(
            f"--method: expected one of {', '.join(profile.lipschitz)}, which certify, got {recipe.method}"
        )
    run, device = _run(options), _device(options)
    # the attacked model must compute in float32, as its certificate assumes: TF32 is coarser
    torch.backends.cudnn.allow_tf32 = False
    if options.shard is not None:
        _compute_share(sandwich_pieces(run, profile, device=device), options, device)
        return
    table = sandwich_of(run, profile, device=device)
    _write(table, profile, options, "sandwich", run)
    correct = table.loc[table["correct"]]
    nearest = correct.assign(ratio=correct["radius"] / correct["norm"])
    print(
        pd.DataFrame(nearest.groupby("attack", sort=False)[["radius", "norm", "ratio"]].median()).to_string(
            float_format="%.4g"
        )
    )
    print(f"no certificate of {len(set(correct['index']))} images is broken")


def _leg(options: argparse.Namespace) -> None:
    if count() > 1:
        raise ValueError(f"leg: expected one process, since processes cannot share it, got {count()}")
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes: expected a positive number, got {options.minutes:g}")
    bounds = Bounds(parse_size(options.pack), options.files)
    profile, device = _profile(options), _device(options)
    folder = home() / "legs" / profile.name if options.into is None else expanded(options.into)
    how = {"half": options.half, "captured": options.captured, "device": device}
    leg = run_leg(profile, folder, Clock(60 * options.minutes), bounds, **how)
    for name in leg.written:
        print(f"wrote {os.path.relpath(home() / 'results' / profile.name / name)}")
    print(f"{folder}: {leg.packed.files} files, {leg.packed.total / 1e6:.1f} MB")
    if leg.packed.left_out:
        print(f"did not fit, and stays here: {', '.join(leg.packed.left_out)}")
    print(f"left for later legs: {', '.join(leg.left) or 'nothing'}")


def _compute_share(pieces: Sequence[CachedRows], options: argparse.Namespace, device: torch.device) -> None:
    """Keep the rows of a share of a measurement; no table is written until a call without --shard finds them all."""
    index, shares = options.shard
    fill_cache(pieces, device=device, share=options.shard, title=f"share {index} of {shares}")
    print(f"share {index} of {shares}: {len(pieces[index - 1 :: shares])} of {len(pieces)} pieces are kept")


def _share(text: str) -> Share:
    """I/N of the command line."""
    index, _, shares = text.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and 1 <= int(index) <= int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N with I in 1..N, got {text!r}")
    return int(index), int(shares)


def _run(options: argparse.Namespace) -> Run:
    recipe = _recipe(options)
    # independent jobs would each train the run
    if getattr(options, "shard", None) is not None and not (done := run_folder(recipe) / DONE).exists():
        raise ValueError(f"--shard: expected a finished run, got no {os.path.relpath(done)}; run clustr train first")
    return fit(recipe, device=_device(options))


def _recipe(options: argparse.Namespace) -> Recipe:
    profile = _profile(options)
    if options.method not in profile.recipes:
        raise ValueError(
            f"method: expected one of {sorted(profile.recipes)} in {profile.name}, got {brief(options.method)}"
        )
    recipe = override(profile.recipes[options.method], _changes(options.set))
    if recipe.guarantee == "lipschitz" and recipe.encoder not in CERTIFIABLE:
        expected = f"one of {CERTIFIABLE} for {recipe.method}, since the rounding of others has no known bound"
        raise ValueError(f"encoder: expected {expected}, got {recipe.encoder!r}")
    # before anything is trained: attacks are transferred from networks of the same data
    transferred = [each.source for each in profile.attacks.values() if each.attack == "transfer"]
    for source in {_attack: transferred, _diagnose: [CrossEntropy.method]}.get(options.command, []):
        check_source(recipe, profile, source)
    return recipe


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {brief(pair)}")
        if name in changes:
            raise ValueError(f"--set: expected each field once, got {name} twice")
        try:
            changes[name] = read_yaml(value, name)
        except ValueError as error:
            raise ValueError(
                f"--set: expected YAML after {shortened(name, VALUE_LIMIT)}=, got {brief(value)}"
            ) from error
    return changes


def _device(options: argparse.Namespace) -> torch.device:
    try:
        device = torch.empty(1, device=device_here(options.device))
        # what holds no numbers is no device to compute on
        device.item()
        return device.device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError) as error:
        given, why = brief(options.device), shortened(str(error), 160)
        raise ValueError(f"--device: expected one that works here, such as cpu, got {given} ({why})") from error


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    if threads > (most := 4 * (os.cpu_count() or 1)):
        raise ValueError(f"--threads: expected at most {most}, four for each processor here, got {threads}")
    torch.set_num_threads(threads)


def _write(table: pd.DataFrame, profile: Profile, options: argparse.Namespace, kind: str, run: Run | None) -> None:
    """A table of the profile; with --set it is another run's, and lies beside that run, under the profile's name."""
    usual = home() / "results" / profile.name / f"{kind}-{options.method}.csv"
    if run is not None and options.set:
        usual = run.path / f"{kind}-{options.method}-{profile.name}.csv"
    path = Path(getattr(options, "output", None) or usual)
    made = made_by(profile, kind, str(_device(options))) | made_of(options.method, run)
    _write_at(path, table, made, options)


def _write_at(path: Path, table: pd.DataFrame, made: dict[str, Any], options: argparse.Namespace) -> None:
    """Write a table and, beside it, the sidecar that says how it was made."""
    # once more: what lies there may have come while the rows were computed
    _check_output(options)
    if is_first():
        write_rows(path, table, made, asked_for=getattr(options, "output", None) is not None)
    print(f"wrote {os.path.relpath(path)} ({len(table)} rows)")


class _Parser(argparse.ArgumentParser):
    """One whose messages are short, whatever word came."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong; end with status 2."""
        super().error(shortened(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clustr",
        description="Train the book's classifiers, attack them, certify them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command, summary in (
        ("train", _train, "train a method by its recipe, or load the finished run"),
        ("attack", _attack, "run every attack of the profile; write one row per image, attack, loss and eps"),
        ("diagnose", _diagnose, "check whether the paper's evaluation of a method is masked; write one row per check"),
        ("certify", _certify, "compute certified radii and Lipschitz bounds; write one row per image and bound"),
        ("sandwich", _sandwich, "search for the nearest misclassified images; fail if one lies in a certified ball"),
    ):
        sub = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        sub.set_defaults(command=command)
        sub.add_argument("--profile", help="NAME of profiles/NAME.yaml, or the path of a YAML file (default: quick)")
        needed = name not in ("attack", "diagnose")
        sub.add_argument("--method", required=needed, help=f"one of {', '.join(METHODS)}")
        sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a recipe's field")
        sub.add_argument("--precision", choices=get_args(Precision), help="short for --set precision=...")
        _add_machine(sub)
        if name == "attack":
            sub.add_argument(
                "--official",
                metavar="FILE",
                help="attack a released model, not a method (default profile: paper)",
            )
            sub.add_argument("--dataset", help="the released model's dataset: cifar10, cifar100 or svhn")
            sub.add_argument("--examples", type=int, help="number of test images, with --official only")
        if name == "diagnose":
            _add_stranger(sub)
        if name in ("attack", "certify", "sandwich"):
            sub.add_argument("--output", metavar="FILE.csv", help="write the table there, and FILE.json beside it")
            sub.add_argument(
                "--shard",
                type=_share,
                metavar="I/N",
                help="compute the I-th of N shares of the rows; write no table",
            )
    leg = commands.add_parser(
        "leg",
        help="do as much of a profile as fits into some minutes, and pack it for the next leg",
        description=(
            "Do as much of a profile as fits into some minutes: the headline methods first, of each the training, then "
            "its rows from cheap to costly; methods whose rows are published are left out. Go on from what an earlier "
            "leg left in the folder, and pack there what this one leaves, in files of bounded size."
        ),
    )
    leg.set_defaults(command=_leg, precision=None)
    leg.add_argument("--profile", help="NAME of profiles/NAME.yaml, or the path of a YAML file (default: quick)")
    leg.add_argument("--minutes", type=float, required=True, help="how long the leg may go on, packing included")
    leg.add_argument(
        "--into", metavar="DIR", help="the folder of the pack, which the next leg is given too (default: legs/NAME)"
    )
    leg.add_argument("--pack", default="15MB", metavar="SIZE", help="the size of a file at most (default: 15MB)")
    leg.add_argument(
        "--files",
        type=int,
        metavar="N",
        help="how many files at most; what does not fit then, the least needed, stays behind (default: any number)",
    )
    leg.add_argument(
        "--half",
        action="store_true",
        help="keep finished networks in half precision; their rows are measured so, and say so",
    )
    leg.add_argument("--captured", action="store_true", help="train and attack by CUDA graphs, on one GPU")
    _add_machine(leg)
    return parser


def _add_stranger(sub: argparse.ArgumentParser) -> None:
    """A model of somebody else's, in place of a method."""
    sub.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="judge plain PGD on what this function returns, a module from images in [0, 1] to logits; it is run",
    )
    sub.add_argument("--surface", metavar="MODULE:FUNCTION", help="what the attack climbs, if it is not the model")
    sub.add_argument("--data", help="the data, as recipes name them: digits, cifar10, folder:PATH ...")
    sub.add_argument("--eps", type=float, help="radius in L-infinity, in pixels of [0, 1]")
    sub.add_argument("--examples", type=int, help=f"test images (default: {STRANGERS['examples']})")
    sub.add_argument("--steps", type=int, help=f"of PGD (default: {STRANGERS['steps']})")
    sub.add_argument("--restarts", type=int, help=f"of PGD (default: {STRANGERS['restarts']})")
    sub.add_argument("--html", metavar="FILE.html", help="write the page there too, with pictures")


def _add_machine(sub: argparse.ArgumentParser) -> None:
    """On what a command runs."""
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the GPU if there is one)")
    sub.add_argument("--threads", type=int, help="number of CPU threads (default: PyTorch's choice)")


if __name__ == "__main__":
    sys.exit(main())
