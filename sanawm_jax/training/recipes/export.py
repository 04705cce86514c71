"""Trained weights as component folders in the diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import published_fields
from sanawm_jax.core.params import Params
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import extra_tensors
from sanawm_jax.dit.keys import key_table as dit_table
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.keys import connectors_table, refiner_table
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.keys import key_table as vae_table

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# classes of the published model_index.json
_INDEX = {
    "_class_name": "SanaWMPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "SanaWMTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLLTX2Video"],
}

_REFINER_INDEX = {
    "_class_name": "SanaWMLTX2Refiner",
    "connectors": ["ltx2", "LTX2TextConnectors"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma3TextModel"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", "SanaWMLTX2RefinerTransformer3DModel"],
}


def export_vae(config: VAEConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of an autoencoder; its statistics stay float32."""
    tensors = keymap.export(vae_table(config), params)
    tensors = {
        k: v if k in ("latents_mean", "latents_std") else _cast(v, dtype)
        for k, v in tensors.items()
    }
    _write(folder, "AutoencoderKLLTX2Video", config, tensors)


def export_transformer(config: DiTConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of a stage-1 network."""
    tensors = keymap.export(dit_table(config), params, extra_tensors(config))
    tensors = {k: _cast(v, dtype) for k, v in tensors.items()}
    _write(folder, "SanaWMTransformer3DModel", config, tensors)


def export_refiner(config: RefinerConfig, params: Params, folder: str | Path, dtype: str) -> None:
    """Writes config.json and weights of the refiner's transformer, its video half alone.

    diffusers fills the audio half, which no refiner runs, with random numbers and says so.
    """
    tensors = keymap.export(refiner_table(config), params)
    tensors = {k: _cast(v, dtype) for k, v in tensors.items()}
    _write(folder, "SanaWMLTX2RefinerTransformer3DModel", config, tensors)


def export_connectors(
    config: ConnectorsConfig, params: Params, folder: str | Path, dtype: str
) -> None:
    """Writes config.json and weights of the text connectors."""
    tensors = keymap.export(connectors_table(config), params)
    tensors = {k: _cast(v, dtype) for k, v in tensors.items()}
    _write(folder, "LTX2TextConnectors", config, tensors)


def write_refiner_index(
    folder: str | Path, text_length: int, sigmas: tuple[float, ...] = SIGMAS
) -> None:
    """Writes model_index.json and scheduler/ of a refiner folder."""
    extra = {} if sigmas == SIGMAS else {"distilled_sigmas": list(sigmas)}
    index = {**_REFINER_INDEX, "text_max_sequence_length": text_length}
    write_index(folder, 1.0, index, extra)


def write_index(
    folder: str | Path,
    flow_shift: float,
    index: dict[str, Any] = _INDEX,
    schedule: dict[str, Any] | None = None,
) -> None:
    """Writes model_index.json and scheduler/ of a folder that holds the other components.

    Args:
      schedule: further fields of the scheduler's configuration.
    """
    folder = Path(folder)
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": flow_shift,
        **(schedule or {}),
    }
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", index)


def _cast(value: np.ndarray, dtype: str) -> np.ndarray:
    return value.astype(jnp.dtype(dtype)) if value.dtype.kind == "f" else value


def _write(
    folder: str | Path,
    name: str,
    config: DiTConfig | VAEConfig | RefinerConfig | ConnectorsConfig,
    tensors: dict[str, np.ndarray],
) -> None:
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    _write_json(folder / "config.json", {"_class_name": name, **published_fields(config)})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
