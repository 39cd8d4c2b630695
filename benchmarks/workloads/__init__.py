"""Two pieces of work on which speed and memory are measured, with random data and nothing else of a run.

`tower`: a pack of images through the encoder, its backward, and fused AdamW.  `language`: rows of tokens through a few
of the LLM's layers and back.
"""
