"""Hold the GPU kernels to every compiler that the project declares: no GPU is needed, but some gigabytes of packages.

    python -m tools.compilers [--only triton-3.6.0 torch-2.11.0 ...]

Under each Triton every kernel is compiled for every architecture, as `benchmarks.kernels --compile` does for two of
them; under the oldest and the newest torch the kernels run in Triton's interpreter, held to the float64 references.
What is installed for it lies in ``_build/compilers`` and is kept.
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels import SHARED
from clustr_core.storage.files import home

# of torch 2.11, 2.12 and 2.13, 2.14, 2.15
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# and what else they need: the interpreter of Triton 3.6 makes Python numbers of arrays as NumPy 2.4 no longer does, and
# older ones warn of
TORCHES = {"2.11.0": ("numpy<2.4",), "2.14.1": ()}
OLD_NUMPY = "Conversion of an array"
NAMES = (*(f"triton-{each}" for each in TRITONS), *(f"torch-{each}" for each in TORCHES))


def check_triton(root: Path, folder: Path, requirement: str) -> int:
    """Compile every kernel under a Triton that is put before this environment's own."""
    path = os.pathsep.join([str(folder), str(root)])
    told = f"import triton; raise SystemExit(triton.__version__ != {requirement.partition('==')[2]!r})"
    if _run(root, sys.executable, "-c", told, PYTHONPATH=path) and (
        failed := _run(
            root, sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(folder), requirement
        )
        or _run(root, sys.executable, "-c", told, PYTHONPATH=path)
    ):
        return failed
    architectures = [str(arch) for arch in SHARED]
    return _run(
        root, sys.executable, "-m", "benchmarks.kernels", "--compile", "--architectures", *architectures,
        PYTHONPATH=path,
    )  # fmt: skip


def check_torch(root: Path, folder: Path, requirement: str, others: Sequence[str]) -> int:
    """Run the kernels in the interpreter of the Triton that a torch brings, in an environment of its own."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = (requirement, *others, "torchvision", "-e", ".", "pytest", "beartype")
    tests = (
        "-m",
        "pytest",
        "-q",
        "-W",
        f"ignore:{OLD_NUMPY}:DeprecationWarning",
        "tests/numerics/interpreted_kernels.py",
    )
    return _run(root, str(python), "-m", "pip", "install", *wanted) or _run(
        root, str(python), *tests, TRITON_INTERPRET="1"
    )


def _run(root: Path, *command: str, **variables: str) -> int:
    quiet = ("--quiet", "--disable-pip-version-check") if "pip" in command else ()
    return subprocess.run([*command, *quiet], cwd=root, env=os.environ | variables, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a compiler or a torch fails, each named."""
    parser = argparse.ArgumentParser(prog="python -m tools.compilers", description="Try every compiler.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    root, failed = home().resolve(), []
    for name in parser.parse_args(arguments).only:
        print(f"\n{name}", flush=True)
        package, _, version = name.partition("-")
        tried = root, root / "_build/compilers" / name, f"{package}=={version}"
        if check_triton(*tried) if package == "triton" else check_torch(*tried, TORCHES[version]):
            failed.append(name)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nevery compiler takes every kernel.")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
