"""Eight virtual devices. Their number is fixed when jax starts: `pytest tests/multi_device`."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 8)
