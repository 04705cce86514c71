"""Orbax checkpoints of the whole run: state, loader position, time used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sanawm_jax.errors import InputError
from sanawm_jax.training.state import TrainState


class Checkpoints:
    """The folder `workdir/checkpoints`.

    Args:
      folder: made if absent.
      keep: how many of the latest stay.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(Path(folder).expanduser().absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, run: dict[str, Any]) -> None:
        """Starts saving; a step that is saved already is left alone.

        Args:
          state: at the step to save.
          run: JSON values: the loader's state, seconds used.
        """
        step = int(state.step)
        if self.latest() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), run=ocp.args.JsonSave(run)
            ),
        )

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
                f"the checkpoint in {self._manager.directory} does not fit this configuration "
                f"({reason}); use another --workdir"
            ) from error
        return TrainState(**restored["state"]), restored["run"]

    def close(self) -> None:
        """Waits for saving to finish."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "params", "opt_state", "ema")}
