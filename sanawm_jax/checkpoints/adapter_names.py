"""Names of the tensors of LoRA files, as different trainers write them.

A name is PREFIX LAYER FACTOR. Layers keep the model's published names, or, after a prefix such as
`lora_unet_`, these names with `_` for every dot.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from sanawm_jax.runtime.errors import InputError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
# PEFT puts the name of an adapter before `weight`; older files have `lora.down` or `_lora.down`
_FACTOR = re.compile(
    r"(?P<layer>.+?)[._](?:"
    r"(?P<a>lora_A(?:\.\w+)?\.weight|lora_A|lora_down\.weight|lora(?:_linear_layer)?\.down\.weight)|"
    r"(?P<b>lora_B(?:\.\w+)?\.weight|lora_B|lora_up\.weight|lora(?:_linear_layer)?\.up\.weight)|"
    r"(?P<alpha>alpha))"
)
_OTHER_KINDS = {
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)"),
    "full-difference": re.compile(r"\.diff(_b)?$"),
}


def without_prefix(name: str) -> str:
    """Returns a name without the prefix of a whole model."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


class Names:
    """Assigns the tensors of a LoRA file to the layers of a model.

    Args:
      layers: the published names of the layers that can have adapters.
      skipped: names of layers that are left out on purpose.
      renamed: names of parts of a layer's path in the original checkpoints of a model, and the
        published names for them.
    """

    def __init__(
        self,
        layers: Iterable[str],
        skipped: Callable[[str], bool],
        renamed: Mapping[str, str],
    ):
        self._layers = set(layers)
        self._flat = {layer.replace(".", "_"): layer for layer in self._layers}
        self._skipped = skipped
        self._renamed = renamed

    def sort(
        self, tensors: Mapping[str, np.ndarray], folder: Path
    ) -> dict[str, dict[str, np.ndarray]]:
        """Returns `lora_A`, `lora_B` and, where there is one, `alpha` of every layer.

        Raises:
          InputError: a tensor is of another kind of adapter or of a layer that the model lacks; a
            layer has one factor alone, or twice.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        unknown, left_out = [], set()
        for name, value in tensors.items():
            self._refuse_other_kinds(name, folder)
            match = _FACTOR.fullmatch(name)
            layer = self._layer(match["layer"]) if match else None
            if match is None or layer is None:
                unknown.append(name)
            elif not layer:
                left_out.add(match["layer"])
            else:
                part = "lora_A" if match["a"] else "lora_B" if match["b"] else "alpha"
                if part in found.setdefault(layer, {}):
                    raise InputError(f"{folder} has two tensors {part} of {layer}; keep one")
                found[layer][part] = value
        _refuse(folder, "has tensors of layers that the base lacks", unknown)
        absent = [
            f"{layer}.{part}.weight"
            for layer, parts in found.items()
            for part in ("lora_A", "lora_B")
            if part not in parts
        ]
        _refuse(folder, "lacks", absent)
        if left_out:
            warnings.warn(
                f"{folder}: adapters of {len(left_out)} layers that this model does not run (audio "
                f"and connectors) are left out, and {len(found)} are used",
                stacklevel=2,
            )
        return found

    def _layer(self, name: str) -> str | None:
        """Returns the published name; nothing for a layer to leave out, None for an unknown one."""
        name = without_prefix(name)
        for prefix in _FLAT_PREFIXES:
            if name.startswith(prefix):
                flat = self._rename(name.removeprefix(prefix), "_")
                dotted = re.sub(r"^transformer_blocks_(\d+)_", r"transformer_blocks.\1.", flat)
                return self._flat.get(flat) or ("" if self._skipped(dotted) else None)
        name = self._rename(name, ".")
        if name in self._layers:
            return name
        return "" if self._skipped(name) else None

    def _rename(self, name: str, dot: str) -> str:
        for theirs, ours in self._renamed.items():
            theirs, ours = theirs.replace(".", dot), ours.replace(".", dot)
            if name == theirs or name.startswith(theirs + dot):
                return ours + name[len(theirs) :]
        return name

    def _refuse_other_kinds(self, name: str, folder: Path) -> None:
        for kind, pattern in _OTHER_KINDS.items():
            if pattern.search(name):
                raise InputError(
                    f"{folder} holds {kind} adapters ({name}), which are not supported; convert "
                    "them to plain LoRA, or merge them into the weights"
                )


def _refuse(folder: Path, problem: str, names: Iterable[str]) -> None:
    first = sorted(names)
    if first:
        more = f" and {len(first) - 4} more" if len(first) > 4 else ""
        raise InputError(f"{folder} {problem}: {', '.join(first[:4])}{more}")
