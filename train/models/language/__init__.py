"""The LLM: its sizes, its layers for Megatron-core, what they keep for the backward."""
