"""The tests under the oldest and the newest versions that the package says it works with: `make test-versions`.

Each of `constraints/oldest.txt` and `constraints/newest.txt` is installed into a virtual environment of its own under
_build/versions (6 GB each), with the package beside it, and the tests are run there. The declared ranges are what these
two prove. Both files are made by

    uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python-version 3.11.7 \\
      --python-platform x86_64-manylinux_2_28 --no-header --no-annotate -o constraints/oldest.txt

(newest: without --resolution, and with `-c` a file that says torch<=2.14.1, the newest that was tried), and
requirements.lock with -c constraints.txt --generate-hashes.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clustr_core.storage.files import home, write_string

SETS = ("oldest", "newest")


def environment_of(name: str, root: Path) -> Path:
    """The Python of a virtual environment with a set of versions, made if it is not there."""
    folder = root / "_build" / "versions" / name
    python = folder / "bin" / "python"
    done = folder / ".installed"
    wanted = (root / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", str(root / "constraints" / f"{name}.txt")], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(root)], check=True)
    write_string(done, wanted)
    return python


def main(arguments: Sequence[str] | None = None) -> int:
    """Install and test each set; the status is that of the worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETS, nargs="+", default=[*SETS])
    parser.add_argument("tests", nargs="*", help="what pytest is given; all tests unless anything is")
    options = parser.parse_args(arguments)
    root, worst = home().resolve(), 0
    for name in options.only:
        python = environment_of(name, root)
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests]
        if name == "oldest":
            # of other packages, to those that are older than they knew of
            command += ["-W", "default::DeprecationWarning", "-W", "default::PendingDeprecationWarning"]
        if not options.tests:
            command += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "loadscope", "--no-loadscope-reorder"]
        path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
        print(f"{name}: {' '.join(command[1:])}", flush=True)
        worst = max(worst, subprocess.run(command, cwd=root, env=os.environ | {"PATH": path}).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
