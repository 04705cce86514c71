"""Orbax checkpoints of the whole run: state, loader position, seed, time used.

A checkpoint is written in the background under another name and appears under its step when it is
complete; one that is given up is moved out of sight in one piece and deleted later. A run that is
killed at any moment therefore finds complete checkpoints only.
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
from sanawm_jax.training.engine.state import TrainState

_DELETED = ".deleted"
_PARTIAL = "*.orbax-checkpoint-tmp*"  # how Orbax names what is not complete
LOSS = "loss"


class Checkpoints:
    """The folder `workdir/checkpoints`, one for all processes of a run.

    Args:
      folder: made if absent.
      keep: how many of the latest stay.
      keep_best: how many of those with the least loss stay besides.
      keep_period: steps that are a multiple of it stay for ever; 0: none.
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
        """Step of the one with the least loss."""
        return self._manager.best_step()

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self._folder / str(step)

    def save(self, state: TrainState, run: dict[str, Any], *, loss: float | None = None) -> bool:
        """Starts saving, after the save before has ended; a step that is saved is left alone.

        A disk that cannot take it is a warning: the run goes on, older checkpoints stay.

        Args:
          state: at the step to save.
          run: JSON values: the loader's state, seed, seconds used.
          loss: by which the best are kept.

        Returns:
          Whether saving has started, or had ended already.
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
        """Waits for saving to finish; False if it failed, of which a warning has told."""
        return self._guarded(self._manager.wait_until_finished)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint as `(state, run)`.

        Args:
          like: a state of the same shapes and shardings.

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
        return TrainState(**restored["state"]), restored["run"]

    def close(self) -> None:
        """Waits for saving to finish."""
        self.wait()
        self._clean()
        self._manager.close()

    def _guarded(self, save: Callable[[], Any]) -> bool:
        """Runs part of a save; a failure of the disk is one line and False."""
        try:
            save()
        except Exception as error:
            if not _is_of_the_disk(error):
                raise
            # Orbax has forgotten the older ones, and left a part of this one
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
        """Removes what is deleted, and what is partial; no save may be under way."""
        if not is_first():
            return
        for folder in (self._folder / _DELETED, *self._folder.glob(_PARTIAL)):
            shutil.rmtree(folder, ignore_errors=True)


def _loss_of(metrics: Any) -> float:
    return metrics[LOSS]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "params", "opt_state", "ema", "guard")}


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether a file could not be written, as Python or TensorStore says it."""
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
