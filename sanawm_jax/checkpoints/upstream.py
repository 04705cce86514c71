"""Names of the stage-1 network's tensors in NVlabs' own releases.

diffusers' class keeps upstream's names except those of the timestep network, which is a sequence
in upstream's code. In addition to the network's parameters, a file of upstream holds an embedding
for dropped captions, which only training reads, and may hold `pos_embed`, a buffer that rotary
models never read. A distilled checkpoint holds `generator` and `critic`; in both, every name begins
with `model.`.

Sources: NVlabs/Sana `diffusion/model/nets/{sana_blocks,sana_multi_scale_video_camctrl}.py` for the
names. That the tensors are the same is stated by the class documentation of diffusers'
`SanaWMTransformer3DModel` and by its conversion script.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sanawm_jax.checkpoints.keymap import Entry

PREFIX = "model."  # of a distilled checkpoint's dictionaries
DROPPED_CAPTION = "y_embedder.y_embedding"  # (text tokens, caption channels)
_MODULES = {
    "t_embedder.linear_1.": "t_embedder.mlp.0.",
    "t_embedder.linear_2.": "t_embedder.mlp.2.",
}
_MARK = "t_embedder.mlp.0.weight"


def to_upstream(name: str) -> str:
    """Upstream's name of a tensor that diffusers calls `name`."""
    for theirs, upstream in _MODULES.items():
        if name.startswith(theirs):
            return upstream + name.removeprefix(theirs)
    return name


def to_diffusers(name: str) -> str:
    """The inverse of `to_upstream`."""
    for theirs, upstream in _MODULES.items():
        if name.startswith(upstream):
            return theirs + name.removeprefix(upstream)
    return name


def find_prefix(keys: Iterable[str]) -> str:
    """The prefix of all names in these tensors: `model.` or nothing."""
    return PREFIX if PREFIX + _MARK in set(keys) else ""


def upstream_table(entries: list[Entry], prefix: str = "") -> list[Entry]:
    """A table of diffusers' names, with each name replaced by upstream's."""
    return [dataclasses.replace(e, source=prefix + to_upstream(e.source)) for e in entries]


def is_ignored(name: str) -> bool:
    """Tensors that no forward pass reads; `name` is without its prefix."""
    return name in (DROPPED_CAPTION, "pos_embed") or name.endswith(".attn.recall_gate")
