"""Where the model runs: rank layout, ZeRO for the encoder, Megatron-core for the LLM, and what passes between them."""

import os
import warnings

from tandem.parallel.runtime import cpu_backend

# Megatron-core overlaps communication with computation by the order of launches, which one hardware queue keeps.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Images make no two steps alike: with segments of one size, freed memory would fit no later step.
if not any(key in os.environ for key in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
cpu_backend.install()
# Megatron-core says at import, on every rank, which optional packages it does without, and calls what newer torch
# renamed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
