"""Trains a model and, in the same folder, resumes.

    python train.py --config=configs/small_world_vae.py --workdir=DIR [--config.key=value]

Writes DIR/metrics.jsonl, DIR/checkpoints/ and, at the end, DIR/export/ in the diffusers layout.
`--config.dry_run` prints parameter count, memory and shardings instead, and trains nothing.
Exit status 0 with the exported folder as the last line; 2 and one clear line on bad input; 1 if
the loss diverged.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging

from sanawm_jax.command_line import define_config, fail, parse_flags, show_notes

_CONFIG = define_config(Path(__file__).parent / "configs/small_world.py", "training configuration")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; an old run is continued", required=True
)


def main(_: list[str]) -> None:
    from sanawm_jax.errors import InputError
    from sanawm_jax.training.dry_run import describe
    from sanawm_jax.training.loop import train
    from sanawm_jax.training.metrics import TrainingDiverged

    logging.set_verbosity(logging.INFO)
    show_notes()
    try:
        if _CONFIG.value.dry_run:
            print(describe(_CONFIG.value))
            return
        train(_CONFIG.value, _WORKDIR.value)
    except InputError as error:
        fail(str(error))
    except TrainingDiverged as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(f"{_WORKDIR.value}/export")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
