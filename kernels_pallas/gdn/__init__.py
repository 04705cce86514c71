"""Frame-wise gated delta rule (Gated DeltaNet over whole frames)."""

from kernels_pallas.gdn.reference import (
    Transition,
    bidirectional_states,
    compose_states,
    frame_transitions,
    normaliser_transitions,
    read_out,
    scan_states,
)

__all__ = [
    "Transition",
    "bidirectional_states",
    "compose_states",
    "frame_transitions",
    "normaliser_transitions",
    "read_out",
    "scan_states",
]
