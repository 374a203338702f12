"""A widget in a bare page, drawn as the published one draws it: in a shadow root, from a model that is only read."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clustr_core.drawing import widgets
from tools.browser import served

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>widget</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"></head>
<body style="margin: 8px"><figure id="figure-static"><img alt="static" width="9" height="9" src="data:image/gif;base64,\
R0lGODlhAQABAAAAACwAAAAAAQABAAA="><figcaption>A caption.</figcaption></figure><div id="host"></div>
<p id="after">The page goes on.</p>
<script type="module">
import widget from "./module.mjs";
const state = await (await fetch("./state.json")).json();
const refuse = () => { throw new Error("not implemented without a kernel"); };
const model = { get: (name) => state[name], set() {}, on() {}, off: refuse, save_changes: refuse, send: refuse };
const el = document.createElement("div");
document.getElementById("host").attachShadow({ mode: "open" }).append(el);
window.cleanup = await widget.render({ model, el });
window.rendered = true;
</script></body></html>
"""


def luminance(colour: str) -> float:
    """Relative luminance of a computed colour, "rgb(r, g, b)", as contrast is defined on."""
    channels = [float(value) / 255 for value in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@contextmanager
def bare_page(
    browser: Any,
    folder: Path,
    name: str,
    data: object,
    *,
    width: int = 760,
    dark: bool = False,
    replaces: str | None = None,
) -> Iterator[Any]:
    """An open page with a widget; fails at its end if the console has an error, or the page is wider than its window.

    Args:
        folder: an empty one, in which the page is written.
        replaces: "figure-static" hides the picture that the page has.
    """
    state = {"data": data} | ({"replaces": replaces} if replaces else {})
    (folder / "module.mjs").write_text(widgets.module(name), encoding="utf-8")
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    # in the page itself: a script that runs before it may find no document element yet
    text = PAGE.replace("<html ", '<html class="dark" ') if dark else PAGE
    (folder / "index.html").write_text(text, encoding="utf-8")
    with served(folder) as address:
        context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 500)
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{address}/index.html")
        page.wait_for_function("window.rendered === true")
        yield page
        assert not complaints, complaints
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"the page is {wide} pixels wider than its window"
        context.close()
