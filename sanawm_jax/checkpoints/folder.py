"""A published stage-1 folder in diffusers layout: where its parts are, and how they load.

model_index.json  tokenizer/  text_encoder/  transformer/  vae/  scheduler/

`upstream_folder.py` does the same for NVlabs' own layout.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.float8 import quantising
from sanawm_jax.core.params import Params, build
from sanawm_jax.dit import keys as dit_keys
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.dit.numerics import preset
from sanawm_jax.memory.streaming import Runner, call
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.shipped import SHIPPED, find_shipped
from sanawm_jax.sampling.precision import build_dit
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.text.gemma import Tower, text_tower
from sanawm_jax.text.keys import check_text_encoder, load_text_encoder
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.vae import keys as vae_keys
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoDecoder, VideoEncoder

# fields of model_index.json and of `options.StreamOptions`
STREAM_FIELDS = (
    "num_frame_per_block",
    "num_cached_blocks",
    "denoising_step_list",
    "no_sink_token",
)
Place = Callable[[str, np.ndarray], Any]  # see `keymap.load`
_VAE_HALVES = {"encoder": VideoEncoder, "decoder": VideoDecoder}


# large parts of upstream's folders, which the other stage does not read
_OF_STAGE2 = ["refiner/*", "refiner_diffusers/*", "gemma3_12b/*"]
_OF_STAGE1 = ["dit/*", "sana_dit/*", "vae/*", "ltx2_causal_vae/*"]


def find_weights(name: str | Path, *, stage: int = 0, allow_pickle: bool = False) -> Path:
    """Resolves a local folder, a name of `shipped`, or a hub name `owner/model` to a local folder.

    Args:
      name: the folder or name.
      stage: 1 or 2 skips files that only the other stage reads; 0 downloads all.
      allow_pickle: also download files of `torch.save`.

    Raises:
      InputError: the name is none of these, the shipped weights are not in this checkout, or the
        hub cannot be reached and its cache does not have the model.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if str(name) in SHIPPED:
        return find_shipped(str(name))
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise InputError(f"weights {name} is neither a folder nor a hub name such as owner/model")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"weights {name} is no local folder; to download it, pip install huggingface_hub"
        ) from None
    try:
        patterns = ["*.json", "*.yaml", "*.safetensors", *(["*.pt"] if allow_pickle else [])]
        skipped = {0: None, 1: _OF_STAGE2, 2: _OF_STAGE1}[stage]
        return Path(snapshot_download(str(name), allow_patterns=patterns, ignore_patterns=skipped))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot download {name} and it is not in the local cache ({reason})"
        ) from None


class Weights(NamedTuple):
    """A network's published tensors, with the arguments of `keymap.check` and `keymap.load`."""

    entries: list[keymap.Entry]
    source: keymap.TensorSource
    what: str  # what messages call them
    ignore: Callable[[str], bool]  # names that are skipped on purpose

    def check(self, abstract: Params) -> None:
        entries, source, what, ignore = self
        keymap.check(entries, abstract, source, what=what, ignore=ignore)

    def load(self, abstract: Params, dtype: Any, place: Place | None = None) -> Params:
        entries, source, what, ignore = self
        return keymap.load(
            entries, abstract, source, what=what, dtype=dtype, place=place, ignore=ignore
        )


class ModelFolder:
    """A folder in diffusers layout: `model_index.json` and one folder per part.

    Raises:
      InputError: on construction, if a part is absent.
    """

    kind = "model"

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.index = self._read_index()
        # an optional part that the model does not have is [null, null]
        self.parts = [k for k, v in self.index.items() if isinstance(v, list) and any(v)]
        absent = [p for p in self.parts if not (self.path / p).is_dir()]
        if absent:
            raise InputError(f"{self.path} lacks {', '.join(absent)}, which model_index.json names")

    def _read_index(self) -> dict[str, Any]:
        if not (self.path / "model_index.json").is_file() and (self.path / "transformer").is_dir():
            raise InputError(
                f"{self.path} has a transformer/ and no model_index.json; copy a whole folder and "
                "put this transformer/ into the copy"
            )
        return read_config(self.path, "model_index.json")

    def part(self, name: str) -> Path:
        """The folder of a part.

        Raises:
          InputError: it is not there.
        """
        folder = self.path / name
        if not folder.is_dir():
            raise InputError(f"{self.path} has no {name}/; is it a {self.kind} folder?")
        return folder


class Stage1Folder(ModelFolder):
    """The parts of a stage-1 folder; each `load_*` reads one and keeps no reference to it.

    Raises:
      InputError: on construction, if a part is absent; see `checkpoints.files` for the rest.
    """

    kind = "stage-1"
    numerics: str | None = None  # a preset of `dit.numerics`; None: the layout's

    def layout_numerics(self) -> str:
        """The preset that these weights run with unless another one is asked for."""
        return str(self.index.get("numerics", "diffusers"))

    def stream_options(self) -> dict[str, Any]:
        """Those of `options.StreamOptions` that these weights were trained with.

        They are fields of model_index.json that are our own; diffusers does not read them.
        `num_frame_per_block` marks weights whose chunks see only earlier ones, and
        `denoising_step_list` those that were distilled.
        """
        return {name: self.index[name] for name in STREAM_FIELDS if name in self.index}

    def dit_config(self) -> DiTConfig:
        """The DiT's configuration, with the numerics of `numerics` or of the layout."""
        numerics = preset(self.numerics or self.layout_numerics())
        return dataclasses.replace(self._published_config(), numerics=numerics)

    def _published_config(self) -> DiTConfig:
        return DiTConfig.from_json(read_config(self.part("transformer")))

    def vae_config(self) -> VAEConfig:
        return VAEConfig.from_json(read_config(self.part("vae")))

    def schedule(self) -> Schedule:
        raw = read_config(self.part("scheduler"), "scheduler_config.json")
        return Schedule.from_json(raw)

    def check(self, part: str) -> None:
        """Compares names and shapes of a network's tensors, from the file headers alone.

        Args:
          part: `transformer`, `text_encoder`, or the `encoder` or `decoder` of the VAE.

        Raises:
          InputError: what is missing, unexpected or mis-shaped.
        """
        folder = self.part("vae" if part in _VAE_HALVES else part)
        if part in _VAE_HALVES:
            vae_keys.check_vae(folder, _VAE_HALVES[part])
        elif part == "text_encoder":
            check_text_encoder(folder)
        else:
            self.dit_weights().check(build(DiT, self.dit_config())[1])

    def dit_weights(self) -> Weights:
        """The DiT's tensors and their names in this layout; only headers are read."""
        folder = self.part("transformer")
        return Weights(
            dit_keys.key_table(self.dit_config()),
            SafetensorsFolder(folder),
            str(folder),
            dit_keys.is_ignored,
        )

    def load_dit(
        self, dtype: Any, place: Place | None = None, precision: str = "bf16"
    ) -> tuple[DiTConfig, nnx.GraphDef, Params]:
        """Configuration, graph definition and parameters of the DiT.

        Args:
          place: as `keymap.load`.
          precision: a valid name, see `sampling.precision`.

        Raises:
          InputError: precision is fp8 and no layer of this network can run in it.
        """
        config = self.dit_config()
        graphdef, abstract = build_dit(config, precision)
        if precision == "fp8":
            place = quantising(abstract, place)
        return config, graphdef, self.dit_weights().load(build(DiT, config)[1], dtype, place)

    def load_encoder(self, dtype: Any) -> tuple[VAEConfig, nnx.GraphDef, Params]:
        """Configuration, graph definition and parameters of the VAE's encoder."""
        return self._load_half("encoder", dtype)

    def load_decoder(self, dtype: Any) -> tuple[VAEConfig, nnx.GraphDef, Params]:
        """Configuration, graph definition and parameters of the VAE's decoder."""
        return self._load_half("decoder", dtype)

    def _load_half(self, name: str, dtype: Any) -> tuple[VAEConfig, nnx.GraphDef, Params]:
        module = _VAE_HALVES[name]
        config, params = vae_keys.load_vae(self.part("vae"), dtype=dtype, module=module)
        return config, build(module, config)[0], params

    def load_text(
        self, dtype: Any, place: Place | None = None, run: Runner = call
    ) -> tuple[Tower, Tokenizer]:
        """The compiled text tower, called by `run`, and its tokenizer."""
        folder = self.part("text_encoder")
        config, params = load_text_encoder(folder, dtype=dtype, place=place)
        return text_tower(config, params, dtype=dtype, run=run), Tokenizer(self.part("tokenizer"))
