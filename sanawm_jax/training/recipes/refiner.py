"""Trains stage 2 on pairs of what stage 1 makes of a clip and the clip itself.

Two runs make a refiner: a base, all of its weights from scratch or from `base_dir`; then, with
`lora.rank` above 0, adapters on a frozen `base_dir`. The text path, a frozen Gemma-3 and frozen
connectors, is the base's, or a tiny random one for a base from scratch.

Axis letters: n clips, B batch, F latent frames, H W latent rows and columns, c latent channels, L
text tokens, C text width.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.adapters import save_adapters
from sanawm_jax.checkpoints.export import export_connectors, export_refiner
from sanawm_jax.checkpoints.files import read_config
from sanawm_jax.checkpoints.folder import Stage1Folder, find_weights
from sanawm_jax.checkpoints.layouts import write_refiner_index
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder, load_connectors
from sanawm_jax.core.lora import LoraConfig, build_adapted, init_adapters
from sanawm_jax.core.params import Params, build, init
from sanawm_jax.data.latent_cache import cache_facts, fingerprint_of
from sanawm_jax.data.pair_cache import Sampler, build_pairs, build_text, stage1_sampler
from sanawm_jax.refiner.config import SPLIT, ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors, encode_texts
from sanawm_jax.refiner.keys import refiner_table
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import check_sigmas
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.text.config import GEMMA3
from sanawm_jax.text.gemma import Tower, text_tower
from sanawm_jax.text.keys import load_text_encoder
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.training.engine.precision import compute_dtype
from sanawm_jax.training.engine.recipe import Recipe, one_learner
from sanawm_jax.training.objectives.adapters import lora_of
from sanawm_jax.training.objectives.refiner_loss import PrepareRefiner, RefinerLoss, make_objective
from sanawm_jax.training.recipes.cached_clips import cache_folder, cached_clips
from sanawm_jax.training.recipes.clips import open_source

_TEXT_HEAD = 32  # channels a head of the small connectors


def refiner_recipe(config: ConfigDict, workdir: Path) -> Recipe:
    """The base or its adapters on cached pairs, all of which stay on the device.

    Raises:
      InputError: folders that are missing or of different latents, or settings that do not fit.
    """
    if not config.stage1_dir:
        raise InputError("stage1_dir is empty; give the folder that a stage-1 run exported")
    lora, base = lora_of(config), _base(config)
    if lora and base is None:
        raise InputError("base_dir is empty; give the refiner folder that the adapters are for")
    if lora and base and base.lora:
        raise InputError(f"{config.base_dir} has adapters already; give the folder without them")
    stage1 = Stage1Folder(find_weights(config.stage1_dir))
    data = _clips_and_pairs(config, workdir, stage1)
    clips, frames, height, width, channels = data["latents"].shape
    model = base.config if base else new_model(config, channels)
    if model.in_channels != channels:
        raise InputError(
            f"{config.base_dir} refines latents of {model.in_channels} channels, stage 1's have "
            f"{channels}"
        )
    sigmas = base.sigmas if base else check_sigmas(config.sigmas or SIGMAS)
    objective = make_objective(config, frames, sigmas[0])
    data["refiner_text"] = _text(config, workdir, base)
    resident: dict[str, Any] = {name: np.asarray(a) for name, a in data.items()}
    logging.info("%d pairs of %d clips", len(data["stage1"]), clips)
    dtype, key = compute_dtype(config.dtype), jax.random.key(config.seed)
    graphdef, abstract = build(Refiner, model)
    if lora and base:
        graphdef, abstract = build_adapted(Refiner, model, lora)
        # frozen, so the compute dtype is all that it needs
        _, resident["base"] = base.load_transformer(dtype)

    def make(shardings: Any) -> Params:
        if lora:
            params = init_adapters(abstract, key)
        elif base:
            _, params = base.load_transformer(jnp.float32)
        else:
            return init(Refiner, model, key, shardings=shardings)
        return params if shardings is None else jax.device_put(params, shardings)

    loss = RefinerLoss(
        graphdef=graphdef,
        rope=video_rope(model, frames, height, width, config.fps),
        objective=objective,
        dtype=dtype,
        remat=config.remat,
    )

    def export(params: Params) -> None:
        if lora:
            _export_adapters(config, model, params, lora, workdir / "export")
        else:
            _export_whole(config, model, params, base, workdir / "export", sigmas)

    return one_learner(
        config,
        abstract=abstract,
        init=make,
        prepare=PrepareRefiner(objective, clips),
        loss=loss,
        export=export,
        resident=resident,
        size=len(data["stage1"]),
    )


def _base(config: ConfigDict) -> RefinerFolder | None:
    return RefinerFolder(find_weights(config.base_dir)) if config.base_dir else None


def new_model(config: ConfigDict, channels: int) -> RefinerConfig:
    if "refiner" not in config:
        raise InputError("base_dir is empty, and the configuration describes no new refiner")
    sizes = config.refiner.to_dict()
    return RefinerConfig(
        in_channels=channels,
        out_channels=channels,
        caption_channels=config.text.width,
        cross_attention_dim=sizes["num_attention_heads"] * sizes["attention_head_dim"],
        **sizes,
    )


def _export_adapters(
    config: ConfigDict, model: RefinerConfig, params: Params, lora: LoraConfig, folder: Path
) -> None:
    base = Path(config.base_dir)
    save_adapters(
        folder,
        params,
        lora,
        refiner_table(model),
        base=str(base.absolute()) if base.is_dir() else config.base_dir,
        dtype=jnp.dtype(config.export_dtype),
    )


def _export_whole(
    config: ConfigDict,
    model: RefinerConfig,
    params: Params,
    base: RefinerFolder | None,
    folder: Path,
    sigmas: tuple[float, ...],
) -> None:
    export_refiner(model, params, folder / "transformer", config.export_dtype)
    if base is not None:  # else they are there already
        for part in ("text_encoder", "tokenizer", "connectors"):
            shutil.copytree(base.part(part), folder / part, dirs_exist_ok=True)
    write_refiner_index(folder, base.text_length if base else config.text.length, sigmas)


def _clips_and_pairs(
    config: ConfigDict, workdir: Path, stage1: Stage1Folder
) -> dict[str, np.ndarray]:
    """latents (n, F, H, W, c), caption (n,), and stage1 (s n, F, H, W, c)."""
    clips = open_source(config)
    inner = ConfigDict(config.to_dict(), convert_dict=True)
    inner.vae_dir, inner.text_dir = str(stage1.part("vae")), str(stage1.path)
    cache = cached_clips(inner, workdir, clips)
    folder, pairs = cache_folder(config, workdir), config.pairs
    dtype = compute_dtype(config.dtype)
    sigmas = stage1.schedule().sigmas(pairs.steps)

    @functools.cache
    def sampler() -> Sampler:
        _, graphdef, params = stage1.load_dit(dtype)
        return stage1_sampler(
            graphdef,
            params,
            cache,
            sigmas,
            guidance=pairs.cfg_scale,
            seed=config.seed,
            dtype=dtype,
        )

    facts = (cache_facts(folder)[0], sigmas.tobytes(), pairs.cfg_scale, pairs.seeds, config.seed)
    sampled = build_pairs(
        folder,
        len(cache["latents"]),
        pairs.seeds,
        lambda rows, seeds: sampler()(rows, seeds),
        fingerprint=fingerprint_of(_weights(stage1.part("transformer")), *facts, str(dtype)),
        batch_size=pairs.batch,
    )
    return {"latents": cache["latents"], "caption": cache["caption"], "stage1": sampled}


def _weights(*folders: Path) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def make_text_path(config: ConfigDict, captions: Sequence[str], folder: Path) -> None:
    """A tiny random tower with a trained tokenizer, and random connectors; both stay frozen."""
    if (folder / "connectors" / "config.json").is_file():
        return
    text = config.text
    if text.length % text.registers:
        raise InputError(f"text.length={text.length} must be a multiple of {text.registers}")
    tower = make_small_text_encoder(
        captions,
        folder,
        hidden=text.width,
        layers=text.layers,
        chi_prompt=(),
        model_type=GEMMA3,
        seed=config.seed,
    )
    connectors = ConnectorsConfig(
        caption_channels=text.width,
        text_proj_in_factor=tower.num_hidden_layers + 1,
        video_connector_num_attention_heads=text.width // _TEXT_HEAD,
        video_connector_attention_head_dim=_TEXT_HEAD,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=text.registers,
        # no layer, no register: an audio connector without a single weight
        audio_connector_num_attention_heads=text.width // _TEXT_HEAD,
        audio_connector_attention_head_dim=_TEXT_HEAD,
        audio_connector_num_layers=0,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=text.length,
        rope_type=SPLIT,
    )
    params = init(TextConnectors, connectors, jax.random.key(config.seed))
    export_connectors(connectors, params, folder / "connectors", config.export_dtype)


def _text(config: ConfigDict, workdir: Path, base: RefinerFolder | None) -> np.ndarray:
    """Every caption (U, L, C) as the transformer reads it, through a frozen text path."""
    _, captions = cache_facts(cache_folder(config, workdir))
    if base is None:
        folder, length = workdir / "export", config.text.length
        make_text_path(config, captions, folder)
    else:
        folder, length = base.path, base.text_length
    tower_folder, connectors = folder / "text_encoder", folder / "connectors"
    dtype = compute_dtype(config.dtype)

    @functools.cache
    def tower() -> Tower:
        tower_config, params = load_text_encoder(tower_folder, dtype=dtype)
        return text_tower(tower_config, params, dtype=dtype, all_states=True)

    @functools.cache
    def connect() -> tuple:
        model = ConnectorsConfig.from_json(read_config(connectors))
        return load_connectors(connectors, model, dtype)

    def encode(texts: Sequence[str]) -> jax.Array:
        tokenizer = Tokenizer(folder / "tokenizer")
        return encode_texts(texts, tokenizer, length, tower, connect, dtype)

    files = [*_weights(tower_folder, connectors), folder / "tokenizer" / "tokenizer.json"]
    return build_text(
        workdir,
        captions,
        encode,
        fingerprint=fingerprint_of(files, tuple(captions), length, str(dtype)),
        batch_size=min(16, len(captions)),
    )
