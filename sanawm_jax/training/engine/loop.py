"""The training loop: resume, step, write metrics, save, stop by steps, clock or signal, export."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sanawm_jax.core.params import count
from sanawm_jax.core.sharding import (
    check_batch,
    local_rows,
    make_mesh,
    place,
    place_batches,
    place_signals,
    shardings,
)
from sanawm_jax.data.loader import Loader
from sanawm_jax.media.video import check_writable
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.lock import only_run_in
from sanawm_jax.runtime.processes import is_first, to_first, wait_for_all
from sanawm_jax.training.engine.checkpoint import Checkpoints
from sanawm_jax.training.engine.interrupt import (
    GO_ON,
    TERMINATED,
    TIME_IS_UP,
    Stopped,
    TerminationSignal,
)
from sanawm_jax.training.engine.metrics import MetricsWriter
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.engine.spikes import SpikePolicy
from sanawm_jax.training.engine.state import TrainState, create_state
from sanawm_jax.training.engine.step import StepFunction, compile_steps
from sanawm_jax.training.engine.watch import Watcher, make_sinks, make_watchers
from sanawm_jax.training.recipes.registry import make_recipe

if TYPE_CHECKING:  # it imports grain
    from sanawm_jax.data.zip_stream import ZipStream


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> TrainState:
    """Trains `config.task` in `workdir`, continuing what is there.

    Writes `metrics.jsonl`, `skipped.jsonl`, `checkpoints/` and, at the end, `export/`. The mesh
    may be another one than that of the run's earlier part. All processes of a run call this alike,
    with one folder that all of them see.

    Args:
      config: see `configs/small_world.py` and `configs/small_world_vae.py`.
      workdir: the run's folder.

    Returns:
      the last state.

    Raises:
      InputError: configuration, data or an old checkpoint do not fit, or another run is training
        in this folder.
      TrainingDiverged: the loss is not finite, or `spike` ends the run; the last checkpoint is
        from before that.
      Stopped: by SIGTERM or Ctrl-C, after saving.
    """
    workdir = Path(workdir).expanduser().absolute()
    check_writable(workdir)
    if (workdir / "export").exists() and not (workdir / "export").is_dir():
        raise InputError(f"{workdir / 'export'} must be a folder: the run writes its weights there")
    with only_run_in(workdir) if is_first() else contextlib.nullcontext():
        return _train_in(workdir, config)


def _train_in(workdir: Path, config: ml_collections.ConfigDict) -> TrainState:
    mesh = make_mesh(**config.mesh.to_dict())
    check_batch(mesh, config.batch_size, config.accumulation)
    with TerminationSignal() as signal:
        # what makes the data runs on one device; the mesh is set for what follows. The first
        # process writes what it makes, the others find it
        if not is_first():
            wait_for_all("data of the first process")
        recipe = make_recipe(config, workdir)
        if is_first():
            wait_for_all("data of the first process")
            logging.info("%s: %.2f M parameters", config.task, count(recipe.abstract) / 1e6)
        with jax.set_mesh(mesh):
            return _train_on(mesh, config, workdir, recipe, signal)


def _train_on(
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    workdir: Path,
    recipe: Recipe,
    signal: TerminationSignal,
) -> TrainState:
    spike = SpikePolicy(**config.spike.to_dict())
    state, resident, steps = start_run(mesh, config, recipe)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.keep_checkpoints,
        keep_best=config.keep_best_checkpoints,
        keep_period=config.keep_period,
    )
    run: dict[str, Any] = {"seed": config.seed, "seconds": 0.0}
    settings = {"batch_size": config.batch_size, "optimizer": str(config.get("optimizer"))}
    if checkpoints.latest() is not None:
        state, run = checkpoints.restore(state)
        logging.info("resumed at step %d", state.step)
        if run["seed"] != config.seed:
            logging.warning("the run began with seed %d and keeps it", run["seed"])
        for name, value in settings.items():
            if value != (before := run.get("settings", settings).get(name)):
                logging.warning("%s was %s and is now %s", name, before, value)
    if recipe.stream is None:
        loader = Loader(range(recipe.size), config.batch_size, seed=run["seed"])
    else:
        loader = recipe.stream(local_rows(mesh, config.batch_size), run["seed"])
    if "loader" in run:
        loader.restore(run["loader"])
    metrics = MetricsWriter(
        workdir / "metrics.jsonl" if is_first() else None,
        step=int(state.step),
        seed=run["seed"],
        seconds=run["seconds"],
        spike=spike if spike.is_on else None,
        sinks=make_sinks(config, workdir, recipe, mesh),
    )
    watchers = make_watchers(config, workdir, recipe, resident, int(state.step))
    try:
        state = _run(
            mesh,
            config,
            recipe,
            state,
            resident,
            steps,
            loader,
            checkpoints,
            metrics,
            watchers,
            signal,
            settings,
        )
    finally:
        loader.close()
        metrics.close()
        checkpoints.close()
        for watcher in watchers:
            watcher.close()
    best = to_first(state.best)
    if is_first():
        recipe.export(best)
        logging.info("exported to %s", workdir / "export")
    wait_for_all("export")
    return state


def start_run(
    mesh: Mesh, config: ml_collections.ConfigDict, recipe: Recipe
) -> tuple[TrainState, Any, StepFunction]:
    """What a run has before its first step: state, resident data and the compiled steps.

    The caller sets the mesh (`jax.set_mesh`), here and where the steps are called.

    Raises:
      InputError: a policy that does not exist.
    """
    spike = SpikePolicy(**config.spike.to_dict())
    params = recipe.init(shardings(recipe.abstract, mesh))
    state = create_state(params, recipe.rules, mesh, guarded=spike.is_on)
    resident = _place_resident(recipe.resident, mesh)
    steps = compile_steps(
        state_shardings=jax.tree.map(lambda a: a.sharding, state),
        resident_shardings=jax.tree.map(lambda a: a.sharding, resident),
        update=recipe.update,
        spike=spike if spike.is_on else None,
    )
    return state, resident, steps


def _place_resident(resident: Any, mesh: Mesh) -> Any:
    """Replicated, except for the frozen networks of `base`, which are sharded like trained ones."""
    whole = NamedSharding(mesh, PartitionSpec())
    if not isinstance(resident, dict) or "base" not in resident:
        return place(resident, whole)
    rest = {name: value for name, value in resident.items() if name != "base"}
    base = place(resident["base"], shardings(resident["base"], mesh))
    return {**place(rest, whole), "base": base}


def _run(
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    recipe: Recipe,
    state: TrainState,
    resident: Any,
    steps: StepFunction,
    loader: Loader | ZipStream,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    watchers: Sequence[Watcher],
    signal: TerminationSignal,
    settings: dict[str, Any],
) -> TrainState:
    seed = metrics.seed
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=whole)()
    rows = local_rows(mesh, config.batch_size)
    limit = 60.0 * config.max_minutes
    # counted here: reading it from the state would wait for the device
    first = step = int(state.step)

    def save() -> bool:
        metrics.drain()  # a diverged state is never saved
        run = {"loader": loader.state(), "seconds": metrics.seconds, "seed": seed}
        run["settings"] = settings
        return checkpoints.save(state, run, loss=metrics.mean_loss())

    def wish() -> float:
        if signal.is_set:
            return TERMINATED
        return TIME_IS_UP if limit and metrics.seconds >= limit else GO_ON

    while step < config.steps:
        # several processes agree in the compiled step, and learn of it with the metrics
        stop = wish() if jax.process_count() == 1 else metrics.stop
        # a new run makes a step however short its time is, so that it has something to export
        if stop == TERMINATED or (stop == TIME_IS_UP and step > 0):
            break
        # calls end on multiples of save_every, so that a resumed run makes the same calls
        to_save = config.save_every - step % config.save_every
        k = min(config.steps_per_call, config.steps - step, to_save)
        fraction = metrics.seconds / limit if limit else 0.0
        batches: Any = loader.next(k)
        if isinstance(loader, Loader):  # every process knows the whole order and reads its own rows
            indices = batches
            own = indices[:, rows]
            batches = own if recipe.read is None else recipe.read(own)
        else:
            indices = loader.indices(k)
        batches = place_batches(batches, mesh, config.batch_size)
        signals = place_signals(mesh, fraction, wish())
        if step == first and is_first():
            logging.info("compiling the training step, which can take minutes")
        state, values = steps(state, resident, batches, key, signals)
        metrics.push(step + 1, values, indices)
        # a list: each of them sees every step
        is_over = any([watcher.after(step, step + k, state) for watcher in watchers])
        step += k
        if step % config.save_every == 0:
            save()
        if is_over:
            stop = GO_ON
            break
    else:
        stop = GO_ON
    is_saved = step == first or (save() and checkpoints.wait())
    if stop == TERMINATED:
        raise Stopped(
            step,
            checkpoints.path(step) if step > first and is_saved else None,
            is_interrupted=signal.is_interrupted,
        )
    return state
