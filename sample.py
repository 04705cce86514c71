"""Makes a video from one image, a prompt and a camera path.

    python sample.py
    python sample.py --weights DIR --image room.png --prompt "a room" --action "w-40,dw-20"

Alone it runs the small world and its refiner; --no_refiner decodes stage 1 instead, and so does
--weights without --refiner_weights. With other weights than those the defaults are the released
model's, see `configs/`. Prints the output's path as its last line. Bad input gives one line and
exit status 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from sanawm_jax.runtime.command_line import (
    define_config,
    fail,
    is_released,
    lasting_imports,
    parse_flags,
    show_notes,
)
from sanawm_jax.runtime.shipped import SMALL_WORLD, SMALL_WORLD_REFINER

_DEFAULTS = "sample_sana_wm" if is_released(sys.argv) else "sample_small_world"
_CONFIG = define_config(Path(__file__).parent / f"configs/{_DEFAULTS}.py", "sampling defaults")
# a flag that is not given takes the configuration's value
_TEXTS = {
    "weights": "stage 1: small_world, a folder in diffusers or upstream layout, or a hub name",
    "image": "first frame",
    "prompt": "text, or the path of a UTF-8 file",
    "negative_prompt": "text to steer away from, or a file",
    "camera": "camera-to-world poses (F, 4, 4) in a .npy file, OpenCV axes",
    "action": 'keys and frames, e.g. "w-40,dw-20"; exactly one of --camera and --action',
    "action_mapping": "meaning of the keys: sana or diffusers",
    "intrinsics": "a .npy file or fx,fy,cx,cy in pixels of the image",
    "dtype": "bfloat16 or float32",
    "precision": "of stage 1's large matrix products: bf16 (that is, --dtype) or fp8",
    "offload": "what stays on the accelerator: none, model (one network) or block (what fits)",
    "latents": "initial noise (1, C, T, h, w) in a .npy file",
    "stage1_latents": "refine (as --prompt says) or decode these: no image or camera is needed",
    "refiner_weights": "stage 2: small_world_refiner, a refiner folder, upstream's that holds one, "
    "or a hub name",
    "refiner_latents": "the refiner's noise (1, C, T - sink, h, w) in a .npy file",
    "save_latents": "write the final latents (1, C, T, h, w) to this .npy file",
    "save_frames": "write the decoded frames (F, H, W, 3) in [0, 1] to this .npy file",
}
_INTEGERS = {
    "num_frames": "upper bound, snapped to 8k+1",
    "height": "pixels",
    "width": "pixels",
    "step": "Euler steps",
    "seed": "of the initial noise",
    "text_length": "text tokens",
    "devices": "local devices that share the frames of stage 1 out",
}
_REFINE = {
    "refiner_block_size": "latent frames refined together; 0: all at once",
    "refiner_kv_max_frames": "latent frames that a block sees beside its own, the sink included",
    "sink_size": "leading latent frames that stay unrefined",
    "refiner_seed": "of the refiner's noise",
}
_FLOATS = {"fps": "frames a second", "cfg_scale": "guidance", "flow_shift": "of the schedule"}
for _name, _help in _TEXTS.items():
    flags.DEFINE_string(_name, None, _help)
for _name, _help in {**_INTEGERS, **_REFINE}.items():
    flags.DEFINE_integer(_name, None, _help)
for _name, _help in _FLOATS.items():
    flags.DEFINE_float(_name, None, _help)
flags.DEFINE_bool("no_refiner", False, "decode stage 1 without refining it")
flags.DEFINE_bool("latents_only", False, "stop at the latents: nothing is decoded")
flags.DEFINE_bool("allow_pickle", False, "read upstream's model.pt: its tensors, and no code")
flags.DEFINE_string("output_dir", "outputs", "folder of the video")
flags.DEFINE_string("name", "sample", "the video is NAME_generated.mp4")
flags.DEFINE_bool("no_action_overlay", False, "do not draw keys and path on the video")


def _option(name: str) -> Any:
    """The flag if given, else the configuration's value; empty counts as none."""
    value = flags.FLAGS[name].value
    if value is None:
        value = _CONFIG.value.get(name, None)
    return None if value == "" else value


def _refiner_weights() -> str | None:
    """Stage 2; by default the shipped one, if stage 1 is the default's too and not named."""
    refiner = _option("refiner_weights")
    is_default = refiner == SMALL_WORLD_REFINER and flags.FLAGS.refiner_weights is None
    is_named = flags.FLAGS.weights is not None or _option("weights") != SMALL_WORLD
    return None if flags.FLAGS.no_refiner or (is_default and is_named) else refiner


def run() -> Path:
    with lasting_imports():
        from sanawm_jax.runtime.compilation_cache import use_compilation_cache
        from sanawm_jax.runtime.compiler_flags import use_compiler_flags
        from sanawm_jax.sampling import command

    use_compiler_flags()
    use_compilation_cache()
    names = [*_TEXTS, *_INTEGERS, *_FLOATS, "latents_only", "output_dir", "name", "allow_pickle"]
    options = {name: _option(name) for name in names}
    if options["camera"] is not None and flags.FLAGS.action is None:
        options["action"] = None  # a path on the command line replaces the configuration's
    if flags.FLAGS.image is not None and flags.FLAGS.intrinsics is None:
        options["intrinsics"] = None  # another picture, another camera
    options["refiner_weights"] = _refiner_weights()
    refine = {name: _option(name) for name in _REFINE}
    options["refine_options"] = {k: v for k, v in refine.items() if v is not None}
    options["vae_tiling"] = _CONFIG.value.get("vae_tiling", "auto")
    return command.sample(**options, overlay=not flags.FLAGS.no_action_overlay)


def main(_: list[str]) -> None:
    from sanawm_jax.runtime.errors import InputError
    from sanawm_jax.runtime.failures import INTERRUPTED, explain

    show_notes()
    try:
        print(run())
    except InputError as error:
        fail(str(error))
    except (Exception, KeyboardInterrupt) as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
