"""A published refiner folder in diffusers layout: where its parts are, and how they load.

model_index.json  tokenizer/  text_encoder/  connectors/  transformer/  scheduler/  [lora/]

Adapters in `lora/` are merged into the transformer as it loads. A folder that holds only adapters
is read as the folder that its `base_model_name_or_path` names, with these adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import nnx

from sanawm_jax.checkpoints.adapters import adapter_config, is_adapter_folder, load_adapters
from sanawm_jax.checkpoints.files import SafetensorsFolder, class_name, read_config
from sanawm_jax.checkpoints.folder import ModelFolder, Place, Weights, find_weights
from sanawm_jax.core.lora import LoraConfig, merge_lora
from sanawm_jax.core.params import Params, build
from sanawm_jax.memory.streaming import Runner, call, keep_layers, keep_separate_layers
from sanawm_jax.refiner import keys
from sanawm_jax.refiner.config import ConnectorsConfig, RefinerConfig
from sanawm_jax.refiner.connectors import TextConnectors
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.sampler import SIGMAS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import Tower, text_tower
from sanawm_jax.text.keys import check_text_encoder, load_text_encoder
from sanawm_jax.text.tokenizer import Tokenizer

# LTX-2's own transformer has the same tensors
_TRANSFORMERS = ("SanaWMLTX2RefinerTransformer3DModel", "LTX2VideoTransformer3DModel")
_CONNECTORS = ("LTX2TextConnectors",)
_TEXT_LENGTH = 1024
LORA = "lora"


class RefinerFolder(ModelFolder):
    """The parts of a refiner folder; each `load_*` reads one and keeps no reference to it.

    Configurations are read on construction.

    Raises:
      InputError: a part is absent, of another architecture, or does not fit the others.
    """

    kind = "refiner"

    def __init__(self, folder: str | Path):
        base, self.lora = _split_adapters(Path(folder))
        super().__init__(base)
        self._expect("transformer", _TRANSFORMERS)
        self._expect("connectors", _CONNECTORS)
        self.config = RefinerConfig.from_json(read_config(self.part("transformer")))
        self.connectors = ConnectorsConfig.from_json(read_config(self.part("connectors")))
        self.text_config = GemmaConfig.from_json(read_config(self.part("text_encoder")))
        self.text_length = int(self.index.get("text_max_sequence_length", _TEXT_LENGTH))
        self.sigmas = self._read_sigmas()
        self._check_widths()

    def _expect(self, part: str, classes: tuple[str, ...]) -> None:
        found = class_name(self.part(part))
        if found is not None and found not in classes:
            raise InputError(
                f"{self.path / part} is a {found}, not {' or '.join(classes)}; "
                "--refiner_weights takes a refiner folder"
            )

    def _read_sigmas(self) -> tuple[float, ...]:
        if "scheduler" not in self.parts:
            return SIGMAS
        schedule = Schedule.from_json(read_config(self.part("scheduler"), "scheduler_config.json"))
        if schedule.shift != 1.0 or schedule.shift_terminal:
            raise InputError(
                f"{self.path / 'scheduler'} shifts noise levels; the refiner's are distilled and "
                "need shift=1 without shift_terminal"
            )
        return schedule.distilled_sigmas or SIGMAS

    def _check_widths(self) -> None:
        text, connectors, registers = (
            self.text_config,
            self.connectors,
            self.connectors.video_connector_num_learnable_registers,
        )
        for what, given, wanted in (
            ("caption_channels", connectors.caption_channels, text.hidden_size),
            ("text_proj_in_factor", connectors.text_proj_in_factor, text.num_hidden_layers + 1),
            ("width", connectors.width, self.config.text_width),
        ):
            if given != wanted:
                raise InputError(
                    f"{self.path}: the connectors' {what} is {given}, but the text encoder and "
                    f"the transformer need {wanted}; the parts are not of one model"
                )
        if registers and self.text_length % registers:
            raise InputError(
                f"{self.path}: text_max_sequence_length={self.text_length} must be a multiple of "
                f"the connectors' {registers} registers"
            )

    def check(self) -> None:
        """Compares names and shapes of all tensors, from the file headers alone.

        Raises:
          InputError: what is missing, unexpected or mis-shaped.
        """
        check_text_encoder(self.part("text_encoder"))
        self._weights().check(build(Refiner, self.config)[1])
        connectors = build(TextConnectors, self.connectors)[1]
        connectors_weights(self.part("connectors"), self.connectors).check(connectors)
        if self.lora is not None:
            self.load_lora()

    def _weights(self) -> Weights:
        folder, table = self.part("transformer"), keys.refiner_table(self.config)
        return Weights(table, SafetensorsFolder(folder), str(folder), keys.is_audio)

    def load_transformer(
        self, dtype: Any, place: Place | None = None
    ) -> tuple[nnx.GraphDef, Params]:
        """Graph definition and parameters of the transformer's video half, adapters merged.

        Raises:
          InputError: the folder has adapters, and `place` keeps layers in host memory, where
            nothing can be merged into them.
        """
        if self.lora is None:
            return self.load_base(dtype, place)
        if place in (keep_layers, keep_separate_layers):
            raise InputError("--offload block cannot run adapters; use --offload model")
        graphdef, params = self.load_base(dtype, place)
        lora, adapters = self.load_lora()
        return graphdef, merge_lora(params, adapters, lora.scale)

    def load_base(self, dtype: Any, place: Place | None = None) -> tuple[nnx.GraphDef, Params]:
        """`load_transformer` without adapters; see `keymap.load` for `place`."""
        graphdef, abstract = build(Refiner, self.config)
        return graphdef, self._weights().load(abstract, dtype, place)

    def load_lora(self) -> tuple[LoraConfig, Params]:
        """The transformer's adapters, float32.

        Raises:
          InputError: there are none, or they do not fit the transformer.
        """
        if self.lora is None:
            raise InputError(f"{self.path} has no {LORA}/")
        found = load_adapters(
            self.lora,
            build(Refiner, self.config)[1],
            keys.refiner_table(self.config),
            skipped=keys.is_no_video_layer,
            renamed=keys.ORIGINAL_NAMES,
        )
        if found is None:
            raise InputError(
                f"{self.lora} holds adapters of LTX-2's audio and connectors alone, which the "
                "refiner does not run; remove the folder"
            )
        return found

    def load_connectors(self, dtype: Any) -> tuple[nnx.GraphDef, Params]:
        """Graph definition and parameters of the video connector."""
        return load_connectors(self.part("connectors"), self.connectors, dtype)

    def load_text(self, dtype: Any, place: Place | None = None, run: Runner = call) -> Tower:
        """The compiled text tower, called by `run`; it gives all hidden states."""
        config, params = load_text_encoder(self.part("text_encoder"), dtype=dtype, place=place)
        return text_tower(config, params, dtype=dtype, all_states=True, run=run)

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer(self.part("tokenizer"))


def connectors_weights(folder: Path, config: ConnectorsConfig) -> Weights:
    """The tensors of the video connector in `connectors/`; only headers are read."""
    table = keys.connectors_table(config)
    return Weights(table, SafetensorsFolder(folder), str(folder), keys.is_audio_connector)


def load_connectors(
    folder: Path, config: ConnectorsConfig, dtype: Any
) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters of the video connector in `connectors/`."""
    graphdef, abstract = build(TextConnectors, config)
    return graphdef, connectors_weights(folder, config).load(abstract, dtype)


def _split_adapters(folder: Path) -> tuple[Path, Path | None]:
    """The folder of the whole model, and that of its adapters if it has some."""
    if is_adapter_folder(folder) and not (folder / "model_index.json").is_file():
        base = adapter_config(folder).get("base_model_name_or_path")
        if not base:
            raise InputError(
                f"{folder} holds adapters alone and its adapter_config.json names no "
                f"base_model_name_or_path; put it into a refiner folder as {LORA}/"
            )
        return find_weights(base), folder
    inside = folder / LORA
    return folder, inside if inside.is_dir() else None
