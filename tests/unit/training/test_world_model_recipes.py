"""Initial weights, adapters of the world model, and the configurations that use them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import curriculum, lora, stage1_bidirectional
from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.checkpoints.initial_weights import load_initial
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.core.params import init, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import key_table
from sanawm_jax.dit.model import DiT
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.training.objectives.stage1 import Stage1Objective
from sanawm_jax.training.recipes.latent_source import synthetic_latents
from sanawm_jax.training.recipes.samples import first_rows, stage1_samples
from sanawm_jax.training.recipes.stage1 import dit_config, export_stage1
from tests.e2e import resumable_config

_RECURRENT = DiTConfig(
    in_channels=4,
    num_layers=2,
    hidden_size=16,
    num_attention_heads=1,
    linear_head_dim=16,
    caption_channels=8,
    softmax_every_n=0,
)


def _folder(path: Path, config: DiTConfig, params: Any) -> str:
    for part in ("text_encoder", "tokenizer", "vae"):
        (path / part).mkdir(parents=True)
    export_transformer(config, params, path / "transformer", "float32")
    write_index(path, Schedule(shift=3.0))
    return str(path)


def _perturbed(config: DiTConfig) -> Any:
    """Random weights in which no leaf is zero."""
    params = init(DiT, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)


def test_a_recurrent_network_grows_into_a_hybrid(tmp_path: Path) -> None:
    params = _perturbed(_RECURRENT)
    folder = _folder(tmp_path, _RECURRENT, params)
    before = keymap.export(key_table(_RECURRENT), params)
    same = load_initial(folder, _RECURRENT)
    jax.tree.map(np.testing.assert_array_equal, same, params)

    hybrid = dataclasses.replace(_RECURRENT, softmax_every_n=2)
    after = keymap.export(key_table(hybrid), load_initial(folder, hybrid))
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    left = before.keys() - after.keys()
    assert left == {"blocks.1.attn.conv_k.weight", "blocks.1.attn.conv_k_cam.weight"}


def test_another_network_is_one_line(tmp_path: Path) -> None:
    hybrid = dataclasses.replace(_RECURRENT, softmax_every_n=2)
    folder = _folder(tmp_path, hybrid, init(DiT, hybrid, jax.random.key(0)))
    with pytest.raises(InputError, match=r"is of another network than config.dit .*conv_k"):
        load_initial(folder, _RECURRENT)  # a softmax layer has no short convolution to give
    with pytest.raises(InputError, match=r"is of another network than config.dit"):
        load_initial(folder, dataclasses.replace(hybrid, caption_channels=12))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, DiTConfig, Any, str]:
    config = resumable_config.get_config()
    model = dit_config(config)
    base = _perturbed(model)
    config.init_weights = _folder(tmp_path_factory.mktemp("base"), model, base)
    config.lora.update(rank=3, alpha=6.0)
    return config, model, base, config.init_weights


def test_adapters_alone_are_trained_on_a_frozen_base(adapted: Any, tmp_path: Path) -> None:
    config, model, base, _ = adapted
    sizes = {"channels": model.in_channels, "text": model.caption_channels}
    arrays = synthetic_latents(**config.synthetic.to_dict(), **sizes)
    objective = Stage1Objective(config, model, 4)
    adapters = objective.init(None)
    layers = {path.rpartition(".")[0].rpartition("layers.")[2] for path, _ in leaves(adapters)}
    assert layers == {"attn.qkv", "attn.out", "cross_attn.q", "cross_attn.kv", "cross_attn.out"}

    rows = {name: arrays[name] for name in ("latents", "camera", "plucker")}
    rows |= {name: arrays[name][arrays["caption"]] for name in ("text", "text_mask")}
    examples = objective.prepare(
        rows, (arrays["text"][-1], arrays["text_mask"][-1]), jax.random.key(1)
    )
    whole_config = config.copy_and_resolve_references()
    whole_config.lora.rank = 0
    whole = Stage1Objective(whole_config, model, 4)
    of_base = jax.jit(whole.loss)

    @jax.jit
    def of_adapters(adapters: Any, base: Any) -> Any:
        return jax.value_and_grad(objective.loss.given({"base": base}), has_aux=True)(  # pyright: ignore
            adapters, examples
        )

    (loss, metrics), gradients = of_adapters(adapters, objective.frozen()["base"])
    # nothing changes at first
    assert float(loss) == pytest.approx(float(of_base(base, examples)[0]), rel=1e-5)
    assert all(
        np.any(g) == path.endswith("lora_b") for path, g in leaves(jax.device_get(gradients))
    )
    # every frame that is not given is in one bucket of timesteps
    buckets = [metrics[f"loss_t{low}_{low + 250}"] for low in (0, 250, 500, 750)]
    total, weight = (sum(float(getattr(b, part)) for b in buckets) for part in ("total", "weight"))
    assert total / weight == pytest.approx(float(loss), rel=1e-5)

    moved = jax.tree.map(lambda a, g: a - 0.3 * g, adapters, gradients)
    (after, _), _ = of_adapters(moved, objective.frozen()["base"])
    assert float(after) < float(loss)
    merged = objective.merged(moved)
    assert float(of_base(merged, examples)[0]) == pytest.approx(float(after), rel=1e-4)

    export_stage1(objective, model, moved, config, tmp_path)
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    for part in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / part).mkdir()
    write_index(tmp_path, Schedule(shift=3.0))
    again = load_initial(str(tmp_path), model)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(merged))

    # videos that are sampled with the adapters
    stage1_samples(config, objective, functools.partial(first_rows, arrays))(
        moved, {"base": base}, tmp_path / "films"
    )
    assert len(list((tmp_path / "films").glob("clip_*.mp4"))) == 2


def test_adapters_need_a_base() -> None:
    config = resumable_config.get_config()
    config.lora.rank = 2
    with pytest.raises(InputError, match="init_weights is empty"):
        Stage1Objective(config, dit_config(config), 4)


def test_without_cameras_the_network_gets_none() -> None:
    config = resumable_config.get_config()
    model = dit_config(config)
    sizes = {"channels": model.in_channels, "text": model.caption_channels}
    arrays = synthetic_latents(**config.synthetic.to_dict(), **sizes)
    rows = {name: arrays[name] for name in ("latents", "camera", "plucker")}
    rows |= {name: arrays[name][arrays["caption"]] for name in ("text", "text_mask")}
    objective = Stage1Objective(config, model, 4)
    null = (arrays["text"][-1], arrays["text_mask"][-1])
    examples = objective.prepare(rows, null, jax.random.key(1))
    assert not {"camera", "plucker"} & examples.keys()
    config.use_camera = True
    assert Stage1Objective(config, model, 4).prepare(rows, null, jax.random.key(1)).keys() >= {
        "camera",
        "plucker",
    }


def test_configurations_differ_in_what_they_say() -> None:
    common = stage1_bidirectional.get_config()
    stages = {name: curriculum.get_config(name) for name in ("gdn_5s", "hybrid_5s", "sft")}
    kinds = {name: dit_config(c).kinds() for name, c in stages.items()}
    assert not any(kind.softmax for kind in kinds["gdn_5s"])
    assert sum(kind.softmax for kind in kinds["hybrid_5s"]) == 5
    assert kinds["sft"] == DiTConfig().kinds()
    assert not stages["gdn_5s"].use_camera and stages["sft"].use_camera
    assert dit_config(curriculum.get_config()) == DiTConfig()
    for config in stages.values():
        assert config.optimizer == common.optimizer
    with pytest.raises(ValueError, match="no stage 'last'"):
        curriculum.get_config("last")
    assert lora.get_config().lora.rank == 32
