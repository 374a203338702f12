"""The widgets of the pages: one ES module each, the same in a published page, in a bare one and in JupyterLab.

A widget is ``esm/<name>.mjs``; what all share is ``esm/shared.mjs``. A published page copies one file a widget, so that
`module` joins the two; ``python -m tools.widgets`` writes the result to ``notebooks/widgets/``, where the pages
find it. A chapter that has a widget's data saves them with `save_widget`, as `looks.save_figure` saves a figure, and
includes the file in its prose.
"""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clustr_core.drawing.looks import Look, look_of
from clustr_core.measuring.study import method_name
from clustr_core.storage.files import figure_folder, write_string

FOLDER = Path(__file__).with_name("esm")
# of a line that is not drawn, where marks stand alone: a dash of no length, and then none
DASHES = {"-": "", "--": "6 3", "-.": "6 3 1.5 3", ":": "1.5 3", "": "0 9999"}
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./shared\.mjs";\n', re.M)


def names() -> list[str]:
    """The widgets that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.mjs") if path.stem != "shared")


def module(name: str) -> str:
    """The text of a widget's module, with what it shares with the others.

    Raises:
        ValueError: for a name that no widget has.
    """
    _check_name(name)
    shared, own = ((FOLDER / f"{stem}.mjs").read_text(encoding="utf-8") for stem in ("shared", name))
    return re.sub(r"^export ", "", shared, flags=re.M) + "\n" + _IMPORT.sub("", own)


def show(name: str, data: Mapping[str, Any]) -> Any:
    """A widget in JupyterLab.

    Args:
        data: what its module reads, as numbers, texts, lists and mappings.
    Raises:
        ValueError: for a name that no widget has, or data that JSON does not hold.
    """
    from anywidget import AnyWidget
    from traitlets import Dict

    held = json.loads(_as_json(data))
    kind = type("Widget", (AnyWidget,), {"_esm": module(name), "data": Dict(held).tag(sync=True)})
    return kind()


def save_widget(name: str, data: Mapping[str, Any], *, replaces: str | None = None, profile: str | None = None) -> Path:
    """Write figures/<profile>/widget-<name>.md: the directive that a page includes, with its data.

    Args:
        data: as `show` takes them; a key a line, so that a change can be read.
        replaces: the ``:name:`` of the figure whose picture the widget hides, where there is JavaScript.
        profile: as `looks.save_figure` takes it.
    Raises:
        ValueError: as `show`.
    """
    _check_name(name)
    lines = ",\n".join(f"{json.dumps(key)}: {_as_json(value)}" for key, value in data.items())
    shown = f"{json.dumps('replaces')}: {json.dumps(replaces)},\n" if replaces else ""
    # indented, so that the page's builder takes it for code: as prose, so long a text takes it minutes
    body = textwrap.indent(f'{{\n{shown}"data": {{\n{lines}\n}}\n}}', "    ")
    path = figure_folder(profile) / f"widget-{name}.md"
    write_string(path, f":::{{anywidget}} /notebooks/widgets/{name}.mjs\n{body}\n:::\n")
    return path


def looks(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """How the figures draw each method, for a widget that draws it too: ``name color dash marker``."""
    return {method: drawn(method_name(method), look_of(method)) for method in methods}


def drawn(name: str, look: Look) -> dict[str, str]:
    """What a widget needs of a look: ``name color dash marker``."""
    dash = DASHES[look.linestyle] if isinstance(look.linestyle, str) else "3 1 1 1 1 1"
    return {"name": name, "color": _hex(look.color), "dash": dash, "marker": look.marker}


def _check_name(name: str) -> None:
    if name not in names():
        raise ValueError(f"name: expected one of {names()}, got {name!r}")


def _hex(color: str) -> str:
    from matplotlib.colors import to_hex

    return to_hex(color)


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"data: expected finite numbers, texts, lists and mappings: {error}") from error
