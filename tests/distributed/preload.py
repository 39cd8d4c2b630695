"""What the fork server imports once per pytest session, so that each rank starts with it already in memory.

Importing only: no tensor arithmetic and no process group may happen here, because threads do not survive a fork.
Where CUDA is present only torch is preloaded: a forked process cannot use a CUDA context of its parent.
"""

import gc
import importlib
import os
import warnings

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether CUDA is there must not create a context

import torch

MODULES = (
    "pytest",
    "torch._dynamo",  # imported by every torch optimizer
    "tandem.parallel.engines.encoder_engine",  # before anything else of deepspeed: it chooses the accelerator
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by every deepspeed.initialize, and slow
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
)

if not torch.cuda.is_available():
    from tandem.parallel.runtime import cpu_backend

    cpu_backend.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES:
            importlib.import_module(module)

gc.freeze()  # ranks share these pages; a collection would copy them
