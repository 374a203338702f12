"""JupyterLab's settings lie where it reads them, and speak of things that are there."""

import re
import sys
from pathlib import Path

from jupyter_server.serverapp import ServerApp
from jupyterlab.labapp import LabApp
from jupyterlab_server.settings_utils import _get_overrides

from tools import lab

ROOT = Path(__file__).resolve().parents[1]


def test_a_double_click_opens_a_chapter_as_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(lab, "SETTINGS", {name: tmp_path / path.name for name, path in lab.SETTINGS.items()})
    overrides, _ = lab.install(ROOT)
    found, error = _get_overrides(str(overrides.parent))
    assert not error
    viewers = found["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]
    assert viewers["markdown"] == "Jupytext Notebook"


def test_the_settings_go_where_this_environment_reads_them():
    assert str(lab.SETTINGS["overrides.json"]) == LabApp().app_dir + "/settings"
    assert str(lab.SETTINGS["custom.css"]) in ServerApp().static_custom_path


def test_the_style_hides_what_the_notebook_shows_under_its_cell():
    (hidden,) = re.findall(r'img\[src\*="([^"]+)"\]', (ROOT / "site/lab/custom.css").read_text(encoding="utf-8"))
    assert hidden in "files/notebooks/%23fig-walk"
