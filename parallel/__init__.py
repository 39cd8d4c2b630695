"""Where the model runs: rank layout, ZeRO for the encoder, Megatron-core for the LLM, and what passes between them."""

import os
import warnings

from parallel import cpu_backend

# Megatron-core overlaps communication with computation by the order of launches, which one hardware queue keeps.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
cpu_backend.install()
# Megatron-core says at import, on every rank, which optional packages it does without, and calls what newer torch
# renamed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
