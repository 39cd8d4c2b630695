"""Where the model runs: rank layout, ZeRO for the encoder, Megatron-core for the LLM, and what passes between them."""

import warnings

from parallel import cpu_backend

cpu_backend.install()
# Megatron-core says at import, on every rank, which optional packages it does without.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
