"""Trains a model and, in the same folder, resumes.

    python train.py --config=configs/small_world_vae.py --workdir=DIR [--config.key=value]

Writes DIR/metrics.jsonl, DIR/checkpoints/ and, at the end, DIR/export/ in the diffusers layout.
Exit status 0 with the exported folder as the last line; 2 and one clear line on bad input; 1 if
the loss diverged.
"""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/small_world.py", "training configuration", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; an old run is continued", required=True
)


def main(argv: list[str]) -> None:
    from sanawm_jax.errors import InputError
    from sanawm_jax.training.loop import train
    from sanawm_jax.training.metrics import TrainingDiverged

    logging.set_verbosity(logging.INFO)
    try:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}; write --config.key=value")
        train(_CONFIG.value, _WORKDIR.value)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(f"{_WORKDIR.value}/export")


if __name__ == "__main__":
    app.run(main)
