"""An encoder of ours as a vision model of transformers: its files, and its tensors one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tandem.train.families.encoders import of_model
from tandem.train.families.folder import by_their_names, shapes, theirs
from tandem.train.models.encoders.vit import ViTConfig


@dataclass(frozen=True)
class VisionModel:
    """What a folder will hold.

    architecture: the class that opens it.  files: JSON by file name.  shapes: of tensors, by their names.  read: one of
    them, fp32 on the CPU.  filled: tensors that the class has and our encoder lacks, which no feature of a patch
    depends on: ones for weights of norms, zeros else.
    """

    architecture: str
    files: dict[str, dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    filled: tuple[str, ...]


def vision_model(config: ViTConfig, dtype: str, read: Callable[..., torch.Tensor]) -> VisionModel:
    """dtype: as config.json has it.  read: a box of a tensor of ours, as `train.checkpoints.checkpoint.Reader.read`.

    Raises ValueError where no class of transformers is this encoder.
    """
    family = of_model(config)
    table, fills = list(family.tensors(config)), family.fills(config)
    own, parts = shapes(table), by_their_names(table)

    def tensor(name: str) -> torch.Tensor:
        if name in fills:
            return torch.full(*fills[name])
        return theirs(parts[name], own[name], lambda ours, *box: read(f"encoder.{ours}", *box))

    pixels = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    pixels |= {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    files = {
        "config.json": family.config(config, dtype),
        "preprocessor_config.json": {**family.preprocessor(config), **pixels},
    }
    whole = own | {name: shape for name, (shape, _) in fills.items()}
    return VisionModel(family.architecture, files, whole, tensor, tuple(fills))
