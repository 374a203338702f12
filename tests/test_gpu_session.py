"""A session on a GPU: what each stage runs, and that none takes anything from the others."""

from pathlib import Path

import pytest
import torch

from tools import gpu

SAYS, FAILS, WAITS = "print('said')", "raise SystemExit('it broke')", "import time; time.sleep(60)"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch):
    """Give each stage a short program of its own."""

    def give(**programs: str) -> None:
        monkeypatch.setattr(gpu, "command", lambda stage, *_, **__: ["-c", programs[stage]])

    return give


def test_a_stage_that_fails_or_takes_too_long_takes_nothing_from_the_others(
    stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages(tests=FAILS, kernels=WAITS, steps=SAYS, leg=SAYS)
    assert gpu.main(["--into", str(tmp_path), "--toy", "--minutes", "0.2"]) == 1
    said = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert said == [["tests", "failed"], ["kernels", "out"], ["steps", "done"], ["leg", "done"]]
    assert (tmp_path / "leg.log").read_text() == "said\n"
    assert "it broke" in (tmp_path / "tests.log").read_text()


def test_a_leg_has_what_is_left_and_a_toy_none_of_the_gpu(tmp_path: Path) -> None:
    leg = gpu.command("leg", 620.0, tmp_path, "gpu", [], toy=False)
    assert leg[leg.index("--minutes") + 1] == "10.00"
    assert leg[leg.index("--profile") + 1] == "gpu"
    assert "--half" not in leg
    toy = gpu.command("leg", 620.0, tmp_path, "gpu", ["--half"], toy=True)
    assert (toy[toy.index("--profile") + 1], toy[toy.index("--device") + 1]) == ("smoke", "cpu")
    assert "--half" in toy


def test_every_file_with_a_test_for_gpus_is_run() -> None:
    found = {path.name for path in gpu.marked_files()}
    assert found == {"test_gpu.py", "test_gpu_kernels.py", "test_captured.py", "test_repeated.py"}
    asked = gpu.command("tests", 60.0, Path("made"), "gpu", [], toy=False)
    assert set(map(str, gpu.marked_files())) <= set(asked)


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--into", str(tmp_path / "made")]) == 2
    assert "expected a CUDA device, found none; --toy tries the stages" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_minutes_are_a_positive_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--into", str(tmp_path), "--minutes", "nan"])
    assert "--minutes: expected a positive number, got nan" in capsys.readouterr().err
