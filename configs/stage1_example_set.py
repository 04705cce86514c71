"""The published chunk-causal fine-tuning on the published example set, with upstream's filters.

python train.py --config=configs/stage1_example_set.py --workdir=DIR --config.data_dir=RAW
    --config.data.latent_dir=LATENTS --config.init_weights=SANA-WM_bidirectional-diffusers

RAW is the folder of the raw zips and sidecars, sekai_game_train_961frames_16fps_ovl640. LATENTS is
the folder of the latent zips, LTX2VAE_diffusers_704x1280.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import stage1_chunk_causal


def get_config() -> ConfigDict:
    """Returns `stage1_chunk_causal` with upstream's filters, captions and number of repeats."""
    config = stage1_chunk_causal.get_config()
    config.data.format = "zip_latents"
    config.data.repeat = 16
    config.data.filters = (
        ("_vmafmotion", 0.5, 50.0),
        ("_unimatch", 3.0, 80.0),
        ("_dover", 0.25, 1.0),
        ("_vlm_entity_filter", 0.0, 10.0),
        ("_vlm_quality_filter", 0.5, 1.5),
    )
    config.data.captions = (("_LongSceneStaticCaption-Qwen3-VL-30B-A3B-Instruct", 100.0),)
    return config
