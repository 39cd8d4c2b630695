"""First weights of every tower: each parameter is drawn from (seed, its name) alone, so that no layout matters."""

import zlib

import torch
from torch import nn


@torch.no_grad()
def initialize(tower: nn.Module, seed: int) -> None:
    """Matrices normal(0, fan_in ** -0.5), weights of norms one, other vectors zero.

    A module may say otherwise: `initial_values` gives numbers for its own parameters by name, and everything under a
    module with `weights_are_loaded` is left as it is.
    """
    modules = dict(tower.named_modules())
    loaded = tuple(
        f"{place}." if place else ""
        for place, module in modules.items()
        if getattr(module, "weights_are_loaded", False)
    )
    for place, module in modules.items():
        values = getattr(module, "initial_values", {})
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{own_name}" if place else own_name
            if name.startswith(loaded):
                continue
            if own_name in values:
                parameter.fill_(values[own_name])
            elif parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
