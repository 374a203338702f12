"""Open the chapters in JupyterLab, set so that they read as on the page.

    python -m tools.lab [arguments of jupyter lab]

A double click opens a chapter as a notebook, and what only a built page can show is hidden. Both settings are copied
into this virtual environment; a reader's own settings of JupyterLab stay where they are, and win.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jupyter_server

from clustr_core.storage.files import copy_whole, home

SETTINGS = {
    "overrides.json": Path(sys.prefix, "share/jupyter/lab/settings"),
    "custom.css": Path(jupyter_server.__file__).parent / "static/custom",
}


def install(root: Path) -> list[Path]:
    """Put the settings of ``site/lab`` where JupyterLab of this environment reads them."""
    for name, folder in SETTINGS.items():
        copy_whole(root / "site/lab" / name, folder / name)
    return [folder / name for name, folder in SETTINGS.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status of JupyterLab."""
    root = home().resolve()
    install(root)
    given = sys.argv[1:] if arguments is None else list(arguments)
    return subprocess.run(
        [sys.executable, "-m", "jupyter", "lab", "--custom-css", f"--notebook-dir={root}", *given]
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
