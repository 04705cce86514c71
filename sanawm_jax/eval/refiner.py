"""What the refiner changes on the small world: quality by quarter, drift, camera following.

    python -m sanawm_jax.eval.refiner --json refiner.json --sheet refiner.png
    python -m sanawm_jax.eval.refiner --weights STAGE1/export --refiner_weights BASE/export

Every clip is sampled once by stage 1, then decoded as it is and after refinement. Prints the model
card's table in Markdown; docs/evaluation.md says what the figures are.
"""

from __future__ import annotations

import argparse
from typing import Any

from sanawm_jax.eval.command import Run, make_parser, sampler_of, workers
from sanawm_jax.eval.runner import Clip, evaluate
from sanawm_jax.eval.scenes import METRICS, make_clip, plan, sample
from sanawm_jax.eval.summary import BY_QUARTER, CAMERA, show, summary
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError

STAGES = {"stage1": "stage 1", "refined": "refined"}  # as the table names them


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Run]:
    """Figures of both stages.

    Raises:
      InputError: no scene, or folders that are missing or do not fit each other.
    """
    import jax.numpy as jnp

    from sanawm_jax.sampling.latents import channels_last
    from sanawm_jax.sampling.options import RefineOptions
    from sanawm_jax.sampling.refine import LTX2Refiner

    model, _ = sampler_of(options)
    refiner = LTX2Refiner.from_pretrained(
        options.refiner_weights,
        dtype="float32",
        options=RefineOptions(refiner_block_size=options.refiner_block_size),
        keep=True,
    )

    def make(name: str) -> Clip:
        task = plan(int(name), options.num_frames, options.height, options.width)
        truth = task.render(task.c2w)
        sampled = sample(model, task, truth[0], options)
        assert sampled.frames is not None
        refined = refiner(sampled.latents, task.caption, progress=False)
        # with the sink, which is the given image: both videos have the same frames
        decoded = model.decode(jnp.asarray(channels_last(refined)))
        return make_clip(task, truth, dict(zip(STAGES, (sampled.frames, decoded), strict=True)))

    this = Run(options, [options.weights, options.refiner_weights])
    names = [f"{index}" for index in range(options.scenes)]
    this.rows = evaluate(names[:1], make, METRICS, this.store, progress=False)  # loads the refiner
    this.rows = evaluate(names, make, METRICS, this.store, workers())
    table = {"clips": options.scenes, "steps": options.steps, "cfg_scale": options.cfg_scale}
    found = {stage: summary([row["stages"][stage] for row in this.rows]) for stage in STAGES}
    return table | found, this


def table_lines(table: dict[str, Any]) -> list[str]:
    """The figures as the model card shows them, in Markdown."""
    head = (f"{table['clips']} clips", "quarter 1", "2", "3", "4", "mean", "drift")
    rows = [head, ("---",) * len(head)]
    for name, (label, _, digits) in BY_QUARTER.items():
        for stage, shown in STAGES.items():
            found = table[stage]
            values = (*found[f"{name}_by_quarter"], found[name], found[f"{name}_drift"])
            rows.append((f"{label}, {shown}", *(show(v, digits) for v in values)))
    for stage, shown in STAGES.items():
        followed = f"{table[stage]['camera_following']:.1%}"
        rows.append((f"camera following, {shown}", "", "", "", "", followed, ""))
    for name, label in CAMERA.items():
        if not name.startswith("estimator"):
            for stage, shown in STAGES.items():
                value = show(table[stage][name], 3)
                rows.append((f"{label}, {shown}", "", "", "", "", value, ""))
    return [f"| {' | '.join(row)} |" for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = make_parser(__doc__, "refiner_sheet.png")
    parser.add_argument(
        "--refiner_weights", default="small_world_refiner", help="a refiner folder, or adapters"
    )
    parser.add_argument(
        "--refiner_block_size", type=int, default=3, help="latent frames; 0: the whole clip"
    )
    options = parser.parse_args(argv)
    try:
        table, this = run(options)
        print("\n".join(table_lines(table)))
        this.write(table, f"Refiner: {options.refiner_weights}")
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
