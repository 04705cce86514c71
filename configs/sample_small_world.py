"""Sampling defaults of the small world, 49 frames of 128x128, refined: `python sample.py` alone."""

from pathlib import Path

import ml_collections

from configs import sample_sana_wm

_IMAGE = Path(__file__).parents[1] / "sanawm_jax/small_world/assets/small_world.png"


def get_config() -> ml_collections.ConfigDict:
    config = sample_sana_wm.get_config()
    config.weights = "small_world"
    config.refiner_weights = "small_world_refiner"  # of these weights alone, see `sample.py`
    config.image = str(_IMAGE)
    config.prompt = (
        "An outdoor scene with a green house, a teal house, a yellow house and a teal tree on "
        "cream marbled ground under a blue sky."
    )
    config.action = "w-16,wl-16,l-16"
    config.intrinsics = "84.71,84.71,64,64"
    config.num_frames = 49
    config.height = 128
    config.width = 128
    config.step = 20
    config.cfg_scale = 1.0
    config.text_length = 64
    config.dtype = "float32"
    return config
