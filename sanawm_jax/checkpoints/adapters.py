"""LoRA adapters as files: PEFT's layout, and diffusers' own.

    PEFT       adapter_config.json, adapter_model.safetensors
               base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight  (R, in)
    diffusers  pytorch_lora_weights.safetensors, alpha in the file's metadata
               transformer.transformer_blocks.0.attn1.to_q.lora_A.weight

Layers have the model's published names, which its key table gives. Both layouts are read, and
PEFT's is written. A diffusers model loads such files with `load_lora_adapter(DIR,
weight_name="adapter_model.safetensors", prefix="base_model.model")`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.checkpoints.keymap import Entry
from sanawm_jax.core.lora import LoraConfig
from sanawm_jax.core.params import Params, from_leaves, leaves
from sanawm_jax.runtime.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "base_model.model."
_PREFIXES = (_PREFIX, "transformer.", "diffusion_model.")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration of an adapter
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# options of PEFT beyond plain LoRA, and the values that switch them off
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds adapters in one of the two layouts."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE))


def save_adapters(
    folder: str | Path,
    adapters: Params,
    lora: LoraConfig,
    table: Sequence[Entry],
    *,
    base: str = "",
    dtype: Any = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      adapters: see `core.lora`.
      lora: the configuration that made them.
      table: the base model's key table, which gives the published names.
      base: the base model's folder or hub name, for `base_model_name_or_path`.
      dtype: the dtype in the file; None keeps that of the adapters.
    """
    from safetensors.numpy import save_file

    flat = {path: np.asarray(leaf) for path, leaf in leaves(adapters)}
    tensors, modules = {}, set()
    for entry in table:
        layer = entry.path.removesuffix(".kernel")
        if f"{layer}.lora_a" not in flat:
            continue
        module = entry.source.removesuffix(".weight")
        modules.add(module)
        for ours, theirs in _FACTORS.items():
            value = entry.layout.to_theirs(flat[f"{layer}.{ours}"][entry.index])
            value = value if dtype is None else value.astype(dtype)
            tensors[f"{_PREFIX}{module}.{theirs}.weight"] = np.asarray(value, order="C")
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _target_modules(modules),
    }
    metadata = {"format": "pt", _METADATA: json.dumps({_PREFIX + k: v for k, v in config.items()})}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata=metadata)
    config |= {"base_model_name_or_path": base or None, "inference_mode": True, "task_type": None}
    text = json.dumps(config, indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _target_modules(modules: set[str]) -> str:
    """A regular expression that PEFT matches whole names with; the same for every layer."""
    # PEFT matches a list by the ends of names, and `audio_attn1.to_q` also ends with `attn1.to_q`
    names = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(module)) for module in modules}
    return "|".join(sorted(names))


def adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, or the metadata that diffusers writes in its place, or nothing.

    Raises:
      InputError: the file is broken, or it asks for more than plain LoRA.
    """
    if (folder / CONFIG_FILE).is_file():
        config = read_config(folder, CONFIG_FILE)
    else:
        _, metadata = _read(folder)
        raw = json.loads(metadata.get(_METADATA) or "{}")
        config = {_without_prefix(k): v for k, v in raw.items()}
    for field, plain in _PLAIN.items():
        if config.get(field) not in plain:
            raise InputError(f"{folder}: {field}={config[field]!r} is not supported")
    return config


def load_adapters(
    folder: str | Path, abstract: Params, table: Sequence[Entry]
) -> tuple[LoraConfig, Params]:
    """Adapters of a folder as a tree for `core.lora.merge_lora` or further training.

    Args:
      folder: in either layout.
      abstract: the base model's shapes.
      table: its key table.

    Returns:
      their configuration, whose targets are the layers in the file, and float32 adapters.

    Raises:
      InputError: unknown or missing layers, or ranks or shapes that do not fit the base.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    tensors, _ = _read(folder)
    tensors = {_without_prefix(k): v for k, v in tensors.items()}
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    by_name = {
        f"{entry.source.removesuffix('.weight')}.{theirs}.weight": (entry, ours)
        for entry in table
        if entry.path.endswith(".kernel")
        for ours, theirs in _FACTORS.items()
    }
    alphas = {k: float(tensors.pop(k)) for k in [k for k in tensors if k.endswith(".alpha")]}
    _refuse(folder, "has tensors of layers that the base lacks", tensors.keys() - by_name.keys())
    rank = int(config.get("r") or _rank_of(tensors))
    layers = {by_name[k][0].path.removesuffix(".kernel") for k in tensors}
    absent = {
        name
        for name, (entry, _) in by_name.items()
        if entry.path.removesuffix(".kernel") in layers and name not in tensors
    }
    _refuse(folder, "lacks", absent)
    flat: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        entry, ours = by_name[name]
        *stack, inputs, outputs = shapes[entry.path]
        shape = (inputs, rank) if ours == "lora_a" else (rank, outputs)
        found = entry.layout.to_ours(value)
        if found.shape != shape:
            raise InputError(
                f"{folder}: {name} is {value.shape}, which does not fit rank {rank} on the base's "
                f"{inputs} to {outputs} channels"
            )
        path = f"{entry.path.removesuffix('.kernel')}.{ours}"
        target = flat.setdefault(path, np.empty((*stack, *shape), np.float32))
        target[entry.index] = found
    alpha = config.get("lora_alpha")
    if alpha is None and alphas:
        if len(set(alphas.values())) > 1:
            raise InputError(f"{folder}: layers with different alpha are not supported")
        alpha = next(iter(alphas.values()))
    targets = tuple(sorted(re.escape(layer) for layer in layers))
    return LoraConfig(rank, targets, None if alpha is None else float(alpha)), from_leaves(flat)


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    name = next((n for n in (WEIGHTS_FILE, DIFFUSERS_FILE) if (folder / n).is_file()), None)
    if name is None:
        raise InputError(f"{folder} holds neither {WEIGHTS_FILE} nor {DIFFUSERS_FILE}")
    source = SafetensorsFolder(folder, [name])
    tensors = {key: source.read(key) for key in source.keys()}
    if not tensors:
        raise InputError(f"{folder / name} holds no tensors")
    with safe_open(str(folder / name), framework="numpy") as file:
        return tensors, file.metadata() or {}


def _without_prefix(key: str) -> str:
    return next((key.removeprefix(p) for p in _PREFIXES if key.startswith(p)), key)


def _rank_of(tensors: dict[str, np.ndarray]) -> int:
    return next((v.shape[0] for k, v in tensors.items() if ".lora_A." in k), 0)


def _refuse(folder: Path, problem: str, names: Any) -> None:
    if names:
        first = sorted(names)
        more = f" and {len(first) - 4} more" if len(first) > 4 else ""
        raise InputError(f"{folder} {problem}: {', '.join(first[:4])}{more}")
