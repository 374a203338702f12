"""Open the chapters in JupyterLab, set so that they read as on the page.

    python -m tools.lab [arguments of jupyter lab]

A double click opens a chapter as a notebook, and what only a built page can show is hidden. Both settings are copied
into this virtual environment, beside an administrator's; those and a reader's own stay where they are, and win.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jupyter_server

from clustr_core.storage.files import copy_whole, home

SETTINGS = {
    "overrides.json": Path(sys.prefix, "share/jupyter/lab/settings/overrides.d/clustr.json"),
    # JupyterLab reads a style of this name only
    "custom.css": Path(jupyter_server.__file__).parent / "static/custom/custom.css",
}
OURS = "/* clustr: "


def install(root: Path) -> list[Path]:
    """Put the settings of ``site/lab`` where JupyterLab of this environment reads them; a style of others stays."""
    for name, path in SETTINGS.items():
        if path.suffix == ".css" and path.exists() and not path.read_text(encoding="utf-8").startswith(OURS):
            print(f"{path}: expected none or ours, left as it is; what only a built page can show is shown as an error")
        else:
            copy_whole(root / "site/lab" / name, path)
    return list(SETTINGS.values())


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
