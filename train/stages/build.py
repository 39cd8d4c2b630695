"""The stage of a recipe."""

import torch

from parallel.layout import Layout
from train.build import Data
from train.config import Config
from train.stages import Stage
from train.stages.language import LanguageStage
from train.stages.vision import VisionStage


def build_stage(config: Config, layout: Layout, device: torch.device, data: Data) -> Stage:
    """Engines and division of `config.recipe` (collective over the world)."""
    kind = VisionStage if config.is_vision else LanguageStage
    return kind(config, layout, device, data)
