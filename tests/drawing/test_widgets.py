"""What a page and JupyterLab get of a widget: one module, and data that JSON holds."""

import json
import shutil
import subprocess

import pytest

from clustr_core.drawing import widgets


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTR_HOME", str(tmp_path))
    monkeypatch.setenv("CLUSTR_PROFILE", "smoke")
    return tmp_path


@pytest.mark.parametrize("name", widgets.names())
def test_a_module_is_one_file_that_a_browser_can_read(name, tmp_path) -> None:
    text = widgets.module(name)
    assert text.count("export default ") == 1
    assert 'from "./' not in text
    (tmp_path / "m.mjs").write_text(text, encoding="utf-8")
    node = shutil.which("node")
    assert node, "node: expected Node 20 or newer, which builds the book"
    done = subprocess.run([node, "--check", "m.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_fragment_of_a_page_holds_the_data_and_no_line_of_prose(home) -> None:
    path = widgets.save_widget("two-hills", {"eps": 0.5, "names": ["a", "é"]}, replaces="figure-x")
    assert path == home / "figures/smoke/widget-two-hills.md"
    first, *body, last = path.read_text(encoding="utf-8").splitlines()
    assert (first, last) == (":::{anywidget} /notebooks/widgets/two-hills.mjs", ":::")
    # indented: a page's builder reads long prose for minutes
    assert all(line.startswith("    ") for line in body)
    assert json.loads("\n".join(body)) == {"replaces": "figure-x", "data": {"eps": 0.5, "names": ["a", "é"]}}


def test_in_jupyterlab_a_widget_has_its_module_and_its_data() -> None:
    shown = widgets.show("two-hills", {"eps": 0.5})
    assert shown.data == {"eps": 0.5}
    assert "export default widget(" in shown._esm


@pytest.mark.parametrize("data", [{"eps": float("nan")}, {"eps": object()}])
def test_what_json_does_not_hold_is_refused_and_nothing_is_written(home, data) -> None:
    with pytest.raises(ValueError, match="data: expected finite numbers, texts, lists and mappings"):
        widgets.save_widget("two-hills", data)
    assert not list(home.rglob("*.md"))


def test_a_widget_that_does_not_exist_is_refused() -> None:
    for call in (widgets.module, lambda name: widgets.show(name, {}), lambda name: widgets.save_widget(name, {})):
        with pytest.raises(ValueError, match=r"name: expected one of .*'two-hills'.*, got 'three-hills'"):
            call("three-hills")
