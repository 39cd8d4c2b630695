"""Similarity of images and texts by a CLIP (Radford et al. 2021) in the layout of Hugging Face, for launch/curate.py.

The model is a local folder: config.json, *.safetensors, tokenizer files and preprocessor_config.json. Nothing is
downloaded, no code from the folder runs, no pickle is opened. Images are prepared here with Pillow by what
preprocessor_config.json says: shorter side to `size`, centre crop, mean and standard deviation.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tandem.data.curation.runners import worker_number
from tandem.train.models.pretrained.hugging_face import LOCAL, transformers_for

IMAGES_TOGETHER = 64
FILES = ("config.json", "preprocessor_config.json")


def check_clip_folder(folder: str | Path) -> None:
    """Raises ValueError where `folder` cannot be the folder of a CLIP, or `transformers` is missing."""
    folder = Path(folder)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError("--clip needs transformers, which is not installed: pip install 'tandem[hf]'") from error
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"--clip {folder} has no {name}; it must be a local folder of a Hugging Face CLIP")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"--clip {folder} has no .safetensors file; other weight files are not read")
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"--clip {folder} holds a model of type {kind!r}; it must be 'clip'")
    Preprocessing(folder)


class Preprocessing:
    """Pixels to what the vision model expects, kept as uint8 until a batch is formed. Raises ValueError."""

    def __init__(self, folder: Path):
        path = folder / "preprocessor_config.json"
        config = _read_json(path)
        try:
            self.shorter, self.resized = _sizes(config.get("size", {"shortest_edge": 224}))
            crop = (
                config.get("crop_size", {"height": 224, "width": 224}) if config.get("do_center_crop", True) else None
            )
            self.crop = (crop, crop) if isinstance(crop, int) else crop and (int(crop["height"]), int(crop["width"]))
            self.resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
            self.scale = float(config.get("rescale_factor", 1 / 255))
            self.mean, self.std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not that of a CLIP: {type(error).__name__} {error}") from error
        if self.crop is None and self.resized is None:
            raise ValueError(f"{path} neither crops nor fixes both sides, so images would differ in size")

    def prepare(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] of the model's size."""
        image = Image.fromarray(pixels_HW3)
        width, height = image.size
        if self.shorter is not None:
            short = min(width, height)
            width, height = int(width * self.shorter / short), int(height * self.shorter / short)
        elif self.resized is not None:
            height, width = self.resized
        image = image.resize((width, height), self.resample)
        if self.crop is not None:
            crop_h, crop_w = self.crop
            left, top = (width - crop_w) // 2, (height - crop_h) // 2
            image = image.crop((left, top, left + crop_w, top + crop_h))  # black where the image is smaller
        return np.asarray(image)

    def pixel_values(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [I, 3, height, width], normalised."""
        pixels_IHW3 = torch.from_numpy(np.stack(images))
        return (pixels_IHW3.permute(0, 3, 1, 2).float() * self.scale - self.mean) / self.std


class ClipSimilarity:
    """A scorer for data.curation.pipeline. On one GPU of the machine where there are any, else on one CPU core."""

    def __init__(self, folder: str | Path):
        check_clip_folder(folder)
        transformers = transformers_for(f"--clip {folder}")
        self._preprocessing = Preprocessing(Path(folder))
        self.prepare = self._preprocessing.prepare
        gpus = torch.cuda.device_count()
        self._device = torch.device("cuda", worker_number() % gpus) if gpus else torch.device("cpu")
        torch.set_num_threads(1)  # workers share the cores, and sums do not depend on how many there are
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **LOCAL)
            settings = {"use_safetensors": True, "dtype": torch.float32}
            model = transformers.CLIPModel.from_pretrained(str(folder), **settings, **LOCAL)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the CLIP in {folder} cannot be loaded: {error}") from error
        self._model = model.eval().to(self._device)
        self._longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def best_match(self, images: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> list[float]:
        """See data.curation.pipeline.Scorer. A text longer than the model's window is cut there."""
        encoding_rank_I = [sample for sample, prepared in enumerate(images) for _ in prepared]
        flat = [image for prepared in images for image in prepared]
        best = [-1.0] * len(texts)
        for first in range(0, len(flat), IMAGES_TOGETHER):
            chunk = slice(first, first + IMAGES_TOGETHER)
            cosines = self._cosines(flat[chunk], [texts[sample] for sample in encoding_rank_I[chunk]])
            for sample, cosine in zip(encoding_rank_I[chunk], cosines, strict=True):
                best[sample] = max(best[sample], cosine)
        return best

    def _cosines(self, images: list[np.ndarray], texts: list[str]) -> list[float]:
        """Of each image with the text beside it."""
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        pixels = self._preprocessing.pixel_values(images).to(self._device)
        inputs = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
        outputs = self._model(pixel_values=pixels, **inputs)
        return torch.nn.functional.cosine_similarity(outputs.image_embeds, outputs.text_embeds).tolist()


def _sizes(size: int | dict) -> tuple[int | None, tuple[int, int] | None]:
    """(pixels of the shorter side, None) or (None, (height, width))."""
    if isinstance(size, int):
        return size, None
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), None
    return None, (int(size["height"]), int(size["width"]))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content
