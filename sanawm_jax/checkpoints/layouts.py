"""What a model folder holds besides tensors, in each of the two layouts.

diffusers   model_index.json  transformer/  text_encoder/  tokenizer/  scheduler/
            and vae/ in stage 1, connectors/ in the refiner
upstream    config.yaml  dit/  vae/  [text_encoder/  tokenizer/]  [refiner/]
            refiner/: transformer/  connectors/  text_encoder/, which holds the tokenizer too
            The streaming release calls vae/ ltx2_causal_vae/, refiner/ refiner_diffusers/, and
            keeps the refiner's text encoder in gemma3_12b/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sanawm_jax.checkpoints.files import published_fields, read_config
from sanawm_jax.checkpoints.upstream_folder import (
    CACHED_FFN,
    CHUNKED_FFN,
    RELEASED_LEVELS,
    RELEASED_MODEL,
    STREAMING_MODEL,
)
from sanawm_jax.checkpoints.writer import write_json
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.sampling.schedule import Schedule

LAYOUTS = ("diffusers", "upstream")
# what upstream also releases in its layout, with the `Stage1Folder.stream_options` of each
RELEASES: dict[str, dict[str, Any]] = {
    "chunk_causal": {"num_frame_per_block": 3},
    "streaming": {
        "num_frame_per_block": 3,
        "num_cached_blocks": 2,
        "denoising_step_list": RELEASED_LEVELS,
    },
}
DIT_CLASS = "SanaWMTransformer3DModel"
VAE_CLASS = "AutoencoderKLLTX2Video"
REFINER_CLASS = "SanaWMLTX2RefinerTransformer3DModel"
LTX2_CLASS = "LTX2VideoTransformer3DModel"  # the same tensors, named so by upstream's folder
CONNECTORS_CLASS = "LTX2TextConnectors"
_SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
STAGE1_INDEX: dict[str, Any] = {
    "_class_name": "SanaWMPipeline",
    "scheduler": ["diffusers", _SCHEDULER_CLASS],
    "text_encoder": ["transformers", "Gemma2ForCausalLM"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", DIT_CLASS],
    "vae": ["diffusers", VAE_CLASS],
}
REFINER_INDEX: dict[str, Any] = {
    "_class_name": "SanaWMLTX2Refiner",
    "connectors": ["ltx2", CONNECTORS_CLASS],
    "scheduler": ["diffusers", _SCHEDULER_CLASS],
    "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
    "tokenizer": ["transformers", "GemmaTokenizer"],
    "transformer": ["diffusers", REFINER_CLASS],
}
LATENT_STATISTICS = ("latents_mean", "latents_std")  # of `vae/`, float32 in every folder
DIT_FILE = "sana_wm_1600m_720p.safetensors"  # in upstream's `dit/`
TEXT_TOKENS = 300  # of upstream's config.yaml


def write_index(
    folder: str | Path, schedule: Schedule, index: dict[str, Any] = STAGE1_INDEX, **known: Any
) -> None:
    """Writes model_index.json and scheduler/ of a folder in diffusers layout.

    Args:
      folder: its text encoder's config.json names the class of the text encoder.
      schedule: of the sampler.
      index: `STAGE1_INDEX` or `REFINER_INDEX`.
      known: entries that replace those.
    """
    folder = Path(folder)
    fields = {k: v for k, v in dataclasses.asdict(schedule).items() if v is not None}
    write_json(
        folder / "scheduler" / "scheduler_config.json", {"_class_name": _SCHEDULER_CLASS, **fields}
    )
    if name := _architecture(folder / "text_encoder"):
        index = {**index, "text_encoder": ["transformers", name]}
    write_json(folder / "model_index.json", {**index, **known})


def write_refiner_index(
    folder: str | Path, text_length: int, sigmas: tuple[float, ...] = SIGMAS
) -> None:
    """Writes model_index.json and scheduler/ of a refiner folder in diffusers layout.

    Args:
      text_length: tokens of its prompts.
      sigmas: its noise levels.
    """
    schedule = Schedule(distilled_sigmas=None if sigmas == SIGMAS else sigmas)
    write_index(folder, schedule, REFINER_INDEX, text_max_sequence_length=text_length)


def _architecture(folder: Path) -> str | None:
    """The class that a text encoder's config.json names."""
    if not (folder / "config.json").is_file():
        return None
    return (read_config(folder).get("architectures") or [None])[0]


def write_config(folder: Path, name: str, config: Any) -> None:
    """Writes the config.json of a component.

    Args:
      name: its class.
      config: the dataclass of its configuration.
    """
    write_json(folder / "config.json", {"_class_name": name, **published_fields(config)})


def upstream_config(
    config: DiTConfig, schedule: Schedule, stream: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Upstream's config.yaml of a network; a size that upstream has no name for adds num_heads.

    Args:
      stream: `Stage1Folder.stream_options`; none is the bidirectional model.
    """
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
    is_distilled = bool(stream and "denoising_step_list" in stream)
    if stream:
        model["chunk_size"] = stream["num_frame_per_block"]
        model["chunk_split_strategy"] = "first_chunk_plus_one"
        model["ffn_type"] = CACHED_FFN if is_distilled else CHUNKED_FFN
    if stream and is_distilled:
        if model["model"] == RELEASED_MODEL:
            model["model"] = STREAMING_MODEL
        has_sink = not stream.get("no_sink_token", False)
        model |= {"num_cached_blocks": stream["num_cached_blocks"], "sink_token": has_sink}
        model["pos_embed_type"] = "casual_wan_rope"  # as upstream spells it
    return {
        "model": model,
        "vae": {
            "vae_type": "LTX2VAE_diffusers_causal" if is_distilled else "LTX2VAE_diffusers",
            "vae_latent_dim": config.in_channels,
        },
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
