"""The tower of each of the encoder's own stages, with its first weights, on the CPU."""

from torch import nn

from train.config import Config
from train.models.contrastive import ContrastiveTower
from train.models.hf_text import text_folder
from train.models.initial import initialize
from train.models.masked import MimTower
from train.models.omni import OmniTower
from train.models.teacher import check_teacher


def check_folders(config: Config) -> None:
    """ValueError, one sentence, where the folder of a teacher or text encoder cannot serve; reads no weights."""
    if config.recipe == "vit_mim":
        check_teacher(config.objective.teacher)
    elif config.is_vision and config.model.text.folder:
        text_folder(config.model.text)


def build_tower(config: Config, teacher_width: int = 1) -> nn.Module:
    """The tower of `config.recipe`; teacher_width: channels of what vit_mim's predicts."""
    model, objective, recompute = config.model, config.objective, config.parallel.encoder.recompute
    if config.recipe == "vit_mim":
        tower = MimTower(model.encoder, objective.mim, teacher_width, recompute)
    else:
        sizes = {"width": model.embedding, "recompute": recompute}
        if config.recipe == "vit_contrastive":
            tower = ContrastiveTower(model.encoder, model.text, objective.contrastive, **sizes)
        else:
            tower = OmniTower(model.encoder, model.text, objective.omni, **sizes)
    initialize(tower, config.train.seed)
    return tower
