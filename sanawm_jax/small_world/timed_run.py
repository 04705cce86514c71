"""Training runs of the small world that end by the clock: folder, log, devices and schedule.

A run has a machine for some minutes and must leave its results before they are over, so everything
counts: making clips and compiling too. The rows of a batch are divided over all devices.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sanawm_jax.core.params import Params
from sanawm_jax.core.sharding import (
    logical_spec,
    make_mesh,
    place,
    place_batches,
    place_signals,
)
from sanawm_jax.small_world.compact import load_compact, save_compact
from sanawm_jax.training.engine.learner import MODEL, Learner
from sanawm_jax.training.engine.spikes import SpikePolicy
from sanawm_jax.training.engine.state import TrainState
from sanawm_jax.training.engine.step import STOP, Loss, Update, compile_steps

_SPIKE = SpikePolicy()
_OF_THE_HOST = (STOP, "skipped_in_row", "norm_limit")  # metrics that no line of the log has
_LOG_SECONDS, _SAVE_SECONDS = 5.0, 150.0
_REPLICAS = ("data", "fsdp")  # axes of the mesh that divide the rows


def add_run_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    """The arguments that all trainers of the small world have."""
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="from the start to the last training step"
    )
    parser.add_argument("--steps", type=int, default=0, help="end after so many steps; 0: no limit")
    parser.add_argument(
        "--span",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        help="which part of the schedule this run is, for a training in several runs",
    )
    parser.add_argument("--resume", help="state/ folder of an earlier run to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps_per_call", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="processes that plan scenes")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--ema", type=float, default=0.999)


class Call(NamedTuple):
    """One call of compiled steps."""

    program: Any
    resident: Any
    batches: Any  # numpy (K, B, ...)


class TimedRun:
    """What surrounds the steps of one run.

    Attributes:
      mesh: of all devices.
      rows: the sharding of an array whose first axis is divided over the devices.
      whole: the sharding of an array that every device holds.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.mesh = make_mesh(data=len(jax.devices()))
        self.rows = NamedSharding(self.mesh, logical_spec("B"))
        self.whole = NamedSharding(self.mesh, P())
        self._start = time.time()
        self._log = (self.out / "log.jsonl").open("a")
        self._compiler = ThreadPoolExecutor(1)

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.time() - self._start

    def note(self, **facts: Any) -> None:
        """Writes a line of JSON to the log and to the screen."""
        line = json.dumps({"seconds": round(self.seconds, 1), **facts})
        self._log.write(line + "\n")
        self._log.flush()
        print(line, flush=True)

    def ahead(self, make: Callable[[], Any]) -> Future:
        """Calls `make`, which compiles something, in a thread beside the run, in turn."""

        def on_mesh() -> Any:
            with jax.set_mesh(self.mesh):
                return make()

        return self._compiler.submit(on_mesh)

    def compile(
        self, name: str, update: Update, state: TrainState, resident: Any, batches: Any
    ) -> Future:
        """A compiled call of some steps, made beside the run.

        Args:
          name: for the log.
          update: of one step.
          state, resident: arrays on the mesh, or shapes with shardings.
          batches: numpy (K, B, ...), as every call gets them.
        """
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), (state, resident)
        )

        def make() -> Any:
            began = time.time()
            places = jax.tree.map(lambda a: a.sharding, shapes)
            steps: Any = compile_steps(
                state_shardings=places[0],
                resident_shardings=places[1],
                update=update,
                spike=_SPIKE,
            )
            rest = self._place(batches), self._key(), place_signals(self.mesh, 0.0, 0.0)
            program = steps.lower(*shapes, *rest).compile()
            self.note(event="compiled", program=name, took=round(time.time() - began, 1))
            return program

        return self.ahead(make)

    def _place(self, batches: Any) -> Any:
        return place_batches(batches, self.mesh, jax.tree.leaves(batches)[0].shape[1])

    def _key(self) -> jax.Array:
        return jax.device_put(jax.random.key(self.options.seed), self.whole)

    def train(
        self,
        state: TrainState,
        next_call: Callable[[float], Call],
        watch: Callable[[TrainState], dict[str, Any]] = lambda state: {},
    ) -> TrainState:
        """Makes steps until the time or the number of steps is over, and at least one call.

        Args:
          state: donated.
          next_call: how far the whole schedule is, 0 to 1 -> what to run next.
          watch: further numbers for a line of the log.
        """
        first, last = self.options.span
        step, began, done = int(state.step), self.seconds, 0
        shown_at, shown, saved_at = self.seconds, 0, self.seconds
        pending: Any = None
        while True:
            share = (self.seconds - began) / max(60.0 * self.options.minutes - began, 1e-9)
            if self.options.steps:
                share = max(share, done / self.options.steps)
            if share >= 1.0 and done:
                break
            fraction = first + (last - first) * min(share, 1.0)
            program, resident, batches = next_call(fraction)
            signals = place_signals(self.mesh, fraction, 0.0)
            state, values = program(state, resident, self._place(batches), self._key(), signals)
            done += len(jax.tree.leaves(batches)[0])
            if self.seconds - saved_at > _SAVE_SECONDS:  # a machine can be taken away
                self.save(state)
                saved_at = self.seconds
            if pending is not None:  # at most two calls are under way, so that the clock is true
                jax.block_until_ready(pending)
                if self.seconds - shown_at > _LOG_SECONDS:
                    rate = (done - shown) / (self.seconds - shown_at)
                    self.note(
                        step=step + done,
                        progress=round(fraction, 4),
                        steps_per_second=round(rate, 2),
                        **means(pending),
                        **watch(state),
                    )
                    shown_at, shown = self.seconds, done
            pending = values
        jax.block_until_ready(state)
        self.note(
            event="trained", step=int(state.step), steps=done, **means(pending), **watch(state)
        )
        return state

    def save(self, state: TrainState) -> None:
        """Writes the compact state into the run's folder."""
        save_compact(self.out / "state", _parts(state))
        self.note(event="saved")


def on_ranks(loss: Loss) -> Loss:
    """A loss whose rows each device of the mesh computes on its own.

    The compiler's partitioner cannot see into Pallas kernels, so a program that it divides runs
    without them; see `kernels_pallas.choice`.
    """

    def local(params: Params, examples: Any) -> Any:
        # all are means over rows, of which every device has as many
        return jax.lax.pmean(loss(params, examples), _REPLICAS)

    def shared(params: Params, examples: Any) -> Any:
        specs = P(), logical_spec("B")
        return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(
            params, examples
        )

    return shared


def means(values: dict[str, jax.Array]) -> dict[str, float | None]:
    """Means of metrics (K,) over their steps; None where a metric is never a number."""
    out: dict[str, float | None] = {}
    for name, value in values.items():
        numbers = np.asarray(value, np.float64)
        numbers = numbers[np.isfinite(numbers)]
        if name not in _OF_THE_HOST:
            out[name] = float(f"{numbers.mean():.5g}") if numbers.size else None
    return out


def _parts(state: TrainState) -> dict[str, Any]:
    model = state.model
    return {
        "params": model.params,
        "average": model.average,
        "moments": model.moments,
        "step": state.step,
    }


def load_state(folder: str | Path, state: TrainState) -> TrainState:
    """The training state that `TimedRun.save` wrote, in the shapes and the places of `state`.

    Raises:
      InputError: the folder holds no state of this network.
    """
    old = _parts(state)
    new = load_compact(folder, old)
    new = jax.tree.map(lambda a, b: place(a, b.sharding), new, old)
    learner = Learner(new["params"], new["moments"], new["average"])
    return TrainState(new["step"], {MODEL: learner}, state.guard)


def save_sheet(path: Path, shown: np.ndarray) -> None:
    """Contact sheet of (clips, rows, columns, H, W, 3) in [-1, 1], one clip below the other."""
    from PIL import Image

    rows = [np.concatenate(list(strip), 1) for clip in shown for strip in clip]
    sheet = np.clip((np.concatenate(rows) + 1.0) * 127.5, 0, 255).astype(np.uint8)
    Image.fromarray(sheet).save(path, quality=92)
