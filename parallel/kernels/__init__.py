"""Kernels of one rank: attention and its backends, experts, cross-entropy, compiled regions, recomputation."""
