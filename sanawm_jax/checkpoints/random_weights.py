"""Random weights with the released names, shapes and dtypes, for runs without the released ones.

A value depends only on the name of its tensor and on the seed. Matrices keep the magnitude of their
inputs, and scales of norms are close to one, so that activations stay finite in bfloat16 at full
depth.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from sanawm_jax.checkpoints import upstream
from sanawm_jax.checkpoints.copies import copy_into
from sanawm_jax.checkpoints.export import complete_folder
from sanawm_jax.checkpoints.keymap import Entry, shapes
from sanawm_jax.checkpoints.layouts import (
    CONNECTORS_CLASS,
    DIT_CLASS,
    DIT_FILE,
    LATENT_STATISTICS,
    LTX2_CLASS,
    REFINER_CLASS,
    RELEASES,
    TEXT_TOKENS,
    VAE_CLASS,
    upstream_config,
    write_config,
    write_index,
    write_refiner_index,
    write_yaml,
)
from sanawm_jax.checkpoints.sizes import RELEASED, Sizes
from sanawm_jax.checkpoints.unread import audio_connector_shapes, audio_shapes
from sanawm_jax.checkpoints.upstream_folder import CAUSAL_VAE
from sanawm_jax.checkpoints.writer import Spec, write_file, write_folder, write_json
from sanawm_jax.core.params import Params, build, leaves
from sanawm_jax.dit import keys as dit_keys
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.refiner import keys as refiner_keys
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.small_world.text_encoder import write_tokenizer
from sanawm_jax.text import keys as text_keys
from sanawm_jax.text.config import GEMMA2, GemmaConfig
from sanawm_jax.text.gemma import GemmaTower
from sanawm_jax.text.prompts import CHI_PROMPT
from sanawm_jax.vae import keys as vae_keys
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE

PARTS = ("stage1", "refiner", "all")
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
_TEXT_SHARD_BYTES = 5 * 10**9
_CHUNK = 1 << 24
_WORKERS = min(32, os.cpu_count() or 1)


def random_tensor(name: str, spec: Spec, seed: int, *, norm_mean: float = 1.0) -> np.ndarray:
    """One tensor by its published name.

    Args:
      name: shows what the tensor is for.
      spec: its shape and dtype.
      norm_mean: mean of the scales of norms; 0 for Gemma, which adds one itself.
    """
    shape, dtype = spec
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return np.log(rng.uniform(1.0, 16.0, shape)).astype(dtype)
    if leaf == "dt_bias":  # the inverse softplus of a step
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
        return (step + np.log(-np.expm1(-step))).astype(dtype)
    mean, scale = 0.0, 0.02
    if leaf == "latents_std":
        mean, scale = 1.0, 0.0
    elif leaf in ("latents_mean", "recall_gate"):
        scale = 0.0
    elif "norm" in name and len(shape) == 1 and leaf == "weight":
        mean = norm_mean
    elif "table" in leaf or leaf == "learnable_registers":
        scale = shape[-1] ** -0.5
    elif len(shape) > 1:
        scale = float(np.prod(shape[1:])) ** -0.5
    out = np.empty(shape, dtype)
    flat = out.reshape(-1)
    for start in range(0, flat.size, _CHUNK):  # so that the largest tensors have no float32 copy
        part = rng.standard_normal(min(_CHUNK, flat.size - start), np.float32)
        part *= np.float32(scale)
        part += np.float32(mean)
        copy_into(flat[start : start + part.size], part)
    return out


def _specs(entries: list[Entry], abstract: Params, dtype: np.dtype) -> dict[str, Spec]:
    found = shapes(entries, dict(leaves(abstract)))
    return {name: (found[name], dtype) for name in sorted(found)}


def _reader(
    specs: dict[str, Spec], seed: int, norm_mean: float = 1.0
) -> Callable[[str], np.ndarray]:
    return lambda name: random_tensor(name, specs[name], seed, norm_mean=norm_mean)


def dit_specs(config: DiTConfig) -> dict[str, Spec]:
    """Shapes and dtypes of `transformer/` by diffusers' names: float32, as released."""
    specs = _specs(dit_keys.key_table(config), build(DiT, config)[1], F32)
    extra = {n: (v.shape, v.dtype) for n, v in dit_keys.extra_tensors(config).items()}
    return dict(sorted({**specs, **extra}.items()))


def vae_specs(config: VAEConfig) -> dict[str, Spec]:
    """Shapes and dtypes of `vae/`: bfloat16, its statistics float32."""
    specs = _specs(vae_keys.key_table(config), build(VideoVAE, config)[1], BF16)
    return {n: (s, F32 if n in LATENT_STATISTICS else d) for n, (s, d) in specs.items()}


def refiner_specs(config: RefinerConfig) -> dict[str, Spec]:
    """Shapes and dtypes of the refiner's `transformer/`, its audio half too: bfloat16."""
    specs = _specs(refiner_keys.refiner_table(config), build(Refiner, config)[1], BF16)
    return dict(
        sorted({**specs, **{n: (s, BF16) for n, s in audio_shapes(config).items()}}.items())
    )


def connectors_specs(config: ConnectorsConfig) -> dict[str, Spec]:
    """Shapes and dtypes of `connectors/`, its audio half too: bfloat16."""
    table = refiner_keys.connectors_table(config)
    specs = _specs(table, build(TextConnectors, config)[1], BF16)
    audio = {n: (s, BF16) for n, s in audio_connector_shapes(config).items()}
    return dict(sorted({**specs, **audio}.items()))


def text_specs(config: GemmaConfig) -> dict[str, Spec]:
    """Shapes and dtypes of a text encoder: bfloat16, without Gemma 3's vision tower."""
    prefix = "model." if config.model_type == GEMMA2 else "language_model.model."
    table = text_keys.key_table(config, prefix)
    return _specs(table, build(GemmaTower, config)[1], BF16)


def _write_text(config: GemmaConfig, folder: Path, tokenizer: Path, seed: int) -> None:
    specs = text_specs(config)
    write_folder(
        folder,
        specs,
        _reader(specs, seed, 0.0),
        stem="model",
        max_bytes=_TEXT_SHARD_BYTES,
        workers=_WORKERS,
    )
    fields = {"hidden_activation": "gelu_pytorch_tanh", "dtype": "bfloat16", **config.to_json()}
    if config.model_type == GEMMA2:
        raw = {"architectures": ["Gemma2ForCausalLM"], "model_type": GEMMA2, **fields}
    else:
        name = "Gemma3ForConditionalGeneration"
        raw = {"architectures": [name], "model_type": "gemma3", "text_config": fields}
    write_json(folder / "config.json", raw)
    # this tokenizer is trained on little text; the released ones use all rows of the table
    write_tokenizer(["\n".join(CHI_PROMPT)], tokenizer, min(1024, config.vocab_size))


def _write_stage1(sizes: Sizes, out: Path, layout: str, seed: int) -> None:
    specs = dit_specs(sizes.dit)
    schedule = Schedule(shift=8.0 if layout == "streaming" else 9.8)
    if layout == "diffusers":
        write_folder(out / "transformer", specs, _reader(specs, seed), workers=_WORKERS)
        write_config(out / "transformer", DIT_CLASS, sizes.dit)
    else:
        read = _reader(specs, seed)
        renamed = {upstream.to_upstream(n): s for n, s in specs.items()}
        caption = ((TEXT_TOKENS, sizes.dit.caption_channels), BF16)
        renamed[upstream.DROPPED_CAPTION] = caption
        (out / "dit").mkdir(parents=True)
        write_file(
            out / "dit" / DIT_FILE,
            renamed,
            lambda name: (
                random_tensor(name, caption, seed)
                if name == upstream.DROPPED_CAPTION
                else read(upstream.to_diffusers(name))
            ),
            workers=_WORKERS,
        )
        write_yaml(out / "config.yaml", upstream_config(sizes.dit, schedule, RELEASES.get(layout)))
    vae, config = vae_specs(sizes.vae), sizes.vae
    folder = out / "vae"
    if layout == "streaming":
        folder, config = out / CAUSAL_VAE, dataclasses.replace(config, decoder_causal=True)
    write_folder(folder, vae, _reader(vae, seed), workers=_WORKERS)
    write_config(folder, VAE_CLASS, config)
    _write_text(sizes.text, out / "text_encoder", out / "tokenizer", seed)
    if layout == "diffusers":
        write_index(out, schedule)


def _write_refiner(sizes: Sizes, out: Path, layout: str, seed: int) -> None:
    is_diffusers = layout == "diffusers"
    name = REFINER_CLASS if is_diffusers else LTX2_CLASS
    for part, specs, config, cls in (
        ("transformer", refiner_specs(sizes.refiner), sizes.refiner, name),
        ("connectors", connectors_specs(sizes.connectors), sizes.connectors, CONNECTORS_CLASS),
    ):
        write_folder(out / part, specs, _reader(specs, seed), workers=_WORKERS)
        write_config(out / part, cls, config)
    text = out.parent / "gemma3_12b" if layout == "streaming" else out / "text_encoder"
    _write_text(sizes.refiner_text, text, out / "tokenizer" if is_diffusers else text, seed)
    if is_diffusers:
        write_refiner_index(out, sizes.text_length)


def write_random(
    out: str | Path,
    *,
    layout: str = "diffusers",
    part: str = "stage1",
    sizes: Sizes = RELEASED,
    seed: int = 0,
) -> list[Path]:
    """Writes random weights, with at most one tensor per processor and 32 in all in memory.

    Args:
      out: a new folder. With `all` in diffusers layout the refiner goes to `OUT-refiner`, in
        upstream's to `OUT/refiner`, or `OUT/refiner_diffusers` of the streaming release.
      layout: `diffusers`, `upstream`, or one of `RELEASES`, which are in upstream's layout.
      part: `stage1`, `refiner` or `all`.
      sizes: of the networks.
      seed: of the values.

    Returns:
      The folders written.

    Raises:
      InputError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    written = []
    has_stage1, has_refiner = part in ("stage1", "all"), part in ("refiner", "all")
    is_upstream = layout != "diffusers"
    refiner = "refiner_diffusers" if layout == "streaming" else "refiner"
    if has_stage1 or is_upstream:
        with complete_folder(out) as partial:
            if has_stage1:
                _write_stage1(sizes, partial, layout, seed)
            if has_refiner and is_upstream:
                _write_refiner(sizes, partial / refiner, layout, seed)
        written.append(out)
    if has_refiner and not is_upstream:
        target = out.with_name(f"{out.name}-refiner") if has_stage1 else out
        with complete_folder(target) as partial:
            _write_refiner(sizes, partial, layout, seed)
        written.append(target)
    return written
