"""Where the model runs: rank layout, ZeRO for the encoder, Megatron-core for the LLM, and what passes between them."""

from parallel import cpu_backend

cpu_backend.install()
