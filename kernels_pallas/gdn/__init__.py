"""Frame-wise gated delta rule: Gated DeltaNet (GDN) whose recurrence step is a whole frame."""

from kernels_pallas.gdn.api import (
    bidirectional_states,
    bidirectional_token_states,
    frame_transitions,
    normalised_read_out,
    normaliser_transitions,
    read_out,
    scan_states,
    token_states,
)
from kernels_pallas.gdn.gpu import Tile, Tiles
from kernels_pallas.gdn.reference import Transition, compose_states

__all__ = [
    "Tile",
    "Tiles",
    "Transition",
    "bidirectional_states",
    "bidirectional_token_states",
    "compose_states",
    "frame_transitions",
    "normalised_read_out",
    "normaliser_transitions",
    "read_out",
    "scan_states",
    "token_states",
]
