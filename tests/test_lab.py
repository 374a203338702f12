"""JupyterLab's settings lie where it reads them, and speak of things that are there."""

import re
from pathlib import Path

import pytest
from jupyter_server.serverapp import ServerApp
from jupyterlab.labapp import LabApp
from jupyterlab_server.settings_utils import _get_overrides

from tools import lab

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The environment's places of both settings, in a folder of the test's own."""
    found = {name: tmp_path / path.parent.name / path.name for name, path in lab.SETTINGS.items()}
    monkeypatch.setattr(lab, "SETTINGS", found)
    return found


def test_a_double_click_opens_a_chapter_as_a_notebook(settings, tmp_path):
    lab.install(ROOT)
    found, error = _get_overrides(str(tmp_path))
    assert not error
    viewers = found["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]
    assert viewers["markdown"] == "Jupytext Notebook"


def test_what_an_administrator_has_set_stays_and_wins(settings, tmp_path, capsys):
    viewers = '{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Editor"}}}'
    (tmp_path / "overrides.json").write_text(viewers, encoding="utf-8")
    (style := settings["custom.css"]).parent.mkdir()
    style.write_text("body { color: teal; }", encoding="utf-8")
    lab.install(ROOT)
    found, _ = _get_overrides(str(tmp_path))
    assert found["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]["markdown"] == "Editor"
    assert style.read_text(encoding="utf-8") == "body { color: teal; }"
    assert str(style) in capsys.readouterr().out


def test_an_earlier_style_of_ours_is_replaced(settings):
    (style := settings["custom.css"]).parent.mkdir()
    style.write_text(f"{lab.OURS}of last year */", encoding="utf-8")
    lab.install(ROOT)
    assert style.read_text(encoding="utf-8") == (ROOT / "site/lab/custom.css").read_text(encoding="utf-8")


def test_the_settings_go_where_this_environment_reads_them():
    assert str(lab.SETTINGS["overrides.json"].parents[1]) == LabApp().app_dir + "/settings"
    assert str(lab.SETTINGS["custom.css"].parent) in ServerApp().static_custom_path


def test_the_style_hides_what_the_notebook_shows_under_its_cell():
    (hidden,) = re.findall(r'img\[src\*="([^"]+)"\]', (ROOT / "site/lab/custom.css").read_text(encoding="utf-8"))
    assert hidden in "files/notebooks/%23fig-walk"
