"""The training loop: resume, step, write metrics, save, stop by steps or by the clock, export."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sanawm_jax.core.params import count
from sanawm_jax.core.sharding import (
    check_batch,
    local_rows,
    make_mesh,
    place_batches,
    shardings,
)
from sanawm_jax.data.loader import Loader
from sanawm_jax.training.checkpoint import Checkpoints
from sanawm_jax.training.metrics import MetricsWriter
from sanawm_jax.training.optimizer import learning_rate, optimizer_of
from sanawm_jax.training.state import TrainState, create_state
from sanawm_jax.training.step import compile_steps
from sanawm_jax.training.tasks import Task, make_task

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """Trains `config.task` in `workdir`, continuing what is there.

    Writes `metrics.jsonl`, `checkpoints/` and, at the end, `export/`. The mesh may be another one
    than that of the run's earlier part.

    Args:
      config: see `configs/small_world.py` and `configs/small_world_vae.py`.
      workdir: the run's folder.

    Returns:
      the last state.

    Raises:
      InputError: configuration, data or an old checkpoint do not fit.
      TrainingDiverged: the loss is not finite; the last checkpoint is from before that.
    """
    workdir = Path(workdir).expanduser().absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(**config.mesh.to_dict())
    check_batch(mesh, config.batch_size, config.accumulation)
    # what makes the data runs on one device; the mesh is set for what follows
    task = make_task(config, workdir)
    optimizer = optimizer_of(config)
    logging.info("%s: %.2f M parameters", config.task, count(task.abstract) / 1e6)
    with jax.set_mesh(mesh):
        return _train_on(mesh, config, workdir, task, optimizer)


def _train_on(
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    workdir: Path,
    task: Task,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    state = create_state(
        task.init(shardings(task.abstract, mesh)), optimizer, mesh, average=config.ema_decay > 0
    )
    rows = local_rows(mesh, config.batch_size)
    if task.stream is not None:
        loader = task.stream(rows)
    else:
        loader = Loader(range(task.size), config.batch_size, seed=config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    seconds = 0.0
    if checkpoints.latest() is not None:
        state, run = checkpoints.restore(state)
        loader.restore(run["loader"])
        seconds = run["seconds"]
        logging.info("resumed at step %d", state.step)
    metrics = MetricsWriter(
        workdir / "metrics.jsonl",
        step=int(state.step),
        seed=config.seed,
        log_every=config.log_every,
        seconds=seconds,
    )
    try:
        state = _run(mesh, config, task, state, loader, checkpoints, metrics, optimizer)
    finally:
        loader.close()
        metrics.close()
        checkpoints.close()
    task.export(state.best)
    logging.info("exported to %s", workdir / "export")
    return state


def _run(
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    task: Task,
    state: TrainState,
    loader: Loader | ZipStream,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    optim = config.optimizer
    rate = functools.partial(
        learning_rate,
        peak=optim.learning_rate,
        warmup_steps=optim.warmup_steps,
        num_steps=config.steps,
        schedule=optim.schedule,
        final_fraction=optim.final_fraction,
    )
    steps = compile_steps(
        state_shardings=jax.tree.map(lambda a: a.sharding, state),
        prepare=task.prepare,
        loss=task.loss,
        optimizer=optimizer,
        rate=rate,
        decay=config.ema_decay,
        accumulation=config.accumulation,
    )
    whole = NamedSharding(mesh, PartitionSpec())
    resident = jax.device_put(task.resident, whole)
    key = jax.device_put(jax.random.key(config.seed), whole)
    rows = local_rows(mesh, config.batch_size)
    limit = 60.0 * config.max_minutes
    # counted here: reading it from the state would wait for the device
    step = int(state.step)

    def save() -> None:
        metrics.drain()  # a diverged state is never saved
        checkpoints.save(state, {"loader": loader.state(), "seconds": metrics.seconds})

    # a new run makes a step however short its time is, so that it has something to export
    while step < config.steps and (step == 0 or not limit or metrics.seconds < limit):
        # calls end on multiples of save_every, so that a resumed run makes the same calls
        to_save = config.save_every - step % config.save_every
        k = min(config.steps_per_call, config.steps - step, to_save)
        fraction = metrics.seconds / limit if limit else 0.0
        batches: Any = loader.next(k)
        if task.stream is None:  # every process knows the whole order and reads its own rows
            indices = batches[:, rows]
            batches = indices if task.read is None else task.read(indices)
        batches = place_batches(batches, mesh, config.batch_size)
        state, values = steps(state, resident, batches, key, np.float32(fraction))
        metrics.push(step + 1, values)
        step += k
        if step % config.save_every == 0:
            save()
    save()
    return state
