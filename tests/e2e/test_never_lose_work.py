"""A run that SIGTERM and kill -9 end again and again equals a run without interruptions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_TIMEOUT = 1800.0


def _start(config: str, workdir: Path, cache: Path, *flags: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags]
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )


def _finish(process: subprocess.Popen, workdir: Path) -> str:
    """Returns the standard output of a process, which must succeed."""
    out, _ = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == 0, (workdir.parent / f"{workdir.name}.log").read_text()[-2000:]
    return out


def _checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _wait_for(moment: str, process: subprocess.Popen, workdir: Path, started: float) -> None:
    """Returns when the process has written a line, or is writing a checkpoint, or has ended."""
    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    while process.poll() is None and time.time() < started + _TIMEOUT:
        if moment == "save":
            if any(folder.glob("*.orbax-checkpoint-tmp*")):
                return
        elif metrics.exists() and metrics.stat().st_mtime > started:
            last = max(_checkpoints(workdir), default=0)
            if len(metrics.read_bytes().splitlines()) > last:
                return
        time.sleep(0.002)


def _curve(workdir: Path) -> list[dict]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in names} for line in lines]


def _kill(
    moment: str, rng: random.Random, config: str, workdir: Path, cache: Path, flags: list[str]
) -> bool:
    """Starts the run and ends it at a random time. Returns whether it was still running then."""
    started = time.time()
    # what the process before left partial must not be taken for this one's
    for partial in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
        os.rename(partial, workdir / f"partial-{partial.name}-{started}")
    process = _start(config, workdir, cache, *flags)
    if moment == "start":
        time.sleep(rng.uniform(0, 12))
    else:
        _wait_for(moment, process, workdir, started)
        time.sleep(rng.uniform(0, 0.1 if moment == "save" else 2.0))
    if moment == "term":
        process.send_signal(signal.SIGTERM)
        line = _finish(process, workdir).splitlines()[-1]
        step = max(_checkpoints(workdir))
        assert line.startswith(f"stopped at step {step}, saved in {workdir}/checkpoints/{step};")
        assert len(_curve(workdir)) == step
        return True
    was_running = process.poll() is None
    process.kill()
    process.communicate()
    for step in _checkpoints(workdir):
        for part in ("_CHECKPOINT_METADATA", "state/_METADATA", "run/metadata"):
            assert (workdir / "checkpoints" / str(step) / part).is_file(), (step, part)
    return was_running


def _broken_equals_unbroken(
    tmp_path: Path, config: str, moments: list[str], flags: list[str]
) -> dict[str, int]:
    cache, whole, broken = (tmp_path / name for name in ("cache", "whole", "broken"))
    _finish(_start(config, whole, cache, *flags), whole)
    broken.mkdir()
    rng, last, hits = random.Random(0), 0, dict.fromkeys(moments, 0)
    for moment in moments:
        hits[moment] += _kill(moment, rng, config, broken, cache, flags)
        steps = _checkpoints(broken)
        assert max(steps, default=0) >= last  # no checkpoint is ever lost
        last = max(steps, default=0)
    out = _finish(_start(config, broken, cache, *flags), broken)
    assert out.splitlines()[-1] == f"{broken}/export"
    assert _curve(broken) == _curve(whole)
    weights = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()
    return hits


def test_sigterm_and_three_kills(tmp_path: Path) -> None:
    moments = ["step", "term", "save", "step"]
    hits = _broken_equals_unbroken(tmp_path, "tests/e2e/resumable_config.py", moments, [])
    assert hits["term"] == 1


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # many steps: what runs fast counts, not what compiles fast
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    rng = random.Random(1)
    moments = [rng.choice(["start", "step", "step", "save"]) for _ in range(20)]
    steps = "--config.steps=120"
    hits = _broken_equals_unbroken(tmp_path, "configs/smoke.py", moments, [steps])
    # a kill that finds the run ended proves nothing
    assert sum(hits.values()) == 20
