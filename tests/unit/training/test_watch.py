"""Monitoring of a run: log line, dashboards, profiles, and the operation counts of MFU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from configs import smoke
from sanawm_jax.core.params import apply, build
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.flops import forward_flops, training_flops
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.peak import mfu, peak_flops
from sanawm_jax.training.engine.watch import (
    PROFILE_TRIGGER,
    Curves,
    Profiler,
    Progress,
    TensorBoard,
    WeightsAndBiases,
)
from sanawm_jax.training.recipes.samples import false_colours


class _Board:
    def __init__(self) -> None:
        self.shown: list[tuple[int, dict]] = []

    def show(self, step: int, values: dict) -> None:
        self.shown.append((step, dict(values)))

    def close(self) -> None:
        self.shown.append((-1, {}))


def test_progress_shows_means_time_and_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    board = _Board()
    progress = Progress(2, 5, flops=6e12, devices=2, peak=1e12, boards=[board])
    for step in range(1, 6):
        bucket = 0.5 if step == 2 else None  # a batch without such timesteps
        seconds = 100.0 + 4.0 * step  # the first hundred compiled
        progress.row(
            {
                "step": step,
                "seconds": seconds,
                "loss": float(step),
                "loss_t0_250": bucket,
                "skipped": float(step > 3),
            }
        )
    progress.close()
    (two, first), (four, second), (five, last), (end, _) = board.shown
    assert (two, four, five, end) == (2, 4, 5, -1)
    assert first["loss"] == 1.5 and first["loss_t0_250"] == 0.5
    assert first["step_seconds"] == pytest.approx(4.0)
    assert first["mfu"] == pytest.approx(6e12 / 4 / 2 / 1e12)
    assert second["loss"] == 3.5 and "loss_t0_250" not in second and second["skipped"] == 1
    assert last["loss"] == 5.0
    assert len(lines) == 3
    assert (
        lines[0].startswith("step 2/5, 108 s: loss 1.5 loss_t0_250 0.5") and "mfu 0.75" in lines[0]
    )


def test_peak_and_utilisation() -> None:
    assert peak_flops() is None  # a CPU
    kinds = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "something": None,
    }
    for kind, peak in kinds.items():
        assert peak_flops(SimpleNamespace(device_kind=kind)) == peak  # pyright: ignore
    assert mfu(1.0, 1.0, 1, None) is None
    assert training_flops(2.0) == 6.0 and training_flops(2.0, frozen=True) == 4.0


def _counted(program: Any) -> float:
    """Counts the operations of all products and convolutions; those in loops count per run."""
    total = 0.0
    for eqn in getattr(program, "jaxpr", program).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
            size = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * size
        for inner in jax.tree.leaves(
            list(params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += _counted(inner) * (params["length"] if name == "scan" else 1)
    return total


@pytest.mark.parametrize("softmax_every_n", [0, 1], ids=["gdn", "softmax"])
def test_operations_are_those_of_the_program(softmax_every_n: int) -> None:
    config = DiTConfig(
        in_channels=8,
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        linear_head_dim=64,
        caption_channels=32,
        softmax_every_n=softmax_every_n,
    )
    frames, height, width, text = 5, 8, 8, 16
    graphdef, params = build(DiT, config)
    inputs = dict(
        latents=jnp.zeros((1, frames, height, width, 8)),
        timesteps=jnp.zeros((1, frames)),
        text=jnp.zeros((1, text, 32)),
        text_mask=jnp.ones((1, text)),
        camera=jnp.zeros((1, frames, 20)),
        plucker=jnp.zeros((1, frames, height, width, 48)),
    )
    program = jax.make_jaxpr(lambda p: apply(graphdef, p, **inputs))(params)
    ours = forward_flops(config, frames, height, width, text)
    # In the program, rotations and poses are products, and depthwise convolutions are not.
    assert ours == pytest.approx(_counted(program), rel=0.06)


def test_operations_grow_as_the_network_is_run() -> None:
    config, clip = DiTConfig(), (121, 22, 40, 300)
    whole = forward_flops(config, *clip)
    chunked = forward_flops(config, *clip, chunk_size=3)
    # of softmax attention, nearly half of the keys are in later chunks
    attention = 5 * 2 * 4 * (121 * 880) ** 2 * 2240
    assert whole - chunked == pytest.approx(attention / 2, rel=0.03)
    assert forward_flops(config, *clip, camera=False) < whole
    assert whole > 2 * 2.5e9 * 121 * 880  # each parameter meets each token


def test_a_file_asks_for_a_profile(tmp_path: Path) -> None:
    state: Any = SimpleNamespace(step=jnp.zeros(()))
    profiler = Profiler(tmp_path, start=0, steps=2)
    profiler.after(0, 1, state)
    assert not (tmp_path / "profile").exists()
    (tmp_path / PROFILE_TRIGGER).touch()
    for step in range(1, 5):
        profiler.after(step, step + 1, state)
        jnp.sin(jnp.ones(3)).block_until_ready()
    profiler.close()
    assert not (tmp_path / PROFILE_TRIGGER).exists()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_curves_are_drawn_at_the_end_and_never_end_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    Curves(tmp_path, 5).close()  # no metrics yet
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": {1 / i if i != 3 else "null"}}}\n' for i in range(1, 9))
    )
    Curves(tmp_path, 5).close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_extras_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboardX") is None:
        with pytest.raises(InputError, match=r"pip install 'sanawm-jax\[tensorboard\]'"):
            TensorBoard(tmp_path)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(InputError, match=r"wandb.project is set: pip install"):
            WeightsAndBiases(smoke.get_config(), tmp_path)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path)
    board.show(3, {"loss": 0.5})
    board.close()
    (file,) = tmp_path.iterdir()
    assert b"loss" in file.read_bytes()


def test_weights_and_biases_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = smoke.get_config()
    config.wandb.update(project="test", mode="offline")
    for step in (1, 2):
        board = WeightsAndBiases(config, tmp_path)
        board.show(step, {"loss": 0.5})
        board.close()
    names = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert names and {name.rpartition("-")[2] for name in names} == {
        (tmp_path / "wandb_id").read_text()
    }


def test_false_colours() -> None:
    latents = np.random.default_rng(0).normal(size=(2, 3, 2, 4, 5))
    film = false_colours(latents)
    assert film.shape == (2, 3, 16, 32, 3) and film.dtype == np.uint8
    np.testing.assert_array_equal(film[:, :, ::8, ::8], film[:, :, 7::8, 7::8])
    assert false_colours(latents[..., :1]).shape == film.shape
