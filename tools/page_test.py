"""Look at every page of the built site in a browser, wide, narrow and dark, and print what is wrong.

    python -m tools.page_test PATH-OF-A-BUILT-THEME

The theme is a folder with ``template.yml``, ``server.js``, ``build/`` and ``public/``, as its own build makes it. The
site is built in a throw-away copy, served by a plain web server, and driven by Playwright with the machine's Chromium.
Exit status 1 if anything is wrong.
"""

import argparse
import contextlib
import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clustr_core.storage.files import home
from tools.book_check import NOT_THE_BOOK, run_engine
from tools.browser import CHROMIUM, NAMES, served

# name, width in pixels, colours
VIEWS = (("wide", 1400, "light"), ("narrow", 390, "light"), ("dark", 1400, "dark"))
HEAVIEST = 1_500_000
COMPRESSED = {".html", ".json", ".mjs", ".svg", ".csv"}
# milliseconds in which a page comes to rest once its widgets are there, and for which these are waited for
REST, PATIENCE = 1500, 15_000
SHOWN = "(most) => [...document.querySelectorAll('*')].filter((each) => each.shadowRoot).length >= most"
# formulas are laid out by a style sheet from the internet: without it their invisible parts take room
FORMULAS = ".katex-mathml { display: none !important; } .katex svg { width: 1em !important; }"
# a function that is evaluated in the page; its first line is a comment
LOOK = Path(__file__).with_suffix(".js").read_text(encoding="utf-8").split("\n", 1)[1]


def build(root: Path, theme: Path, copy: Path) -> Path:
    """Build the site in a copy of the book with a theme that is at hand; returns the folder of its pages.

    Raises:
        FileNotFoundError: if ``theme`` is no built theme.
        RuntimeError: if the site could not be built, with the last lines of the builder.
    """
    for name in ("template.yml", "server.js", "build", "public"):
        if not (theme / name).exists():
            raise FileNotFoundError(f"theme: expected {theme / name}, got none: is this a built theme?")
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_THE_BOOK))
    shutil.copytree(theme, copy / "_build/templates/site/myst/book-theme", symlinks=True)
    done = run_engine(copy, kind="html")
    pages = copy / "_build/html"
    if done.returncode or not (pages / "index.html").exists():
        raise RuntimeError(f"the site could not be built: {(done.stdout + done.stderr)[-2000:]}")
    return pages


def look(browser: Any, pages: Path, names: Sequence[str]) -> list[str]:
    """What is wrong with the pages, as "page, view: complaint"."""
    from playwright.sync_api import TimeoutError as PlaywrightTimeout

    faults: list[str] = []
    anchors: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    with served(pages) as address:
        for view, width, colours in VIEWS:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours)
            for name in names:
                page, complaints = context.new_page(), []
                page.on("pageerror", lambda error, said=complaints: said.append(str(error)))
                page.on("console", lambda message, said=complaints: _keep(message, said))
                weight = {"bytes": 0}
                page.on("response", lambda answer, sum_=weight: _weigh(answer.url, address, pages, sum_))
                page.goto(f"{address}/{name}", wait_until="load")
                page.add_style_tag(content=FORMULAS)
                expected = _widgets_of(pages, name)
                with contextlib.suppress(PlaywrightTimeout):
                    page.wait_for_function(SHOWN, arg=expected, timeout=PATIENCE)
                page.wait_for_timeout(REST)
                found = page.evaluate(LOOK)
                where = f"{name or 'index'}, {view}"
                faults += [f"{where}: {fault}" for fault in (*complaints, *found["faults"])]
                if found["widgets"] != expected:
                    faults.append(f"{where}: {found['widgets']} widgets instead of {expected}")
                if weight["bytes"] > HEAVIEST:
                    faults.append(f"{where}: {weight['bytes'] / 1e6:.1f} MB beside the theme")
                anchors[name] = set(found["anchors"])
                links[name] = [link.removeprefix(address).strip("/") for link in found["links"]]
                page.close()
            context.close()
    return faults + [fault for name in names for fault in _dead_links(name, links[name], anchors, pages)]


def _widgets_of(pages: Path, name: str) -> int:
    """How many widgets a page has in its source."""
    return (pages / f"{name or 'index'}.json").read_text(encoding="utf-8").count('"type":"anywidget"')


def _keep(message: Any, said: list[str]) -> None:
    if message.type == "error" and "ERR_NAME_NOT_RESOLVED" not in message.text and "ERR_INTERNET" not in message.text:
        said.append(message.text)


def _weigh(url: str, address: str, pages: Path, total: dict[str, int]) -> None:
    """Count what a web host sends, which compresses text."""
    # the theme's own files are the same for every page, and kept by the browser
    if not url.startswith(address) or "/build/_" in url or url.endswith((".js", ".css")):
        return
    path = pages / url.removeprefix(address).partition("?")[0].strip("/")
    path = path / "index.html" if path.is_dir() else path
    if path.is_file():
        sent = path.read_bytes()
        total["bytes"] += len(gzip.compress(sent) if path.suffix in COMPRESSED else sent)


def _dead_links(name: str, links: list[str], anchors: dict[str, set[str]], pages: Path) -> Iterator[str]:
    for link in links:
        path, _, anchor = link.partition("#")
        path = path.strip("/")
        if path not in anchors and not (pages / path).exists():
            yield f"{name or 'index'}: a link leads to {path!r}, which is not there"
        elif anchor and path in anchors and anchor not in anchors[path]:
            yield f"{name or 'index'}: a link leads to {path or 'index'}#{anchor}, which is not there"


def names_of(pages: Path) -> list[str]:
    """The pages of a built site by their addresses, the first one as ''."""
    return ["", *sorted(path.stem for path in pages.glob("*.json") if (pages / path.stem / "index.html").exists())]


def _looked_at(executable: str, pages: Path, names: Sequence[str]) -> list[str]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        faults = look(browser, pages, names)
        browser.close()
    return list(dict.fromkeys(faults))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints every fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.page_test", description="Look at every page in a browser.")
    parser.add_argument("theme", type=Path, help="the folder of a built theme")
    options = parser.parse_args(arguments)
    if CHROMIUM is None:
        print(f"page-test: expected a browser, one of {', '.join(NAMES)}, got none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="clustr-pages-") as scratch:
        try:
            pages = build(home(), options.theme.resolve(), Path(scratch, "book"))
        except (FileNotFoundError, RuntimeError) as error:
            print(f"page-test: {error}", file=sys.stderr)
            return 1
        names = names_of(pages)
        faults = _looked_at(CHROMIUM, pages, names)
    print("\n".join(faults) if faults else f"{len(names)} pages, wide, narrow and dark: nothing is wrong.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
