"""The examples of CONTRIBUTING.md are short, and run as a reader would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"<!-- example: (?P<name>[\w-]+) -->\n+```python\n(?P<code>.*?)```", re.S)
EXAMPLES = {found["name"]: found["code"] for found in EXAMPLE.finditer((ROOT / "CONTRIBUTING.md").read_text("utf-8"))}


def test_each_promised_example_is_there() -> None:
    assert set(EXAMPLES) == {"own-method", "own-layer", "own-dropout"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_runs(name: str, tmp_path: Path) -> None:
    """In a file of its own, outside the package, in an empty home."""
    assert len(EXAMPLES[name].splitlines()) <= 20
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[name], encoding="utf-8")
    environment = os.environ | {"CLUSTR_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
