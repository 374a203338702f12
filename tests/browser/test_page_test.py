"""`make page-test` sees what a reader would: each fault in a small site of its own, and none in a sound one."""

from pathlib import Path

import pytest

from tools import page_test

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"></head><body><article>{body}</article></body></html>
"""
TABLE = "<table><tr><td>a table with more than twenty letters</td></tr></table>"
SOUND = f'<h2 id="here">A page</h2><p>Text, and a <a href="/other/#there">link</a>.</p>{TABLE}'
# what a page has -> words of the complaint, and in which view it is seen
FAULTS = {
    "wide": ('<div style="width: 900px; height: 20px">words</div>', "wider than the page", "narrow"),
    "clipped in a box that scrolls": ('<div style="overflow: auto"><div style="width: 900px">w</div></div>', "", ""),
    "twice": (TABLE, "twice: table", "wide"),
    "dark": ('<p style="color: #111; background: #000">unseen</p>', "hardly to be seen", "dark"),
    "link": ('<a href="/nowhere/">a link</a>', "a link leads to 'nowhere'", ""),
    "anchor": ('<a href="/other/#nowhere">a link</a>', "a link leads to other#nowhere", ""),
    "console": ("<script>console.error('a complaint of the page')</script>", "a complaint of the page", "wide"),
    "error": ("<script>throw new Error('it broke')</script>", "it broke", "wide"),
    "empty widget": (
        '<div id="w"></div><script>w.attachShadow({mode: "open"})</script>',
        "a widget shows nothing",
        "wide",
    ),
}


def site(folder: Path, bodies: dict[str, str]) -> Path:
    """A page for each body, by its address; and one that they link to."""
    other = {"other": '<h2 id="there">Another page</h2>'}
    for name, text in ({name: SOUND + body for name, body in bodies.items()} | other).items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "index.html").write_text(PAGE.format(body=text), encoding="utf-8")
        widgets = text.count("attachShadow")
        (folder / f"{name or 'index'}.json").write_text('"type":"anywidget"' * widgets, encoding="utf-8")
    return folder


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These pages need no time to come to rest."""
    monkeypatch.setattr(page_test, "REST", 50)
    monkeypatch.setattr(page_test, "PATIENCE", 50)


@pytest.mark.usefixtures("at_once")
def test_each_fault_is_seen_where_it_is_and_nothing_in_a_sound_page(browser, tmp_path: Path) -> None:
    pages = site(tmp_path, {"": ""} | {kind.replace(" ", "-"): body for kind, (body, _, _) in FAULTS.items()})
    names = page_test.names_of(pages)
    assert {"", "other", "empty-widget"} < set(names)
    found = page_test.look(browser, pages, names)
    assert not [fault for fault in found if fault.startswith(("index", "other"))]
    for kind, (_, words, view) in FAULTS.items():
        here = [fault for fault in found if fault.startswith((f"{kind.replace(' ', '-')}, ", f"{kind}: "))]
        if not words:
            assert here == []
            continue
        assert any(words in fault and view in fault.partition(":")[0] for fault in here), (kind, found)


@pytest.mark.usefixtures("at_once")
def test_a_page_that_is_too_heavy_is_seen(browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_test, "HEAVIEST", 100)
    assert any("MB beside the theme" in fault for fault in page_test.look(browser, site(tmp_path, {"": ""}), [""]))


def test_a_folder_that_is_no_theme_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page_test.main([str(tmp_path)]) == 1
    assert "template.yml, got none: is this a built theme?" in capsys.readouterr().err
