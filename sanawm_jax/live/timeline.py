"""The moments of a session as a tree: one node per chunk, with what is needed to go there again.

A node keeps the world's state on the host. The states share a budget of memory: when it is full,
states are dropped so that those that remain are spread over the walk, and a node without a state is
reached by computing its chunks again from the nearest one above it, with the recorded controls. The
result is the same bit for bit, because a world's step depends on nothing but its state and control.

Axis letters: n pixel frames of a chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

from sanawm_jax.camera.live import Steering
from sanawm_jax.live import protocol
from sanawm_jax.live.path import place_of
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.world_state import WorldState

Control = Steering | np.ndarray
WALK = "sanawm_jax walk"
_LONGEST_WALK = 20_000  # chunks
_RECENT = 8  # nodes that keep their state, whatever the budget


@dataclasses.dataclass
class Node:
    """The end of a chunk.

    Attributes:
      number: of the node; 0 is the start.
      depth: chunks from the start.
      prompt: the text that acted.
      control: what was held, or the poses of the chunk.
      poses: (n, 4, 4) of the chunk.
      shown: (m, 4, 4) of the frames that came with it; a refiner gives them later than the chunk.
      late: (k, 4, 4) of the frames that are still to come.
      frames: JPEGs of the m frames; empty after they were dropped.
      digest: of the pixels.
      thumbnail: JPEG.
      state: on the host; None after it was dropped.
    """

    number: int
    parent: Node | None
    branch: int
    depth: int
    prompt: str
    control: Control | None
    poses: np.ndarray
    shown: np.ndarray
    late: np.ndarray
    frames: list[bytes]
    digest: str
    thumbnail: bytes
    state: WorldState | None
    has_child: bool = False

    def bytes(self) -> int:
        """Memory that the node can give back."""
        return size_of(self.state) + sum(map(len, self.frames))


def size_of(state: WorldState | None) -> int:
    """Bytes of a state's arrays."""
    return sum(a.nbytes for a in jax.tree.leaves(state.carried)) if state else 0


def on_host(state: WorldState) -> WorldState:
    """The same state with its arrays in host memory."""
    return dataclasses.replace(state, carried=jax.device_get(state.carried))


def digest(pixels: np.ndarray) -> str:
    """Short name of a chunk's pixels (n, H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


class Timeline:
    """The tree.

    Args:
      root: the start's state; never dropped.
      begin: where the walk starts: {"scene": name}, or {"world": digest of a file}.
      budget: bytes for states and frames.
    """

    def __init__(self, root: WorldState, picture: bytes, begin: dict[str, str], budget: int):
        poses, none = root.motion.c2w[None], np.zeros((0, 4, 4))
        state = on_host(root)
        self.nodes = [
            Node(0, None, 0, 0, root.prompt, None, poses, none, none, [], "", picture, state)
        ]
        self.begin, self.budget = begin, budget
        self._branches = 1
        self._kept = 0

    @property
    def kept(self) -> int:
        """Bytes of states and frames, without the start's state."""
        return self._kept

    def add(self, parent: Node, **fields: Any) -> Node:
        """A chunk after another one; the second child of a node begins a branch."""
        branch = parent.branch
        if parent.has_child:
            branch, self._branches = self._branches, self._branches + 1
        parent.has_child = True
        node = Node(
            number=len(self.nodes),
            parent=parent,
            branch=branch,
            depth=parent.depth + 1,
            **fields,
        )
        self.nodes.append(node)
        self._kept += node.bytes()
        return node

    def keep_state(self, node: Node, state: WorldState) -> None:
        """Keeps the state of the newest node, a host's copy, within the budget."""
        node.state = state
        self._kept += size_of(state)
        self._fit()

    def node(self, number: int) -> Node:
        """Raises `InputError` if there is no such node."""
        if number >= len(self.nodes):
            raise InputError(f"the timeline has no moment {number}; choose one that it shows")
        return self.nodes[number]

    def way(self, node: Node) -> list[Node]:
        """The nodes from the start, which is left out, to a node."""
        found = []
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def _fit(self) -> None:
        """Drops states, the densest first, and then the oldest frames."""
        if self._kept <= self.budget:
            return
        old = self.nodes[1:-_RECENT]
        # the lowest set bit of a depth says how long its state stays: 1, 3, 5... go first
        with_state = [node for node in old if node.state is not None]
        with_state.sort(key=lambda node: (node.depth & -node.depth, node.number))
        with_frames = [node for node in old if node.frames]
        for node in [*with_state, *with_frames]:
            if self._kept <= self.budget:
                return
            before = node.bytes()
            if node.state is not None:
                node.state = None
            else:
                node.frames = []
            self._kept -= before - node.bytes()


def about(node: Node) -> protocol.Chunk:
    """What the page shows of a node."""
    control = node.control
    keys = "".join(sorted(control.keys)) if isinstance(control, Steering) else ""
    parent = node.parent.number if node.parent else 0
    place = place_of(node.poses[-1])
    return protocol.Chunk(
        node.number, parent, node.branch, node.depth, node.prompt, keys, list(place)
    )


def shown_poses(late: np.ndarray, poses: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The poses of a chunk's frames, and those of frames that are still to come.

    Args:
      late: (k, 4, 4) that waited before.
      poses: (n, 4, 4) of the chunk.
      frames: m that came with it.
    """
    waiting = np.concatenate([late, poses])
    missing = max(0, frames - len(waiting))  # of frames from before a world that was loaded
    waiting = np.concatenate([np.tile(waiting[:1], (missing, 1, 1)), waiting])
    return waiting[:frames], waiting[frames:]


def walk_file(timeline: Timeline, node: Node, seed: int) -> bytes:
    """The way to a node as JSON, which `read_walk` reads: start, prompts, controls and digests."""
    chunks = []
    for step in timeline.way(node):
        control = step.control
        if isinstance(control, Steering):
            held: dict[str, Any] = {"keys": "".join(sorted(control.keys))}
            if any(control.extra):
                held["extra"] = list(control.extra)
            if (control.move, control.turn) != (1.0, 1.0):
                held["speeds"] = [control.move, control.turn]
        else:
            assert control is not None
            held = {"poses": control.tolist()}
        chunks.append({**held, "prompt": step.prompt, "digest": step.digest})
    about = {"kind": WALK, "begin": timeline.begin, "seed": seed, "chunks": chunks}
    return json.dumps(about).encode()


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk of a walk that is played."""

    control: Control
    prompt: str | None = None
    digest: str = ""


def read_walk(data: bytes) -> tuple[dict[str, str], int, list[Step]]:
    """Reads what `walk_file` wrote: where it begins, the seed, and the chunks.

    Raises:
      InputError: it is no walk, or a damaged one.
    """
    try:
        about = json.loads(data)
        if not isinstance(about, dict) or about.get("kind") != WALK:
            raise InputError("the file is no recorded walk")
        chunks = about["chunks"]
        if not isinstance(chunks, list) or not 0 < len(chunks) <= _LONGEST_WALK:
            raise InputError(f"a walk has 1 to {_LONGEST_WALK} chunks")
        begin = {str(kind)[:80]: str(name)[:80] for kind, name in about["begin"].items()}
        return begin, int(about["seed"]), [_step(chunk) for chunk in chunks]
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise InputError("the recorded walk is damaged") from None


def _step(chunk: dict[str, Any]) -> Step:
    if "poses" in chunk:
        control: Control = np.asarray(chunk["poses"], np.float64)
        if control.ndim != 3 or control.shape[1:] != (4, 4) or not len(control):
            raise ValueError("poses")
        numbers = control
    else:
        keys = frozenset(chunk["keys"])
        if keys - frozenset("wasdijkl"):
            raise ValueError("keys")
        extra = tuple(float(value) for value in chunk.get("extra", (0, 0, 0, 0)))
        move, turn = (float(value) for value in chunk.get("speeds", (1, 1)))
        forward, strafe, yaw, pitch = extra
        control = Steering(keys, (forward, strafe, yaw, pitch), move, turn)
        numbers = np.array([*extra, move, turn])
    prompt = chunk["prompt"]
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > 2000:
        raise ValueError("prompt")
    if not np.isfinite(numbers).all() or np.abs(numbers).max() > 1e6:
        raise ValueError("numbers")
    return Step(control, prompt, str(chunk["digest"])[:16])
