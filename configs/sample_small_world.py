"""Sampling defaults of `python sample.py`: 49 frames of 128x128 of the small world, refined."""

import ml_collections

from configs import sample_sana_wm
from sanawm_jax.runtime.shipped import ASSETS, SMALL_WORLD, SMALL_WORLD_REFINER


def get_config() -> ml_collections.ConfigDict:
    config = sample_sana_wm.get_config()
    config.weights = SMALL_WORLD
    config.refiner_weights = SMALL_WORLD_REFINER  # not used with other weights
    config.image = str(ASSETS / "small_world.png")
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
