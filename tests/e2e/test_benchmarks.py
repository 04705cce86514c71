"""Each benchmark runs both sides at its smallest size and prints the documented lines."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import stage1, train_step
from sanawm_jax.training.engine import loop

ROOT = Path(__file__).parents[2]


def run(name: str, *flags: str) -> list[dict[str, Any]]:
    """The lines of a benchmark's `--tiny` run, none of which is an error."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--tiny", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "SANAWM_COMPILATION_CACHE": "off"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines and not [line for line in lines if "error" in line], done.stderr
    return lines


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("stage1", 1),
        pytest.param("vae", 2, marks=pytest.mark.slow),
        pytest.param("refiner", 2, marks=pytest.mark.slow),
        pytest.param("pipeline", 3, marks=pytest.mark.slow),
    ],
)
def test_tiny(name: str, measured: int) -> None:
    lines = run(name, "--repeats=1")
    ratios = {line["what"]: line["ratio"] for line in lines if "ratio" in line}
    sides = {
        side: {line["what"]: line for line in lines if "seconds" in line and line["side"] == side}
        for side in ("ours", "reference")
    }
    assert len(ratios) == measured
    assert sides["reference"].keys() == ratios.keys() <= sides["ours"].keys()
    for what, ratio in ratios.items():
        ours, reference = sides["ours"][what], sides["reference"][what]
        assert ratio == pytest.approx(reference["seconds"] / ours["seconds"], abs=1e-3)
        for line in (ours, reference):
            assert line["seconds"] > 0 and 0 < line["peak_gib"] < 64 and line["device"]


def test_figure_has_a_curve_a_side(tmp_path: Path) -> None:
    lines = {
        f"step of {frames} latent frames": {
            side: {"latent_frames": frames, "seconds": factor * frames, "device": "a card"}
            for side, factor in (("ours", 1.0), ("reference", 3.0), ("compiled", 2.0))
        }
        for frames in (21, 121)
    }
    stage1.draw(lines, tmp_path / "cost.png")
    few = {what: {"ours": found["ours"]} for what, found in lines.items()}
    stage1.draw(few, tmp_path / "ours.png")
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("cost.png", "ours.png")]
    assert pictures[0].shape == pictures[1].shape
    assert len(np.unique(pictures[0].reshape(-1, 4), axis=0)) > len(
        np.unique(pictures[1].reshape(-1, 4), axis=0)
    )


@pytest.mark.slow
def test_train_step(capsys: pytest.CaptureFixture) -> None:
    """There is a line per length, and rematerialisation and adapters reduce the memory."""
    five, nine = run("train_step", "--repeats=1", "--latent_frames", "9", "5")
    # in this process: imports take long
    flags = ["--tiny", "--one", "--repeats=1", "--latent_frames", "9"]
    train_step.main([*flags, "--remat=none"])
    train_step.main([*flags, "--lora=2", "--chunk_causal"])
    kept, adapted = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["latent_frames"] for line in (five, nine)] == [5, 9]
    for line in (five, nine, kept, adapted):
        assert line["seconds"] > 0 and math.isfinite(line["loss"])
        assert line["mfu"] is None and line["of_achievable"] is None  # a CPU has no peak
    assert five["pflop"] < nine["pflop"] and adapted["pflop"] < nine["pflop"]
    assert five["given_gib"] <= nine["given_gib"] < nine["needs_gib"] < kept["needs_gib"]
    assert adapted["given_gib"] < nine["given_gib"]


def test_a_length_that_does_not_fit_is_a_line(monkeypatch, capsys) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(loop, "start_run", full)
    train_step.main(["--tiny", "--one", "--latent_frames", "5", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["latent_frames"], line["error"]) for line in lines] == [
        (3, "out of memory"),
        (5, "out of memory"),
    ]


def test_kept_lines_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for side, factor in (("ours", 1.0), ("compiled", 2.0)):
        lines = [
            {"side": side, "what": str(n), "latent_frames": n, "seconds": factor * n, "device": "a"}
            for n in (21, 121)
        ]
        (tmp_path / side).write_text("\n".join(map(json.dumps, lines)))
    files, figure = [str(tmp_path / name) for name in ("ours", "compiled")], tmp_path / "cost.png"
    stage1.main(["--lines", *files, "--figure", str(figure)])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"what": n, "side": "compiled", "ratio": 2.0} for n in ("21", "121")]
    assert figure.exists()
    with pytest.raises(SystemExit):
        stage1.main(["--lines", files[0], str(tmp_path / "none")])
    assert "no lines of --side" in capsys.readouterr().err


def test_stage1_in_fp8(capsys: pytest.CaptureFixture) -> None:
    stage1.main(["--tiny", "--repeats=1", "--side=ours", "--precision=fp8"])
    step, errors = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert step["precision"] == "fp8" and step["seconds"] > 0
    assert 0 < errors["latents"] < errors["velocity"] < 0.3
