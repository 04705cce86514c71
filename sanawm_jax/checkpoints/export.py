"""Writes published weights in the other layout, tensor by tensor and without a change.

A layout's tables name the same tensors of the same shape and dtype, so this only renames. What the
tables do not know is an error, as in loading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints import upstream
from sanawm_jax.checkpoints.adapters import is_adapter_folder
from sanawm_jax.checkpoints.files import (
    SafetensorsFolder,
    class_name,
    published_fields,
    read_config,
)
from sanawm_jax.checkpoints.folder import Stage1Folder, find_weights
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.checkpoints.upstream_folder import (
    RELEASED_MODEL,
    UpstreamFolder,
    UpstreamRefiner,
    find_refiner,
    is_upstream,
    open_stage1,
)
from sanawm_jax.checkpoints.writer import Spec, copy_folder, write_file, write_folder, write_json
from sanawm_jax.core.lora import merge_lora
from sanawm_jax.core.params import leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import extra_tensors
from sanawm_jax.refiner.keys import refiner_table
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule

LAYOUTS = ("diffusers", "upstream")
DIT_FILE = "sana_wm_1600m_720p.safetensors"
TEXT_TOKENS = 300
STAGE1_INDEX: dict[str, Any] = {
    "_class_name": "SanaWMPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2ForCausalLM"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "SanaWMTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLLTX2Video"],
}
REFINER_CLASS = "SanaWMLTX2RefinerTransformer3DModel"
REFINER_INDEX: dict[str, Any] = {
    "_class_name": "SanaWMLTX2Refiner",
    "connectors": ["ltx2", "LTX2TextConnectors"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", REFINER_CLASS],
    "text_max_sequence_length": 1024,
}
_TOKENIZER_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template")


def export_weights(
    weights: str | Path, layout: str, out: str | Path, *, allow_pickle: bool = False
) -> list[Path]:
    """Writes a stage-1 or a refiner folder in a layout.

    Args:
      weights: a folder of either layout and either stage, or a hub name.
      layout: `diffusers` or `upstream`. In diffusers layout a refiner is a folder of its own, so
        one inside upstream's folder goes to `OUT-refiner`; in upstream's it goes to `OUT/refiner`.
      out: a folder that does not exist or is empty; it appears when it is complete.
      allow_pickle: see `upstream_folder.open_stage1`.

    Returns:
      The folders written.

    Raises:
      InputError: the weights cannot be read or do not fit, or `out` is in the way.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    source = find_weights(weights, allow_pickle=allow_pickle)
    out = Path(out)
    refiner = _open_refiner(source)
    has_stage1 = refiner is None or (isinstance(refiner, UpstreamRefiner) and _has_dit(source))
    written = []
    if has_stage1:
        stage1 = open_stage1(source, allow_pickle=allow_pickle)
        for part in ("transformer", "encoder", "decoder"):
            stage1.check(part)
        with complete_folder(out) as partial:
            (_to_diffusers if layout == "diffusers" else _to_upstream)(stage1, partial)
            if refiner is not None and layout == "upstream":
                refiner.check()
                export_refiner(refiner, partial / "refiner", layout)
        written.append(out)
    if refiner is not None and not (has_stage1 and layout == "upstream"):
        refiner.check()
        target = out.with_name(f"{out.name}-refiner") if has_stage1 else out
        with complete_folder(target) as partial:
            inner = partial / "refiner" if layout == "upstream" else partial
            export_refiner(refiner, inner, layout)
        written.append(target)
    return written


def _has_dit(source: Path) -> bool:
    return any((source / name).is_dir() for name in ("dit", "sana_dit"))


def _open_refiner(source: Path) -> RefinerFolder | None:
    if is_adapter_folder(source):
        return RefinerFolder(source)
    if find_refiner(source) is not None:
        return UpstreamRefiner(source)
    if is_upstream(source):
        return None
    index = read_config(source, "model_index.json")
    return RefinerFolder(source) if "connectors" in index else None


@contextlib.contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """Yields another folder beside `out`, which becomes `out` if the block ends well.

    Raises:
      InputError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; --out takes a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dit_tensors(
    folder: Stage1Folder, rename: Callable[[str], str]
) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
    """The DiT's tensors by the names that `rename` makes of diffusers'."""
    source = folder.dit_weights().source
    prefix = upstream.find_prefix(source.keys())
    names = {}
    for key in source.keys():
        name = rename(upstream.to_diffusers(key.removeprefix(prefix)))
        if name != "pos_embed":
            names[name] = key
    specs = {n: (source.shape(names[n]), source.dtype(names[n])) for n in sorted(names)}
    config = folder.dit_config()
    made = {rename(n): v for n, v in extra_tensors(config).items() if rename(n) not in names}
    specs |= {n: (v.shape, v.dtype) for n, v in made.items()}

    def read(name: str) -> np.ndarray:
        return made[name] if name in made else source.read(names[name])

    return specs, read


def _to_diffusers(folder: Stage1Folder, out: Path) -> None:
    specs, read = _dit_tensors(folder, lambda name: name)
    specs.pop(upstream.DROPPED_CAPTION, None)  # diffusers' class has none
    write_folder(out / "transformer", specs, read)
    config = published_fields(folder.dit_config())
    write_json(
        out / "transformer" / "config.json", {"_class_name": "SanaWMTransformer3DModel", **config}
    )
    copy_folder(folder.part("vae"), out / "vae")
    copy_text(folder.part("text_encoder"), folder.part("tokenizer"), out)
    write_scheduler(out, folder.schedule())
    index = {**STAGE1_INDEX, **{k: v for k, v in folder.index.items() if k in STAGE1_INDEX}}
    if not folder.index and (name := architecture(out / "text_encoder")):
        index["text_encoder"] = ["transformers", name]
    write_json(out / "model_index.json", {**index, "_class_name": "SanaWMPipeline"})


def copy_text(text_encoder: Path, tokenizer: Path, out: Path) -> None:
    """Copies a text encoder and its tokenizer, which may share a folder, to two folders."""
    copy_folder(text_encoder, out / "text_encoder")
    copy_folder(tokenizer, out / "tokenizer")
    if text_encoder == tokenizer:
        for file in (out / "tokenizer").iterdir():
            if not file.name.startswith(_TOKENIZER_FILES):
                file.unlink()


def architecture(folder: Path) -> str | None:
    """The class that a text encoder's config.json names."""
    names = read_config(folder).get("architectures") or [None]
    return names[0]


def write_scheduler(out: Path, schedule: Schedule) -> None:
    """Writes `scheduler/scheduler_config.json`."""
    fields = dataclasses.asdict(schedule)
    fields = {k: v for k, v in fields.items() if v is not None}
    write_json(
        out / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", **fields},
    )


def _to_upstream(folder: Stage1Folder, out: Path) -> None:
    config = folder.dit_config()
    specs, read = _dit_tensors(folder, upstream.to_upstream)
    # only training with dropped captions reads it; zeros stand where the source has none
    shape = (TEXT_TOKENS, config.caption_channels)
    has_captions = upstream.DROPPED_CAPTION in specs
    specs.setdefault(upstream.DROPPED_CAPTION, (shape, np.dtype(np.float32)))

    def read_all(name: str) -> np.ndarray:
        if name == upstream.DROPPED_CAPTION and not has_captions:
            return np.zeros(shape, np.float32)
        return read(name)

    (out / "dit").mkdir()
    write_file(out / "dit" / DIT_FILE, specs, read_all)
    copy_folder(folder.part("vae"), out / "vae")
    for part in ("text_encoder", "tokenizer"):
        if (folder.path / part).is_dir():
            copy_folder(folder.path / part, out / part)
    if isinstance(folder, UpstreamFolder):
        write_yaml(out / "config.yaml", folder.yaml)
    else:
        write_yaml(out / "config.yaml", upstream_config(config, folder.schedule()))


def upstream_config(config: DiTConfig, schedule: Schedule) -> dict[str, Any]:
    """Upstream's config.yaml of a network; a size that upstream has no name for adds num_heads."""
    model: dict[str, Any] = {
        "model": RELEASED_MODEL,
        "attn_type": "BidirectionalGDNTriton",
        "camctrl_type": "BidirectionalGDNUCPESinglePathLiteLABothTriton",
    }
    if (config.hidden_size, config.num_layers, config.num_attention_heads) != (2240, 20, 20):
        model |= {"model": "custom", "num_heads": config.num_attention_heads}
    fields = published_fields(config)
    for name in (
        *("softmax_every_n", "linear_head_dim", "conv_kernel_size", "k_conv_only", "ffn_type"),
        *("t_kernel_size", "mlp_ratio", "use_pe", "pos_embed_type", "qk_norm", "cross_norm"),
        *("cam_attn_compress", "init_cam_from_base", "use_chunk_plucker_post_attn"),
        *("chunk_plucker_channels", "chunk_plucker_post_attn_blocks", "fp32_attention"),
        *("image_size", "mixed_precision"),
    ):
        model[name] = fields[name]
    model["mlp_acts"] = list(config.mlp_acts)
    return {
        "model": model,
        "vae": {"vae_type": "LTX2VAE_diffusers", "vae_latent_dim": config.in_channels},
        "text_encoder": {
            "text_encoder_name": "gemma-2-2b-it",
            "y_norm": config.y_norm,
            "model_max_length": TEXT_TOKENS,
        },
        "scheduler": {"inference_flow_shift": schedule.shift, "pred_sigma": config.pred_sigma},
    }


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Writes a configuration as upstream does."""
    import yaml

    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def export_refiner(folder: RefinerFolder, out: Path, layout: str) -> None:
    """Copies a refiner, adapters merged; both layouts have diffusers' names, in other folders.

    Raises:
      InputError: its noise levels are its own, and upstream's layout has no place for them.
    """
    if layout == "upstream" and folder.sigmas != SIGMAS:
        raise InputError(
            f"{folder.path} samples at noise levels of its own, for which upstream's layout has no "
            "place; use --layout diffusers"
        )
    if folder.lora is None:
        copy_folder(folder.part("transformer"), out / "transformer")
    else:
        _write_merged(folder, out / "transformer")
    copy_folder(folder.part("connectors"), out / "connectors")
    if layout == "upstream":
        copy_folder(folder.part("text_encoder"), out / "text_encoder")
        copy_folder(folder.part("tokenizer"), out / "text_encoder")  # as released: beside it
        return
    copy_text(folder.part("text_encoder"), folder.part("tokenizer"), out)
    transformer = out / "transformer"
    if class_name(transformer) != REFINER_CLASS:  # the release names LTX-2's own class
        raw = read_config(transformer)
        write_json(transformer / "config.json", {"_class_name": REFINER_CLASS, **raw})
    levels = None if folder.sigmas == SIGMAS else folder.sigmas
    write_scheduler(out, Schedule(distilled_sigmas=levels))
    index = {**REFINER_INDEX, "text_max_sequence_length": folder.text_length}
    if name := architecture(out / "text_encoder"):
        index["text_encoder"] = ["transformers", name]
    write_json(out / "model_index.json", index)


def _write_merged(folder: RefinerFolder, out: Path) -> None:
    """The transformer with its adapters in its kernels, a tensor at a time; dtypes stay."""
    part = folder.part("transformer")
    source, (lora, adapters) = SafetensorsFolder(part), folder.load_lora()
    factors = dict(leaves(adapters))
    entries = {entry.source: entry for entry in refiner_table(folder.config)}

    def read(name: str) -> np.ndarray:
        value = source.read(name)
        entry = entries.get(name)  # none of the audio half has one
        layer = entry.path.removesuffix(".kernel") if entry else ""
        if entry is None or f"{layer}.lora_a" not in factors:
            return value
        base = {"layer": {"kernel": entry.layout.to_ours(value)}}
        pair = {f: factors[f"{layer}.{f}"][entry.index] for f in ("lora_a", "lora_b")}
        merged = merge_lora(base, {"layer": pair}, lora.scale)
        return entry.layout.to_theirs(np.asarray(merged["layer"]["kernel"]))

    write_folder(out, {n: (source.shape(n), source.dtype(n)) for n in source.keys()}, read)
    write_json(out / "config.json", read_config(part))
