"""One run of two processes, each with two virtual devices, against one process with one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

_ROOT = Path(__file__).parents[2]
_TIMEOUT = 600.0


def _start(workdir: Path, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config=tests/e2e/resumable_config.py"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", "--config.save_every=1", *flags],
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _start_two(workdir: Path, *flags: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (*flags, "--config.mesh.data=2", "--config.mesh.fsdp=2")
    first = ("--num_processes=2", "--process_id=0", f"--coordinator={address}")
    # the other one learns the same from its environment
    variables = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    return [
        _start(workdir, *flags, *first, JAX_NUM_CPU_DEVICES="2"),
        _start(workdir, *flags, JAX_NUM_CPU_DEVICES="2", **variables),
    ]


def _finish(process: subprocess.Popen) -> list[str]:
    """Returns the lines on standard output that the program itself printed."""
    out, err = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == 0, err[-3000:]
    # the program's only lines are paths; the collectives' library prints too, from several threads
    # into one another's lines, of which any piece can be left
    return [line for line in out.splitlines() if line.startswith("/")]


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _saved(folder: Path) -> dict[str, Any]:
    """Returns the state of a checkpoint as host arrays, for any number of devices that wrote it."""
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(folder / "state").item_metadata.tree  # pyright: ignore
    leaf = ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = ocp.checkpoint_utils.construct_restore_args(tree)
    arguments = {k: _all(v, leaf) for k, v in arguments.items()}
    return checkpointer.restore(folder / "state", restore_args=arguments)


def _all(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _all(v, leaf) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_all(v, leaf) for v in tree)
    return leaf if tree is not None else None


def _arrays(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {} if tree is None else {path: np.asarray(tree)}
    return {k: v for name, part in items for k, v in _arrays(part, f"{path}.{name}").items()}


def test_equals_one_device(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    processes = _start_two(two, "--config.steps=2")
    alone = _start(one, "--config.steps=2")
    first, other = map(_finish, processes)
    _finish(alone)
    assert first[-1] == f"{two}/export"
    assert other == []  # the first process speaks for both
    assert [row["step"] for row in _rows(two)] == [1, 2]
    for ours, theirs in zip(_rows(two), _rows(one), strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # after one update Adam's first moments are the gradients, times a constant
    moments = [
        {
            path: value
            for path, value in _arrays(_saved(folder / "checkpoints" / "1")["opt_state"]).items()
            if ".mu." in path
        }
        for folder in (two, one)
    ]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 20
    for path, expected in moments[1].items():
        scale = max(float(np.linalg.norm(expected)), 1e-6)
        assert np.linalg.norm(moments[0][path] - expected) <= 1e-5 * scale, path
    weights = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (two / weights).stat().st_size == (one / weights).stat().st_size


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_one_step(tmp_path: Path) -> None:
    processes = _start_two(tmp_path, "--config.steps=100000", "--config.save_every=1000")
    metrics, started = tmp_path / "metrics.jsonl", time.time()
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < started + _TIMEOUT:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    first, other = map(_finish, processes)
    step = _rows(tmp_path)[-1]["step"]
    assert first[-1].startswith(f"stopped at step {step}, saved in {tmp_path}/checkpoints/{step};")
    assert other == []
    # One process continues with the checkpoint of two processes.
    alone = _start(tmp_path, f"--config.steps={step + 1}")
    assert _finish(alone)[-1] == f"{tmp_path}/export"
    assert [row["step"] for row in _rows(tmp_path)] == list(range(1, step + 2))


def test_a_missing_part_is_one_line(tmp_path: Path) -> None:
    process = _start(tmp_path, "--process_id=0")
    _, err = process.communicate(timeout=_TIMEOUT)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(
        "error: a run of several processes lacks JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES;"
    )
