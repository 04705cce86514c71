"""Trains a model and, in the same folder, resumes.

    python train.py --config=configs/small_world_vae.py --workdir=DIR [--config.key=value]

Writes DIR/metrics.jsonl, DIR/checkpoints/ and, at the end, DIR/export/ in the diffusers layout.
`--config.dry_run` prints parameter count, memory and shardings instead, and trains nothing.
Exit status 0 with the exported folder as the last line; 2 and one clear line on bad input; 1 if
the loss diverged. SIGTERM saves and exits with 0, and Ctrl-C with 130; the same command goes on.

A run of several processes takes --coordinator, --num_processes and --process_id, JAX's environment
variables of the same meaning, or --distributed, which asks the scheduler; see docs/sharding.md.
"""

from sanawm_jax.training.cli import main

if __name__ == "__main__":
    main()
