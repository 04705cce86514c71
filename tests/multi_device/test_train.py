"""A training run on one mesh, stopped, and continued on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import smoke
from sanawm_jax.core.params import leaves
from sanawm_jax.core.sharding import make_mesh, parameter_spec
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.loop import train


def _config(**changes: Any) -> ConfigDict:
    config = smoke.get_config()
    config.dit.update(num_layers=2, softmax_every_n=2, hidden_size=32, num_attention_heads=2)
    # frames that no mesh divides
    config.synthetic.update(clips=8, latent_frames=7, height=2, width=2)
    config.update(steps=4, save_every=2, chunk_size=2)
    config.optimizer.update(warmup_steps=1)
    mesh = changes.pop("mesh", {})
    config.mesh.update(mesh)
    config.update(changes)
    return config


def _losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[float]]:
    workdir = tmp_path_factory.mktemp("one_device")
    return train(_config(), workdir), _losses(workdir)


def _assert_close(state: Any, other: Any, rtol: float = 1e-4) -> None:
    for (path, a), (_, b) in zip(
        leaves(state.model.params), leaves(other.model.params), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= rtol * max(np.linalg.norm(b), 1e-3), path


def test_resumes_on_another_mesh(one_device: Any, tmp_path: Path) -> None:
    whole, losses = one_device
    # in two parts a step, too
    mesh = {"data": 2, "context": 2, "fsdp": 2}
    first = train(_config(steps=2, accumulation=2, mesh=mesh), tmp_path)
    assert _losses(tmp_path) == pytest.approx(losses[:2], rel=1e-5)
    kernel = first.model.params["segments"]["0"]["runs"]["0"]["layers"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "fsdp", "tensor")

    state = train(_config(mesh={"fsdp": 4, "tensor": 2}), tmp_path)
    assert int(state.step) == 4
    # Adam's first updates are near the sign of a gradient: tiny differences show
    assert _losses(tmp_path) == pytest.approx(losses, rel=1e-4)
    _assert_close(state, whole, 1e-3)
    for tree in (state.model.params, state.model.average):
        for path, leaf in leaves(tree):
            assert leaf.sharding.spec == parameter_spec(path, leaf.shape), path
    moments = jax.tree.leaves(state.model.moments)
    assert any(leaf.sharding.spec == P(None, None, "fsdp", "tensor") for leaf in moments)
    assert (tmp_path / "export" / "transformer" / "config.json").is_file()


def test_batch_that_does_not_divide(tmp_path: Path) -> None:
    config = _config(accumulation=2, mesh={"fsdp": 8})
    with pytest.raises(InputError, match=r"batch_size=8 must be a multiple of .* = 16"):
        train(config, tmp_path)
    with pytest.raises(InputError, match="context 16 x tensor 1 needs 16 devices"):
        make_mesh(context=16)
