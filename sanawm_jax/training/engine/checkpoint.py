"""Orbax checkpoints of the whole run: state, loader position, seed, time used.

A checkpoint is written in the background under a temporary name, and gets the name of its step when
it is complete. To delete a checkpoint, its folder is renamed first. A run that is killed at any
moment therefore finds only complete checkpoints.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.processes import is_first
from sanawm_jax.training.engine.learner import MODEL, Learner
from sanawm_jax.training.engine.state import TrainState

_DELETED = ".deleted"
_PARTIAL = "*.orbax-checkpoint-tmp*"  # Orbax's names of incomplete checkpoints
LOSS = "loss"


class Checkpoints:
    """The folder `workdir/checkpoints`, which all processes of a run share.

    Args:
      folder: made if absent.
      keep: how many of the latest are kept.
      keep_best: how many of those with the lowest loss are kept, too.
      keep_period: steps that are a multiple of it are never deleted; 0: none.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, keep_best: int = 0, keep_period: int = 0
    ):
        self._folder = Path(folder).expanduser().absolute()
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_best:
            kept.append(
                policies.BestN(
                    get_metric_fn=_loss_of,
                    reverse=True,  # the best comes last
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if keep_period:
            kept.append(policies.EveryNSteps(keep_period))
        options = ocp.CheckpointManagerOptions(
            create=True,
            todelete_subdir=_DELETED,
            best_fn=_loss_of if keep_best else None,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )
        self._clean()
        self._drop_damaged_losses()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest loss."""
        return self._manager.best_step()

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self._folder / str(step)

    def save(self, state: TrainState, run: dict[str, Any], *, loss: float | None = None) -> bool:
        """Starts saving once the previous save has ended; a step that is saved already is kept.

        If the disk is full, that is a warning: the run goes on, older checkpoints stay.

        Args:
          state: at the step to save.
          run: JSON values: the loader's state, seed, seconds used.
          loss: decides which checkpoints are the best.

        Returns:
          Whether saving has started, or the step was saved already.
        """
        step = int(state.step)
        self.wait()
        if self.latest() == step:
            return True
        self._clean()
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)), run=ocp.args.JsonSave(run)
        )
        metrics = None if loss is None else {LOSS: loss}
        save = functools.partial(self._manager.save, step, args=parts, metrics=metrics)
        return self._guarded(save)

    def wait(self) -> bool:
        """Waits for saving to finish; False if it failed, after a warning."""
        return self._guarded(self._manager.wait_until_finished)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint that can be read, as `(state, run)`.

        A power cut can leave files that are incomplete, although they have their final names. Such
        a checkpoint is renamed to `STEP.damaged`, with a warning, and the one before it is used.

        Args:
          like: a state of the same shapes, dtypes and shardings.

        Raises:
          InputError: a checkpoint is of another model or optimizer, or none can be read. Then
            nothing is renamed.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
                    ),
                )
                state, run = _from_dict(restored["state"]), dict(restored["run"])
            # Orbax, TensorStore and the JSON parser report damaged files by almost any exception.
            except Exception as error:
                misfit = _misfit(self.path(step) / "state", abstract)
                if misfit:
                    raise InputError(
                        f"the checkpoint {self.path(step)} does not fit this configuration "
                        f"({misfit}); use another --workdir"
                    ) from error
                damaged[step] = _reason(error)
                continue
            self._set_aside(damaged, step)
            return state, run
        raise InputError(
            f"no checkpoint in {self._folder} can be read ({next(iter(damaged.values()))}); remove "
            "the folder to begin again, or use another --workdir"
        )

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step, reason in damaged.items():
            logging.warning(
                "checkpoint %d is damaged (%s) and is now called %d.damaged; going on from %d",
                *(step, reason, step, used),
            )
            if is_first():
                target = self.path(step).with_name(f"{step}.damaged")
                shutil.rmtree(target, ignore_errors=True)
                self.path(step).rename(target)
        if damaged:
            self._manager.reload()

    def close(self) -> None:
        """Waits for saving to finish."""
        self.wait()
        self._clean()
        self._manager.close()

    def _guarded(self, save: Callable[[], Any]) -> bool:
        """Runs a part of a save; if the disk fails, it logs one line and returns False."""
        try:
            save()
        except Exception as error:
            if not _is_of_the_disk(error):
                raise
            # Orbax has lost its list of the older ones, and left a part of this one on disk
            self._clean()
            self._manager.reload()
            left = self.latest()
            logging.warning(
                "a checkpoint could not be written to %s (%s); training goes on, %s: free some "
                "space",
                self._folder,
                _reason(error),
                "there is none yet" if left is None else f"the newest is of step {left}",
            )
            return False
        return True

    def _clean(self) -> None:
        """Removes deleted and partial checkpoints; no save may be running."""
        if not is_first():
            return
        for folder in (self._folder / _DELETED, *self._folder.glob(_PARTIAL)):
            shutil.rmtree(folder, ignore_errors=True)

    def _drop_damaged_losses(self) -> None:
        """Removes losses that a power cut has damaged, because Orbax reads all of them at once."""
        for file in self._folder.glob("[0-9]*/metrics/metrics") if is_first() else ():
            try:
                loss = json.loads(file.read_bytes().decode())[LOSS]
            except (OSError, ValueError, KeyError, TypeError):
                loss = None
            if not isinstance(loss, float | int):
                logging.warning("the loss of checkpoint %s is damaged", file.parents[1].name)
                shutil.rmtree(file.parent, ignore_errors=True)


def _loss_of(metrics: Any) -> float:
    return metrics[LOSS]


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The tree on disk.

    A state whose only learner is `model` keeps the layout from before learners had names, so that
    checkpoints of that time are restored.
    """
    tree: dict[str, Any] = {"step": state.step, "guard": state.guard}
    if state.learners.keys() != {MODEL}:
        return {**tree, "learners": {name: vars(one) for name, one in state.learners.items()}}
    model = state.model
    return {**tree, "params": model.params, "opt_state": model.moments, "ema": model.average}


def _from_dict(tree: dict[str, Any]) -> TrainState:
    """Inverse of `_as_dict`."""
    if "learners" in tree:
        learners = {name: Learner(**one) for name, one in tree["learners"].items()}
    else:
        learners = {MODEL: Learner(tree["params"], tree["opt_state"], tree["ema"])}
    return TrainState(tree["step"], learners, tree["guard"])


def _misfit(folder: Path, abstract: Any) -> str | None:
    """Says in which array a checkpoint differs from a state; None if in none, or if it is damaged.

    Args:
      folder: the checkpoint's state.
      abstract: the tree of shapes that `_as_dict` gives.
    """
    try:
        with ocp.StandardCheckpointer() as reader:
            found = _shapes(getattr(reader.metadata(folder).item_metadata, "tree", None))
    except Exception:  # see `restore`
        return None
    wanted = _shapes(abstract)
    for name in sorted(found.keys() | wanted.keys()) if found else ():
        if found.get(name) != wanted.get(name):
            have, need = found.get(name, "absent"), wanted.get(name, "absent")
            return f"{name} is {have} there and {need} here"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): a.shape for path, a in flat}


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether Python or TensorStore reports that a file could not be written."""
    while error is not None:
        if isinstance(error, OSError) or "OS error" in str(error) or "writing" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    text = str(error)
    for known in ("No space left on device", "File too large", "Disk quota exceeded"):
        if known in text:
            return known
    first = (text.splitlines() or [type(error).__name__])[0]
    return first.partition(". See full")[0][:200]
