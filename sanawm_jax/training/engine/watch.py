"""What shows the progress of a run: lines of the log, boards, curves, films, profiles."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.peak import mfu, peak_flops
from sanawm_jax.runtime.processes import is_first
from sanawm_jax.training.engine.held_out import HeldOutWatcher
from sanawm_jax.training.engine.metrics import RowSink
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.state import TrainState

PROFILE_TRIGGER = "PROFILE"  # a file in the workdir that asks for a profile
_CURVES_SECONDS = 300.0  # between drawings of a long run


class Watcher(Protocol):
    """Is called after every call of the compiled steps, which went from step `before` to `step`.

    A run ends where `after` returns True.
    """

    def after(self, before: int, step: int, state: TrainState) -> bool | None: ...

    def close(self) -> None: ...


class Board(Protocol):
    """Shows numbers somewhere else."""

    def show(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Writes a line of the log every `log_every` steps: means over the steps since the line before.

    Args:
      log_every: steps.
      last_step: of the run; the line shows it.
      flops: of a step on all devices together; 0 if they are not counted.
      devices: how many there are.
      peak: FLOP/s of one device, see `runtime.peak`.
      boards: get the same numbers.
    """

    def __init__(
        self,
        log_every: int,
        last_step: int,
        *,
        flops: float = 0.0,
        devices: int = 1,
        peak: float | None = None,
        boards: Sequence[Board] = (),
    ):
        self._log_every, self._last_step, self._boards = log_every, last_step, boards
        self._flops, self._devices, self._peak = flops, devices, peak
        self._rows: list[Mapping[str, Any]] = []
        self._since: Mapping[str, Any] | None = None  # the row that the time is counted from

    def row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if self._since is None:  # the first step waits for the compiler
            self._since = row
        if row["step"] % self._log_every == 0 or row["step"] == self._last_step:
            self._show(row)

    def close(self) -> None:
        for board in self._boards:
            board.close()

    def _show(self, row: Mapping[str, Any]) -> None:
        values = means(self._rows)
        steps = row["step"] - self._since["step"] if self._since else 0
        if self._since and steps:
            values["step_seconds"] = (row["seconds"] - self._since["seconds"]) / steps
            share = mfu(self._flops, values["step_seconds"], self._devices, self._peak)
            if share:
                values["mfu"] = share
        self._rows, self._since = [], row
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if left := (self._last_step - row["step"]) * values.get("step_seconds", 0.0):
            shown += f", {_duration(left)} left"
        logging.info("step %d/%d, %.0f s: %s", row["step"], self._last_step, row["seconds"], shown)
        for board in self._boards:
            board.show(row["step"], values)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of every metric over the rows that have it; of metrics that change slowly, the last."""
    names = [name for name in rows[-1] if name not in ("step", "seconds")]
    values: dict[str, float] = {}
    for name in names:
        known = [row[name] for row in rows if row.get(name) is not None]
        if known:
            latest = name in ("learning_rate", "skipped")
            values[name] = known[-1] if latest else sum(known) / len(known)
    return values


class TensorBoard:
    """Scalars as TensorBoard's event files, by tensorboardX, the extra `tensorboard`.

    Raises:
      InputError: it is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                "tensorboard=True needs tensorboardX: pip install tensorboardX"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars to Weights & Biases, the extra `wandb`; a resumed run continues the same run there.

    Raises:
      InputError: it is not installed.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError("wandb.project is set: pip install wandb, or leave it empty") from None
        mark = workdir / "wandb_id"
        if not mark.exists():
            mark.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = wandb.init(
            project=config.wandb.project,
            name=config.wandb.name or workdir.name,
            mode=config.wandb.mode,
            dir=str(workdir),
            id=mark.read_text(encoding="utf-8"),
            resume="allow",
            config=config.to_dict(),
        )

    def show(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Profiler:
    """Traces with `jax.profiler` into `workdir/profile`, at a step or when a file asks for it.

    Args:
      workdir: the folder in which `PROFILE_TRIGGER` is looked for, and removed when it is found.
      start: the step after which tracing begins; with 0 only the file starts it.
      steps: how many are traced, at least.
    """

    def __init__(self, workdir: Path, start: int, steps: int):
        self._folder, self._trigger = workdir / "profile", workdir / PROFILE_TRIGGER
        self._start, self._steps = start, steps
        self._until: int | None = None

    def after(self, before: int, step: int, state: TrainState) -> None:
        if self._until is not None:
            if step >= self._until:
                jax.block_until_ready(state.step)
                self.close()
        elif before < self._start <= step or self._trigger.exists():
            self._trigger.unlink(missing_ok=True)
            # steps that are still running do not belong in the trace
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(str(self._folder))
            self._until = step + self._steps

    def close(self) -> None:
        if self._until is not None:
            jax.profiler.stop_trace()
            self._until = None
            logging.info("profile written to %s", self._folder)


class Films:
    """Samples into `workdir/samples/STEP` after every `every` steps; all processes take part."""

    def __init__(self, recipe: Recipe, resident: Any, workdir: Path, every: int):
        self._recipe, self._resident, self._folder = recipe, resident, workdir / "samples"
        self._every = every

    def after(self, before: int, step: int, state: TrainState) -> None:
        if self._recipe.sample and before // self._every < step // self._every:
            self._recipe.sample(state.best, self._resident, self._folder / str(step))

    def close(self) -> None:
        pass


class Curves:
    """`workdir/curves.png` at checkpoints, at most every five minutes, and at the end."""

    def __init__(self, workdir: Path, save_every: int):
        self._workdir, self._save_every = workdir, save_every
        self._drawn = time.monotonic()

    def after(self, before: int, step: int, state: TrainState) -> None:
        is_due = time.monotonic() - self._drawn > _CURVES_SECONDS
        if step % self._save_every == 0 and is_due:
            self._draw()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        from sanawm_jax.training.curves import draw

        self._drawn = time.monotonic()
        metrics = self._workdir / "metrics.jsonl"
        try:
            draw({self._workdir.name: metrics}, self._workdir / "curves.png")
        except ImportError:
            logging.info("curves.png is not drawn: pip install matplotlib")
        except (InputError, OSError, ValueError) as error:
            # no row yet, or a full disk: a picture must not end a run
            logging.warning("curves.png is not drawn (%s)", error)


def make_sinks(
    config: ml_collections.ConfigDict, workdir: Path, recipe: Recipe, mesh: Mesh
) -> Sequence[RowSink]:
    """What shows the metrics besides `metrics.jsonl`, in the first process.

    Raises:
      InputError: an extra that the configuration asks for is not installed.
    """
    if not is_first():
        return []
    boards: list[Board] = []
    if config.tensorboard:
        boards.append(TensorBoard(workdir / "tensorboard"))
    if config.wandb.project:
        boards.append(WeightsAndBiases(config, workdir))
    return [
        Progress(
            config.log_every,
            config.steps,
            flops=recipe.flops * config.batch_size,
            devices=mesh.size,
            peak=peak_flops(mesh.devices.flat[0]),
            boards=boards,
        )
    ]


def make_watchers(
    config: ml_collections.ConfigDict, workdir: Path, recipe: Recipe, resident: Any, step: int = 0
) -> Sequence[Watcher]:
    """What is called with the state while it trains."""
    watchers: list[Watcher] = []
    if "samples" in config and config.samples.every:
        watchers.append(Films(recipe, resident, workdir, config.samples.every))
    if recipe.held_out:
        path = workdir / "held_out.jsonl" if is_first() else None
        watchers.append(HeldOutWatcher(recipe.held_out, resident, path, step))
    if is_first():
        watchers.append(Profiler(workdir, config.profile.start, config.profile.steps))
        if config.curves:
            watchers.append(Curves(workdir, config.save_every))
    return watchers
