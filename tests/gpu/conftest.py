"""Tests of what only a CUDA device has: kernels in bf16, and that what was made for it agrees with what runs anywhere.

    pytest --confcutdir=tests/gpu tests/gpu

keeps pytest from tests/conftest.py, which hides GPUs from all other tests.  Without a device nothing here is collected.
"""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
