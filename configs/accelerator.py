"""Minutes on one GPU: images in its memory, and a schedule that fits the time.

    python train.py --config configs/accelerator.py --config.data.path=PHOTOS \
        --config.minutes=12

PHOTOS is a tar file of images; for several files, repeat --config.data.path. The phases
take about 35 %, 50 % and 15 % of the time if the VGG makes a step twice as long: first
the pixel terms alone, then the whole loss, then the same with the encoder's batch
normalization frozen. tools/release.py does the same, and survives failures.
"""

from ml_collections import ConfigDict

from pconv_jax.runs.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.image_size = 256
    config.batch_size = 32
    config.steps_per_call = 8
    config.model.depth = 7
    config.model.dtype = "bfloat16"
    config.data.source = "tar"
    config.data.validation_fraction = 0.02
    config.data.cache = "device"
    config.data.color_jitter = 0.1
    config.masks.kind = "ragged"
    config.masks.thin = 0.25
    config.masks.wide = 0.15
    config.masks.pool = 8192
    config.loss.log_mse = 0.05
    config.feature_fraction = 0.5
    config.average_decay = 0.999
    config.minutes = 12.0
    config.clip_norm = 1.0
    # With minutes, only the proportions of these numbers count.
    for phase, steps in (("pixels", 12_000), ("phase1", 8_400), ("phase2", 2_600)):
        config[phase].steps = steps
        config[phase].learning_rate = 1e-4 if phase == "phase2" else 5e-4
        config[phase].warmup_steps = steps // 30
        config[phase].schedule = "cosine"
    config.phase1.ramp_steps = 1_000
    config.export.minutes = 1.0
    config.log_every = 80
    # Compiling them takes minutes. Evaluate the weights afterwards.
    config.picture_every = config.validate_every = 0
    config.checkpoint_every = 8_000
    config.keep_checkpoints = 1
    return config
