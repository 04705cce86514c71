"""Orbax checkpoints of the whole run: state, loader position, seed, time used.

A checkpoint is written in the background under a temporary name, and gets the name of its step when
it is complete. To delete a checkpoint, its folder is renamed first. A run that is killed at any
moment therefore finds only complete checkpoints.
"""

from __future__ import annotations

import functools
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
        """The newest checkpoint as `(state, run)`.

        Args:
          like: a state of the same shapes, dtypes and shardings.

        Raises:
          InputError: the checkpoint is of another model or optimizer.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_dict(like))
        try:
            restored = self._manager.restore(
                self.latest(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0][:300]
            raise InputError(
                f"the checkpoint in {self._folder} does not fit this configuration "
                f"({reason}); use another --workdir"
            ) from error
        return _from_dict(restored["state"]), restored["run"]

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
    return (text.splitlines() or [type(error).__name__])[0][:200]
