"""Each benchmark runs both sides at its smallest size and prints what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stage1

ROOT = Path(__file__).parents[2]


def test_stage1_in_fp8(capsys: pytest.CaptureFixture) -> None:
    stage1.main(["--tiny", "--repeats=1", "--side=ours", "--precision=fp8"])
    step, errors = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert step["precision"] == "fp8" and step["seconds"] > 0
    assert 0 < errors["latents"] < errors["velocity"] < 0.3


@pytest.mark.parametrize(
    ("name", "measured"),
    [("stage1", 1), ("vae", 2), ("refiner", 2), pytest.param("pipeline", 1)],
)
def test_tiny(name: str, measured: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--repeats=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "SANAWM_COMPILATION_CACHE": "off"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if "error" in line], done.stderr
    ratios = {line["what"]: line["ratio"] for line in lines if "ratio" in line}
    sides = {
        side: {line["what"]: line for line in lines if "seconds" in line and line["side"] == side}
        for side in ("ours", "reference")
    }
    assert len(ratios) == measured and all(
        found.keys() == ratios.keys() for found in sides.values()
    )
    for what, ratio in ratios.items():
        ours, reference = sides["ours"][what], sides["reference"][what]
        assert ratio == pytest.approx(reference["seconds"] / ours["seconds"], abs=1e-3)
        for line in (ours, reference):
            assert line["seconds"] > 0 and 0 < line["peak_gib"] < 64 and line["device"]
