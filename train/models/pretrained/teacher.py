"""The teacher of masked image modelling: features of every patch of every image, frozen, without autograd.

Two kinds, told apart by what lies at the path:

    a folder of Hugging Face transformers   a ViT of fixed resolution, see `hf_vision.py`: each image is resized to its
                                            square (bilinear, antialiased), and its g x g features are interpolated to
                                            the student's grid (bilinear, align_corners=False)
    a run or checkpoint of this framework   its encoder, on the native grid: the student's own

Either way features come in the order of the student's patches, block by block.

Legend: N patches of I images, C teacher width, D width of our encoder, g teacher's patches a side.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tandem.data.vision import VisionSpec
from tandem.parallel.engines.state import EMA
from tandem.train.checkpoints import checkpoint
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.pretrained.hf_vision import HuggingFaceTeacher, check_folder


class Teacher(Protocol):
    """width: channels of its features."""

    width: int

    def features(self, images: PackedImages, grid_hw_I2: np.ndarray) -> torch.Tensor:
        """fp32 [N, C], on the device of the images; grid_hw_I2: patches of each image down and across, on the host."""


def check_teacher(path: str | Path, vision: VisionSpec) -> None:
    """Raises ValueError, one sentence, where `load_teacher` would for want of files; reads no weights."""
    path, what = Path(path), f"objective.teacher={path}"
    if not path.exists():
        raise ValueError(f"{what}: there is no such folder")
    try:
        step = checkpoint.resolve(path)
    except ValueError:
        check_folder(path, what)
    else:
        _encoder_config(step, what, vision)


def load_teacher(path: str | Path, device: torch.device, dtype: torch.dtype, vision: VisionSpec) -> Teacher:
    """The teacher at `path` on `device`, in weights of `dtype`; vision: the student's.

    Raises ValueError, one sentence, for a path that holds no teacher.
    """
    path, what = Path(path), f"objective.teacher={path}"
    if not path.exists():
        raise ValueError(f"{what}: there is no such folder")
    try:
        step = checkpoint.resolve(path)
    except ValueError:
        return HuggingFaceTeacher(path, what, device, dtype, vision)
    return OwnTeacher(step, what, device, dtype, vision)


class OwnTeacher:
    """The encoder of a checkpoint of ours, on the student's own patches."""

    def __init__(self, step: Path, what: str, device: torch.device, dtype: torch.dtype, vision: VisionSpec):
        config = _encoder_config(step, what, vision)
        with torch.device("meta"):
            self._encoder = SeedViT(config)
        self._encoder.load_state_dict(_weights(step, self._encoder, what), assign=True)
        self._encoder.to(device, dtype).requires_grad_(False)
        self.width = config.width

    @torch.no_grad()
    def features(self, images: PackedImages, grid_hw_I2: np.ndarray) -> torch.Tensor:
        x_ND = self._encoder.embed(images.patches_NP)
        return self._encoder.trunk(x_ND, *self._encoder.rotary(images.positions_N2), images.segments).float()


def _weights(step: Path, encoder: SeedViT, what: str) -> dict[str, torch.Tensor]:
    """The encoder's weights in a checkpoint; their running mean where the run kept one."""
    found = {}
    try:
        reader = checkpoint.Reader(step)
        for name, parameter in encoder.named_parameters():
            kinds = reader.tensors.get(f"encoder.{name}", {"kinds": ()})["kinds"]
            begin, shape = (0,) * parameter.dim(), tuple(parameter.shape)
            found[name] = reader.read(f"encoder.{name}", EMA if EMA in kinds else "param", begin, shape)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return found


def _encoder_config(step: Path, what: str, vision: VisionSpec) -> ViTConfig:
    """Sizes of a checkpoint's encoder, from the run it lies in; its patches must be the student's."""
    folders = [step, step.parent, step.parent.parent]
    saved = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    if saved is None:
        raise ValueError(f"{what}: the config.yaml of the run that wrote {step.name} is needed beside its checkpoints")
    try:
        encoder: Any = OmegaConf.to_container(OmegaConf.load(saved).model.encoder)
        config = ViTConfig(**encoder)
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{what}: {saved} has no usable model.encoder: {str(error).splitlines()[0]}") from error
    if not config.plain:
        raise ValueError(f"{what}: its encoder has learned positions or windows, which no teacher of ours may have")
    if config.patch_size != vision.patch_size:
        raise ValueError(
            f"{what}: its patches are of {config.patch_size} pixels a side, those of model.encoder.patch_size="
            f"{vision.patch_size}; a teacher of ours looks at the student's own patches"
        )
    return config
