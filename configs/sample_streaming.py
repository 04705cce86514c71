"""Sampling defaults of the released streaming model, 704x1280, chunk by chunk.

    python sample.py --streaming --weights DIR --refiner_weights DIR --image IMAGE --prompt TEXT \
        --action "w-80,dw-80,w-80"
"""

import ml_collections

from configs import sample_sana_wm


def get_config() -> ml_collections.ConfigDict:
    config = sample_sana_wm.get_config()
    config.weights = "Efficient-Large-Model/SANA-WM_streaming"
    config.num_frames = 241
    config.cfg_scale = 1.0  # the distilled model samples without guidance
    return config
