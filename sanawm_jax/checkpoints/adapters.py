"""LoRA adapters as files: PEFT's layout, diffusers' own, and the names that other trainers use.

    PEFT       adapter_config.json, adapter_model.safetensors
               base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight  (R, in)
    diffusers  pytorch_lora_weights.safetensors, alpha in the file's metadata
               transformer.transformer_blocks.0.attn1.to_q.lora_A.weight
    kohya      any name, alpha as a tensor
               lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight

Layers have the model's published names, which its key table gives. All of these are read
(`adapter_names.py` has the names), and PEFT's is written. A diffusers model loads such files with
`load_lora_adapter(DIR, weight_name="adapter_model.safetensors", prefix="base_model.model")`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.checkpoints.adapter_names import Names, without_prefix
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.checkpoints.keymap import Entry
from sanawm_jax.core.lora import LoraConfig
from sanawm_jax.core.params import Params, from_leaves, leaves
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import is_companion
from sanawm_jax.runtime.json_file import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration of an adapter
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# options of PEFT beyond plain LoRA, and the values that switch them off
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
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
        text = metadata.get(_METADATA) or "{}"
        raw = parse_json(text, f"{folder}: {_METADATA}")
        if not isinstance(raw, dict):
            raise InputError(f"{folder}: {_METADATA} holds no object of named values")
        config = {without_prefix(k): v for k, v in raw.items()}
    for field, plain in _PLAIN.items():
        if config.get(field) not in plain:
            raise InputError(f"{folder}: {field}={config[field]!r} is not supported")
    return config


def load_adapters(
    folder: str | Path,
    abstract: Params,
    table: Sequence[Entry],
    *,
    skipped: Callable[[str], bool] = lambda module: False,
    renamed: Mapping[str, str] | None = None,
) -> tuple[LoraConfig, Params] | None:
    """Adapters of a folder as a tree for `core.lora.merge_lora` or further training.

    Layers may have different ranks and scales. The result has the largest rank, and zeros where a
    layer has a smaller one or no adapter.

    Args:
      folder: in one of the layouts.
      abstract: the base model's shapes.
      table: its key table.
      skipped: names of layers that are left out, as the base leaves them out.
      renamed: other names of layers, see `adapter_names.Names`.

    Returns:
      their configuration, whose targets are the layers in the file, and float32 adapters. None if
      all of them are left out.

    Raises:
      InputError: unknown or incomplete layers, or shapes that do not fit the base.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    tensors, _ = _read(folder)
    kernels = {
        entry.source.removesuffix(".weight"): entry
        for entry in table
        if entry.path.endswith(".kernel")
    }
    found = Names(kernels, skipped, renamed or {}).sort(tensors, folder)
    if not found:
        return None
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    ranks, scales = {}, {}
    for module, parts in found.items():
        a, b = parts["lora_A"], parts["lora_B"]
        *_, inputs, outputs = shapes[kernels[module].path]
        rank = a.shape[0] if a.ndim else 0
        stated = _of_pattern(config.get("rank_pattern"), module, config.get("r")) or rank
        if rank != stated or a.shape != (rank, inputs) or b.shape != (outputs, rank) or not rank:
            raise InputError(
                f"{folder}: the factors of {module} are {a.shape} and {b.shape}, which does not "
                f"fit rank {stated} on the base's {inputs} to {outputs} channels"
            )
        ranks[module] = rank
        scales[module] = _scale(config, module, rank, parts.get("alpha"), folder)
    rank, is_uniform = max(ranks.values()), len({*scales.values()}) == 1
    flat: dict[str, np.ndarray] = {}
    for module, parts in found.items():
        entry = kernels[module]
        layer = entry.path.removesuffix(".kernel")
        *stack, inputs, outputs = shapes[entry.path]
        factor = 1.0 if is_uniform else scales[module]
        for ours, theirs in _FACTORS.items():
            value = np.asarray(entry.layout.to_ours(parts[theirs]), np.float32)
            shape = (inputs, rank) if ours == "lora_a" else (rank, outputs)
            target = flat.setdefault(f"{layer}.{ours}", np.zeros((*stack, *shape), np.float32))
            used = np.s_[:, : ranks[module]] if ours == "lora_a" else np.s_[: ranks[module]]
            target[entry.index][used] = value * (factor if ours == "lora_b" else 1.0)
    layers = {kernels[module].path.removesuffix(".kernel") for module in found}
    targets = tuple(sorted(re.escape(layer) for layer in layers))
    scale = next(iter(scales.values())) if is_uniform else 1.0
    return LoraConfig(rank, targets, None if scale == 1 else scale * rank), from_leaves(flat)


def _scale(
    config: dict[str, Any], module: str, rank: int, alpha: np.ndarray | None, folder: Path
) -> float:
    """The factor of a layer's product: alpha / rank, as PEFT and kohya define alpha.

    Raises:
      InputError: alpha is not a positive number.
    """
    value = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if alpha is not None:
        value = float(alpha.reshape(-1)[0]) if alpha.size == 1 else None
    elif value is None:
        return 1.0
    try:
        value = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        value = math.nan
    if not (0 < value < math.inf):
        raise InputError(f"{folder}: alpha of {module} is not a positive number")
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"alpha_pattern: {pattern!r} is no expression ({error})") from None
    return default


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    name = next((n for n in (WEIGHTS_FILE, DIFFUSERS_FILE) if (folder / n).is_file()), None)
    if name is None:
        others = sorted(f.name for f in folder.glob("*.safetensors") if not is_companion(f.name))
        if len(others) != 1:
            raise InputError(
                f"{folder} holds neither {WEIGHTS_FILE} nor {DIFFUSERS_FILE}, and "
                f"{len(others)} other .safetensors files; keep one"
            )
        name = others[0]
    source = SafetensorsFolder(folder, [name])
    tensors = {key: source.read(key) for key in source.keys()}
    if not tensors:
        raise InputError(f"{folder / name} holds no tensors")
    with safe_open(str(folder / name), framework="numpy") as file:
        return tensors, file.metadata() or {}
