"""The training loop: resume, step, write metrics, save, stop by steps or by the clock, export."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from sanawm_jax.core.params import count
from sanawm_jax.data.loader import Loader
from sanawm_jax.training.checkpoint import Checkpoints
from sanawm_jax.training.metrics import MetricsWriter
from sanawm_jax.training.optimizer import learning_rate, make_optimizer
from sanawm_jax.training.state import TrainState, create_state
from sanawm_jax.training.step import compile_steps
from sanawm_jax.training.tasks import Task, make_task


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """Trains `config.task` in `workdir`, continuing what is there.

    Writes `metrics.jsonl`, `checkpoints/` and, at the end, `export/`.

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
    task = make_task(config, workdir)
    optim = config.optimizer
    optimizer = make_optimizer(
        name=optim.name,
        betas=tuple(optim.betas),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
    )
    state = create_state(task.params, optimizer)
    logging.info("%s: %.2f M parameters", config.task, count(state.params) / 1e6)
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
        state = _run(config, task, state, loader, checkpoints, metrics, optimizer)
    finally:
        metrics.close()
        checkpoints.close()
    task.export(state.ema)
    logging.info("exported to %s", workdir / "export")
    return state


def _run(
    config: ml_collections.ConfigDict,
    task: Task,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    optimizer,
) -> TrainState:
    optim = config.optimizer
    rate = functools.partial(
        learning_rate,
        peak=optim.learning_rate,
        warmup_steps=optim.warmup_steps,
        num_steps=config.num_steps,
        schedule=optim.schedule,
        final_fraction=optim.final_fraction,
    )
    steps = compile_steps(loss=task.loss, optimizer=optimizer, rate=rate, decay=config.ema_decay)
    key = jax.random.key(config.seed)
    limit = 60.0 * config.max_minutes
    # counted here: reading it from the state would wait for the device
    step = int(state.step)

    def save() -> None:
        metrics.drain()  # a diverged state is never saved
        checkpoints.save(state, {"loader": loader.state(), "seconds": metrics.seconds})

    while step < config.num_steps and not (limit and metrics.seconds >= limit):
        # calls end on multiples of save_every, so that a resumed run makes the same calls
        to_save = config.save_every - step % config.save_every
        k = min(config.steps_per_call, config.num_steps - step, to_save)
        fraction = metrics.seconds / limit if limit else 0.0
        batches = loader.next(k)
        state, values = steps(state, task.resident, batches, key, jnp.float32(fraction))
        metrics.push(step + 1, values)
        step += k
        if step % config.save_every == 0:
            save()
    save()
    return state
