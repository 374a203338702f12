"""Write the modules of the widgets where the pages find them: notebooks/widgets/<name>.mjs.

python -m tools.widgets
"""

from pathlib import Path

from clustr_core.drawing import widgets
from clustr_core.storage.files import home, write_string


def write(root: Path) -> list[Path]:
    """Write every widget's module below ``root``; returns the files."""
    paths = {name: root / f"notebooks/widgets/{name}.mjs" for name in widgets.names()}
    for name, path in paths.items():
        write_string(path, widgets.module(name))
    return list(paths.values())


if __name__ == "__main__":
    write(home())
