"""First weights of every tower: each parameter is drawn from (seed, its name) alone, so that no layout matters."""

import zlib

import torch
from torch import nn


@torch.no_grad()
def initialize(tower: nn.Module, seed: int) -> None:
    """Matrices normal(0, fan_in ** -0.5), weights of norms one, other vectors zero.

    Everything under a module with `weights_are_loaded` is left as it is.
    """
    modules = dict(tower.named_modules())
    loaded = tuple(
        f"{place}." if place else ""
        for place, module in modules.items()
        if getattr(module, "weights_are_loaded", False)
    )
    for place, module in modules.items():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{own_name}" if place else own_name
            if name.startswith(loaded):
                continue
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            else:
                norm = isinstance(module, nn.LayerNorm | nn.RMSNorm) or name.endswith("norm.weight")
                parameter.fill_(1.0 if norm and own_name == "weight" else 0.0)
