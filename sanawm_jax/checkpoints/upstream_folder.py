"""Published folders in NVlabs' own layout: where their parts are, and how they load.

    stage 1   config.yaml  dit/*.safetensors or sana_dit/model.pt  vae/
    refiner   refiner/ or refiner_diffusers/: transformer/  connectors/  text_encoder/

A release does not hold the text encoder of stage 1; its config.yaml names one. It is read from
`text_encoder/` (and `tokenizer/`) if these folders exist, else from the hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sanawm_jax.checkpoints import upstream
from sanawm_jax.checkpoints.files import SafetensorsFolder
from sanawm_jax.checkpoints.folder import Stage1Folder, Weights, find_weights
from sanawm_jax.checkpoints.keymap import TensorSource
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.checkpoints.torch_file import TorchFile
from sanawm_jax.dit import keys as dit_keys
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.numerics import preset
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import is_companion
from sanawm_jax.sampling.schedule import Schedule

RELEASED_MODEL = "SanaMSVideoCamCtrl_1600M_P1_D20"
STREAMING_MODEL = "SanaMSVideoCamCtrlStreaming_1600M_P1_D20"
HUB_OWNER = "Efficient-Large-Model"
_DIT_FOLDERS = ("dit", "sana_dit")
_REFINER_FOLDERS = ("refiner", "refiner_diffusers")
# cross-attention heads by the name in `model.model`; no tensor's shape gives them
_HEADS = {RELEASED_MODEL: 20, STREAMING_MODEL: 20}
# fields of config.yaml's `model` that diffusers' configuration has too, with upstream's defaults
_MODEL_FIELDS: dict[str, Any] = {
    "softmax_every_n": 4,
    "linear_head_dim": 32,
    "t_kernel_size": 3,
    "conv_kernel_size": 4,
    "k_conv_only": True,
    "qk_norm": False,
    "cross_norm": False,
    "cam_attn_compress": 2,
    "init_cam_from_base": False,
    "use_chunk_plucker_post_attn": False,
    "chunk_plucker_channels": 48,
    "chunk_plucker_post_attn_blocks": -1,
    "fp32_attention": True,
    "image_size": 720,
    "mlp_ratio": 4.0,
    "mlp_acts": ("silu", "silu", None),
    "use_pe": True,
    "mixed_precision": "bf16",
}
# they have the same parameters but run in chunks, or with a cache of chunks
CHUNKED_FFN, CACHED_FFN = "ChunkGLUMBConvTemp", "CachedGLUMBConvTemp"
CAUSAL_VAE = "ltx2_causal_vae"
RELEASED_LEVELS = "1000,960,889,727,0"
_FFN_TYPES = ("GLUMBConvTemp", CHUNKED_FFN, CACHED_FFN)
_ROPES = ("wan_rope", "casual_wan_rope")


def is_upstream(folder: Path) -> bool:
    """Whether a folder is in upstream's layout."""
    return not (folder / "model_index.json").is_file() and any(
        (folder / name).is_dir() for name in (*_DIT_FOLDERS, *_REFINER_FOLDERS)
    )


def open_stage1(
    name: str | Path, *, allow_pickle: bool = False, numerics: str | None = None
) -> Stage1Folder:
    """Opens a stage-1 folder in either layout, `small_world`, or a hub name.

    Args:
      name: see `folder.find_weights`.
      allow_pickle: also read upstream's `model.pt`; see `checkpoints.torch_file`.
      numerics: a preset of `dit.numerics`; None takes that of the layout.

    Raises:
      InputError: it cannot be found or is no stage-1 folder.
    """
    if numerics is not None:
        preset(numerics)
    path = find_weights(name, stage=1, allow_pickle=allow_pickle)
    if is_upstream(path):
        folder = UpstreamFolder(path, allow_pickle=allow_pickle)
    else:
        folder = Stage1Folder(path)
    folder.numerics = numerics
    return folder


def open_refiner(name: str | Path) -> RefinerFolder:
    """Opens a refiner folder in diffusers layout, upstream's that holds one, or a name.

    Args:
      name: see `folder.find_weights`.

    Raises:
      InputError: it cannot be found or is no refiner folder.
    """
    path = find_weights(name, stage=2)
    return RefinerFolder(path) if find_refiner(path) is None else UpstreamRefiner(path)


def find_refiner(folder: Path) -> Path | None:
    """The refiner's folder inside one of upstream's layout, or that folder itself."""
    candidates = (*(folder / name for name in _REFINER_FOLDERS), folder)
    for path in candidates:
        if (path / "transformer").is_dir() and not (path / "model_index.json").is_file():
            return path
    return None


class UpstreamFolder(Stage1Folder):
    """The parts of a stage-1 folder in upstream's layout.

    Args:
      folder: holds `config.yaml` and `dit/` or `sana_dit/`.
      allow_pickle: also read a `torch.save` file.

    Raises:
      InputError: on construction, no or a bad config.yaml.
    """

    network = "generator"  # which network of a distillation's model.pt is read; or critic

    def __init__(self, folder: str | Path, *, allow_pickle: bool = False):
        self.allow_pickle = allow_pickle
        self._source: TensorSource | None = None
        super().__init__(folder)
        self.yaml = _read_yaml(self.path)

    def _read_index(self) -> dict[str, Any]:
        return {}

    def _section(self, name: str) -> dict[str, Any]:
        section = self.yaml.get(name) or {}
        if not isinstance(section, dict):
            raise InputError(f"{self.path / 'config.yaml'}: {name} must be a section of fields")
        return section

    def part(self, name: str) -> Path:
        """The folder of `transformer`, `vae`, `text_encoder` or `tokenizer`.

        Raises:
          InputError: it is neither in the folder nor, for what config.yaml names, on the hub.
        """
        if name == "transformer":
            found = [self.path / n for n in _DIT_FOLDERS if (self.path / n).is_dir()]
            if found:
                return found[0]
            raise InputError(f"{self.path} has no dit/; is it a stage-1 folder?")
        for folder in (CAUSAL_VAE, name) if name == "vae" else (name,):
            if (self.path / folder).is_dir():
                return self.path / folder
        if name == "vae":
            hub = str(self._section("vae").get("vae_pretrained") or "").removeprefix("hf://")
            return self._from_hub(hub, "vae") / "vae"
        if name in ("text_encoder", "tokenizer"):
            inside = self.path / "text_encoder"
            if inside.is_dir():  # its tokenizer may be beside its weights
                return inside
            named = str(self._section("text_encoder").get("text_encoder_name") or "gemma-2-2b-it")
            if (self.path / named).is_dir():
                return self.path / named
            return self._from_hub(named if "/" in named else f"{HUB_OWNER}/{named}", name)
        return super().part(name)

    def _from_hub(self, hub: str, name: str) -> Path:
        if not hub:
            raise InputError(f"{self.path} has no {name}/, and its config.yaml names none")
        try:
            return find_weights(hub)
        except InputError as error:
            raise InputError(
                f"{self.path} has no {name}/, and {hub}, which its config.yaml names, cannot be "
                f"used: {error}"
            ) from None

    def _dit_source(self) -> tuple[TensorSource, str]:
        folder = self.part("transformer")
        files = [file for file in sorted(folder.iterdir()) if not is_companion(file.name)]
        pickles = [file for file in files if file.suffix in (".pt", ".pth")]
        if any(file.suffix == ".safetensors" for file in files) or not pickles:
            what = str(folder)
            self._source = self._source or SafetensorsFolder(folder)
        elif not self.allow_pickle:
            raise InputError(
                f"{folder} holds only {pickles[0].name}, a pickle; --allow_pickle reads its "
                "tensors without running it"
            )
        else:
            what = str(pickles[0])
            names = (self.network, "state_dict")
            self._source = self._source or TorchFile(pickles[0], names)
        return self._source, what

    def dit_weights(self) -> Weights:
        """The DiT's tensors by upstream's names; only headers are read."""
        source, what = self._dit_source()
        prefix = upstream.find_prefix(source.keys())
        table = upstream.upstream_table(dit_keys.key_table(self.dit_config()), prefix)
        return Weights(
            table, source, what, lambda key: upstream.is_ignored(key.removeprefix(prefix))
        )

    def layout_numerics(self) -> str:
        """The official code that these weights were released with; see `dit.numerics`."""
        if self._is_streaming:
            return "streaming"
        is_chunked = self._section("model").get("ffn_type") == CHUNKED_FFN
        return "chunk_causal" if is_chunked else "release"

    @property
    def _is_streaming(self) -> bool:
        model = self._section("model")
        return "Streaming" in str(model.get("model")) or model.get("ffn_type") == CACHED_FFN

    def stream_options(self) -> dict[str, Any]:
        """See `Stage1Folder.stream_options`; config.yaml says the same in upstream's words."""
        model = self._section("model")
        if self.layout_numerics() == "release":
            return {}
        found = {"num_frame_per_block": int(model.get("chunk_size") or 3)}
        if not self._is_streaming:
            return found
        cached = int(model.get("num_cached_blocks") or 2)
        return {**found, "num_cached_blocks": cached, "denoising_step_list": RELEASED_LEVELS}

    def _published_config(self) -> DiTConfig:
        """Sizes from the tensors' shapes, all else from config.yaml.

        Raises:
          InputError: a field that no code here can run, or a size that cannot be known.
        """
        model, where = self._section("model"), self.path / "config.yaml"
        name = str(model.get("model"))
        heads = model.get("num_heads", _HEADS.get(name))
        if heads is None:
            raise InputError(f"{where}: model {name!r} is unknown; use {RELEASED_MODEL}")
        ffn, rope = model.get("ffn_type"), model.get("pos_embed_type", "wan_rope")
        if ffn not in (*_FFN_TYPES, "mlp") or rope not in _ROPES:
            raise InputError(
                f"{where}: ffn_type={ffn!r} with pos_embed_type={rope!r} is no released model"
            )
        source, what = self._dit_source()
        prefix = upstream.find_prefix(source.keys())
        shapes = {k.removeprefix(prefix): source.shape(k) for k in source.keys()}
        fields = {k: model.get(k, default) for k, default in _MODEL_FIELDS.items()}
        return DiTConfig.from_json(
            {
                **fields,
                **_sizes(shapes, what),
                "mlp_acts": [None if act in (None, "none") else act for act in fields["mlp_acts"]],
                "num_attention_heads": heads,
                "ffn_type": "mlp" if ffn == "mlp" else "GLUMBConvTemp",
                "pos_embed_type": "wan_rope",
                "y_norm": bool(self._section("text_encoder").get("y_norm", False)),
                "pred_sigma": bool(self._section("scheduler").get("pred_sigma", False)),
            }
        )

    def schedule(self) -> Schedule:
        scheduler = self._section("scheduler")
        shift = scheduler.get("inference_flow_shift", scheduler.get("flow_shift", 1.0))
        return Schedule.from_json({"shift": float(shift)})


def _sizes(shapes: dict[str, tuple[int, ...]], what: str) -> dict[str, Any]:
    blocks = [re.match(r"blocks\.(\d+)\.", key) for key in shapes]
    try:
        hidden, channels, *patch = shapes["x_embedder.proj.weight"]
        captions = shapes["y_embedder.y_proj.fc1.weight"][1]
    except (KeyError, ValueError, IndexError):
        raise InputError(
            f"{what} is no stage-1 network: x_embedder.proj.weight or y_embedder.y_proj.fc1.weight "
            "is missing"
        ) from None
    return {
        "num_layers": 1 + max((int(m[1]) for m in blocks if m), default=-1),
        "hidden_size": hidden,
        "in_channels": channels,
        "patch_size": patch,
        "caption_channels": captions,
    }


def _read_yaml(folder: Path) -> dict[str, Any]:
    import yaml

    file = folder / "config.yaml"
    others = sorted(f for f in folder.glob("*.yaml") if not is_companion(f.name))
    if not file.is_file() and len(others) == 1:
        file = others[0]
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; upstream's layout needs it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} is not valid YAML ({reason})") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{file} holds no sections")
    return loaded


class UpstreamRefiner(RefinerFolder):
    """The parts of a refiner inside upstream's layout, which has no model_index.json."""

    def __init__(self, folder: str | Path):
        root = find_refiner(Path(folder))
        assert root is not None, folder
        self.outer = Path(folder)
        super().__init__(root)

    def _read_index(self) -> dict[str, Any]:
        return {}

    def part(self, name: str) -> Path:
        if name in ("text_encoder", "tokenizer"):
            beside = self.outer / "gemma3_12b"
            for folder in (self.path / name, self.path / "text_encoder", beside):
                if folder.is_dir():
                    return folder
        return super().part(name)
