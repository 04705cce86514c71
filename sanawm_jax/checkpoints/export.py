"""Writes weights as folders: trained parameters, and published folders in the other layout.

Both layouts hold the same tensors with the same shapes and dtypes under other names, so converting
one only renames them, tensor by tensor. A tensor that a table does not name is an error, as in
loading. What a folder holds is in `layouts`.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sanawm_jax.checkpoints import keymap, upstream
from sanawm_jax.checkpoints.adapters import is_adapter_folder
from sanawm_jax.checkpoints.files import SafetensorsFolder, class_name, read_config
from sanawm_jax.checkpoints.folder import Stage1Folder, find_weights
from sanawm_jax.checkpoints.layouts import (
    CONNECTORS_CLASS,
    DIT_CLASS,
    DIT_FILE,
    LATENT_STATISTICS,
    LAYOUTS,
    REFINER_CLASS,
    STAGE1_INDEX,
    TEXT_TOKENS,
    VAE_CLASS,
    upstream_config,
    write_config,
    write_index,
    write_refiner_index,
    write_yaml,
)
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.checkpoints.upstream_folder import (
    CAUSAL_VAE,
    UpstreamFolder,
    UpstreamRefiner,
    find_refiner,
    is_upstream,
    open_stage1,
)
from sanawm_jax.checkpoints.writer import Spec, copy_folder, write_file, write_folder, write_json
from sanawm_jax.core.lora import merge_lora
from sanawm_jax.core.params import Params, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import extra_tensors
from sanawm_jax.dit.keys import key_table as dit_table
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.keys import connectors_table, refiner_table
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import key_table as vae_table

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
      allow_pickle: see `checkpoints.upstream_folder.open_stage1`.

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
                _convert_refiner(refiner, partial / "refiner", layout)
        written.append(out)
    if refiner is not None and not (has_stage1 and layout == "upstream"):
        refiner.check()
        target = out.with_name(f"{out.name}-refiner") if has_stage1 else out
        with complete_folder(target) as partial:
            inner = partial / "refiner" if layout == "upstream" else partial
            _convert_refiner(refiner, inner, layout)
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
    """Yields a temporary folder next to `out`, which becomes `out` if the block ends well.

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
    """The DiT's tensors under the names that `rename` gives to diffusers' names."""
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
    write_config(out / "transformer", DIT_CLASS, folder.dit_config())
    copy_folder(folder.part("vae"), out / "vae")
    _copy_text(folder.part("text_encoder"), folder.part("tokenizer"), out)
    kept = {name: folder.index[name] for name in STAGE1_INDEX if name in folder.index}
    if folder.layout_numerics() != "diffusers":
        kept["numerics"] = folder.layout_numerics()
    write_index(out, folder.schedule(), **kept, **folder.stream_options())


def _copy_text(text_encoder: Path, tokenizer: Path, out: Path) -> None:
    """Copies a text encoder and its tokenizer, which may be in one folder, to two folders."""
    copy_folder(text_encoder, out / "text_encoder")
    copy_folder(tokenizer, out / "tokenizer")
    if text_encoder == tokenizer:
        for file in (out / "tokenizer").iterdir():
            if not file.name.startswith(_TOKENIZER_FILES):
                file.unlink()


def _to_upstream(folder: Stage1Folder, out: Path) -> None:
    config = folder.dit_config()
    specs, read = _dit_tensors(folder, upstream.to_upstream)
    # only training with dropped captions reads it; zeros if the source does not have it
    shape = (TEXT_TOKENS, config.caption_channels)
    has_captions = upstream.DROPPED_CAPTION in specs
    specs.setdefault(upstream.DROPPED_CAPTION, (shape, np.dtype(np.float32)))

    def read_all(name: str) -> np.ndarray:
        if name == upstream.DROPPED_CAPTION and not has_captions:
            return np.zeros(shape, np.float32)
        return read(name)

    (out / "dit").mkdir()
    write_file(out / "dit" / DIT_FILE, specs, read_all)
    vae = folder.part("vae")
    copy_folder(vae, out / (vae.name if vae.name == CAUSAL_VAE else "vae"))
    for part in ("text_encoder", "tokenizer"):
        if (folder.path / part).is_dir():
            copy_folder(folder.path / part, out / part)
    if isinstance(folder, UpstreamFolder):
        write_yaml(out / "config.yaml", folder.yaml)
    else:
        options = folder.stream_options()
        write_yaml(out / "config.yaml", upstream_config(config, folder.schedule(), options))


def _convert_refiner(folder: RefinerFolder, out: Path, layout: str) -> None:
    """Copies a refiner with its adapters merged; both layouts name its tensors as diffusers does.

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
    _copy_text(folder.part("text_encoder"), folder.part("tokenizer"), out)
    transformer = out / "transformer"
    if class_name(transformer) != REFINER_CLASS:  # the release names the class of LTX-2
        raw = read_config(transformer)
        write_json(transformer / "config.json", {"_class_name": REFINER_CLASS, **raw})
    write_refiner_index(out, folder.text_length, folder.sigmas)


def _write_merged(folder: RefinerFolder, out: Path) -> None:
    """Writes the transformer with its adapters merged, one tensor at a time; dtypes stay."""
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


def export_vae(config: VAEConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of an autoencoder; its statistics stay float32."""
    tensors = keymap.export(vae_table(config), params)
    _write_trained(folder, VAE_CLASS, config, tensors, dtype, exact=LATENT_STATISTICS)


def export_transformer(config: DiTConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of a stage-1 network."""
    tensors = keymap.export(dit_table(config), params, extra_tensors(config))
    _write_trained(folder, DIT_CLASS, config, tensors, dtype)


def export_refiner(config: RefinerConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of the refiner's transformer, its video half alone.

    No refiner runs the audio half; diffusers fills it with random numbers and says so.
    """
    _write_trained(
        folder, REFINER_CLASS, config, keymap.export(refiner_table(config), params), dtype
    )


def export_connectors(
    config: ConnectorsConfig, params: Params, folder: str | Path, dtype: str
) -> None:
    """Writes config.json and weights of the text connectors."""
    tensors = keymap.export(connectors_table(config), params)
    _write_trained(folder, CONNECTORS_CLASS, config, tensors, dtype)


def _write_trained(
    folder: str | Path,
    name: str,
    config: Any,
    tensors: dict[str, np.ndarray],
    dtype: str,
    exact: Sequence[str] = (),
) -> None:
    """Writes a component; its floating tensors are cast to `dtype`, except those in `exact`."""
    final = {
        key: value.astype(jnp.dtype(dtype))
        if value.dtype.kind == "f" and key not in exact
        else value
        for key, value in tensors.items()
    }
    specs = {key: (final[key].shape, final[key].dtype) for key in sorted(final)}
    write_folder(Path(folder), specs, final.__getitem__)
    write_config(Path(folder), name, config)
