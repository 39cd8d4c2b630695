"""Models of Hugging Face transformers from a local folder: safetensors only, nothing fetched, no foreign code.

A pickle can run code when it is read, and `trust_remote_code` runs what the folder holds; neither is ever done.  For
some families transformers asks the hub while it reads config.json, whatever `local_files_only` says; so config.json is
judged as plain JSON before transformers sees it, and the hub's client is told that there is no network.  Every way in
which a folder cannot serve is a ValueError of one sentence that begins with what the caller calls it.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

LOCAL = {"local_files_only": True, "trust_remote_code": False}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
OUTSIDE = ("backbone", "attn_implementation", "_attn_implementation", "checkpoint_path")  # may name what is elsewhere


def transformers_for(what: str) -> ModuleType:
    """The library, for the setting `what`; the hub is out of reach from then on, where nobody imported it before."""
    os.environ.update(OFFLINE)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{what}: needs Hugging Face transformers: pip install 'tandem[hf]'") from error
    return transformers


def weight_names(folder: Path, what: str) -> set[str]:
    """Names of the tensors in a folder's safetensors files, as they are written there."""
    if not folder.is_dir():
        raise ValueError(f"{what}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: has no config.json, which save_pretrained writes beside the weights")
    files = [*folder.glob("model*.safetensors")]
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{what}: has its weights only as a pickle ({pickles[0]}), which can run code when it is read; "
                "save the model again as safetensors"
            )
        raise ValueError(f"{what}: has no model.safetensors")
    names: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{what}: {path.name} cannot be read: {first_line(error)}") from error
    return names


def read_config(folder: Path, what: str, served: tuple[str, ...]):
    """The folder's configuration as transformers understands it; served: the model types that the caller can use."""
    _check_config(folder, what, served)
    transformers = transformers_for(what)
    try:
        with _quiet():
            return transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # errors of the hub's HTTP libraries have no common base
        raise ValueError(f"{what}: config.json cannot be used by transformers: {first_line(error)}") from error


def _check_config(folder: Path, what: str, served: tuple[str, ...]) -> None:
    """Holds config.json, as it is written, against what is served and what can lead out of the folder."""
    try:
        said = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{what}: config.json cannot be read: {first_line(error)}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{what}: config.json is not an object of keys and values")
    model_type = said.get("model_type", "timm_wrapper" if "pretrained_cfg" in said else None)
    if model_type not in served:
        raise ValueError(f"{what}: model_type={model_type!r} in config.json: must be one of {', '.join(served)}")
    if leading := sorted(_keys(said) & set(OUTSIDE)):
        raise ValueError(f"{what}: {leading[0]} in config.json can name what is not in the folder, and is not followed")
    if ":" in str(said.get("architecture", "")):
        raise ValueError(
            f"{what}: architecture={said['architecture']!r} in config.json: must be a name of timm's own without a "
            "colon, nothing is fetched"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{what}: holds an adapter (adapter_config.json); merge it into its model and save that")


def _keys(said) -> set[str]:
    """Of all objects in JSON, at any depth."""
    if isinstance(said, dict):
        return set(said).union(*map(_keys, said.values()))
    return set().union(*map(_keys, said)) if isinstance(said, list) else set()


def load(model_class: Any, folder: Path, what: str, *, unused: tuple[str, ...] = (), **settings) -> nn.Module:
    """The model with the folder's weights on the CPU; settings go to its configuration, or are `dtype`.

    unused: substrings of names of weights that nobody will use, which the folder may lack.  What else it lacks
    transformers would draw at random: that is refused.
    """
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **LOCAL, **settings
            )
    except Exception as error:  # as in read_config
        why = first_line(error)
        if "mismatch" in str(error):  # the first line does not say so, or refers to a report that was printed
            why = "its weights are of other sizes than config.json says"
        raise ValueError(f"{what}: cannot be loaded as {model_class.__name__}: {why}") from error
    missing = sorted(name for name in info["missing_keys"] if not any(part in name for part in unused))
    if missing:
        raise ValueError(
            f"{what}: has no weights for {len(missing)} tensors of {model_class.__name__}: {missing[0]} ..."
        )
    return model


def single_number(value, what: str, key: str) -> int:
    """A size that may be written once or as an equal pair."""
    sizes = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sizes) != 1 or not isinstance(number := sizes.pop(), int) or number < 1:
        raise ValueError(
            f"{what}: {key}={value} in config.json: must be one number, square images and patches are wanted"
        )
    return number


def normalisation(folder: Path, model_type: str, what: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels from 0 to 1: the folder's own, else those of the model's family.

    Raises ValueError for a folder whose pixels are not from 0 to 1, or not normalised.
    """
    for file in PREPROCESSORS:
        if (folder / file).is_file():
            try:
                said = json.loads((folder / file).read_text())
                said = said.get("image_processor", said)
                for key in ("do_rescale", "do_normalize"):
                    if said.get(key) is False:
                        raise ValueError(f"{key}=false is not supported")
                if abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
                    raise ValueError(f"rescale_factor={said['rescale_factor']} is not supported, only 1/255")
                if "image_mean" in said and "image_std" in said:
                    mean, std = (tuple(float(x) for x in said[key]) for key in ("image_mean", "image_std"))
                    if len(mean) == len(std) == 3 and min(std) > 0:
                        return mean, std
                    raise ValueError("image_mean and image_std must be three numbers each, deviations above 0")
            except (ValueError, TypeError, AttributeError, OSError) as error:
                raise ValueError(f"{what}: {file} cannot be used: {error}") from error
    if ("clip" in model_type and "siglip" not in model_type) or model_type.startswith("qwen"):
        return CLIP_MEAN, CLIP_STD
    return (IMAGENET_MEAN, IMAGENET_STD) if model_type.startswith("dino") else (HALF, HALF)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of weights it did not use, and its progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error says, for a sentence of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
