"""The text tower of a CLIP or SigLIP model of Hugging Face transformers, with the interface of our `TextEncoder`.

What such a model expects is put around our packed texts:

    CLIP     <start> t t t <end>                   pooled at <end>; causal, so that what pads the batch is not seen
    SigLIP   t t t <end> pad pad ... (full length) pooled at the last place, pads are seen; no mask, as it was trained

The last token of every text, the tokenizer's <eos>, is replaced by the model's own <end>.  All other ids must mean to
the run's tokenizer what they mean to the model: `data.tokenizer` must be the folder's tokenizer.json with this
framework's special tokens added, and the folder's embedding enlarged to it (resize_token_embeddings, save_pretrained).

Legend: T tokens of B texts, J tokens of the longest as the model sees it, D width of the model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tandem.parallel.comm.transfer import host_to_device
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig, TextEncoder, last_of_each
from tandem.train.models.pretrained.hugging_face import (
    LOCAL,
    first_line,
    load,
    read_config,
    transformers_for,
    weight_names,
)

SERVED = ("clip", "clip_text_model", "siglip", "siglip_text_model")


@dataclass(frozen=True)
class TextFolder:
    """What a folder says of its model, its weights aside.  start, end, pad: ids, start None where there is none."""

    folder: Path
    what: str
    whole: Any
    family: str
    names: set[str]
    start: int | None
    end: int
    pad: int
    places: int


def text_folder(config: TextConfig) -> TextFolder:
    """Reads `config.folder` but for its weights.  Raises ValueError, one sentence, where it cannot serve."""
    assert config.folder is not None, "asked for where a folder is named"
    folder, what = Path(config.folder), f"model.text.folder={config.folder}"
    names = weight_names(folder, what)
    whole = read_config(folder, what, SERVED)
    family = whole.model_type.removesuffix("_text_model")
    text = getattr(whole, "text_config", whole)
    start, end, pad = _special_ids(folder, text, family, what)
    places = text.max_position_embeddings
    _check_sizes(config, text.vocab_size, places - (start is not None), what)
    return TextFolder(folder, what, whole, family, names, start, end, pad, places)


class HuggingFaceText(nn.Module):
    """Text tower with the folder's weights; width is that of its embeddings, after its projection where it has one."""

    weights_are_loaded = True

    def __init__(self, config: TextConfig):
        super().__init__()
        found = text_folder(config)
        self._start, self._end, self._pad = found.start, found.end, found.pad
        self._places, self._full_length = found.places, found.family == "siglip"
        self.model, self.projection = _load_text(found)
        text = getattr(found.whole, "text_config", found.whole)
        self.width = self.projection.out_features if isinstance(self.projection, nn.Linear) else text.hidden_size

    def forward(self, texts: PackedTexts, recompute: str = "none") -> torch.Tensor:
        """Hidden states [T, D]; a text's last row is that of the place where the model pools.

        recompute: anything but "none" runs the whole tower again in the backward.
        """
        ids_BJ, place_T = self._padded(texts)
        if recompute != "none" and torch.is_grad_enabled():
            return checkpoint(self._hidden, ids_BJ, place_T, use_reentrant=False)
        return self._hidden(ids_BJ, place_T)

    def pool(self, features_TD: torch.Tensor, texts: PackedTexts) -> torch.Tensor:
        """[B, width]: the model's embedding of each text, not normalised."""
        return self.projection(last_of_each(features_TD, texts.segments))

    def _hidden(self, ids_BJ, place_T):
        return self.model(input_ids=ids_BJ).last_hidden_state.flatten(0, 1).index_select(0, place_T)

    def _padded(self, texts: PackedTexts) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [B, J], where each packed token stands in them, counted over all texts); places are made on the host."""
        lengths_B = np.array(texts.segments.q_lengths_N)
        starts = int(self._start is not None)
        longest = self._places if self._full_length else int(lengths_B.max()) + starts
        text_T, last_B = np.repeat(np.arange(len(lengths_B)), lengths_B), np.cumsum(lengths_B) - 1
        place_T = text_T * longest + starts + np.arange(len(text_T)) - (last_B - lengths_B + 1)[text_T]
        ends_B = place_T[last_B]
        device = texts.tokens_T.device
        ids = torch.full((len(lengths_B) * longest,), self._pad, dtype=torch.int64, device=device)
        ids.index_copy_(0, host_to_device(place_T, device), texts.tokens_T)
        ids.index_fill_(0, host_to_device(ends_B, device), self._end)
        if self._start is not None:
            ids[::longest] = self._start
        if self._full_length:
            place_T = place_T.copy()
            place_T[last_B] = (np.arange(len(lengths_B)) + 1) * longest - 1
        return ids.unflatten(0, (-1, longest)), host_to_device(place_T, device)


def _special_ids(folder: Path, text, family: str, what: str) -> tuple[int | None, int, int]:
    """(start or None, end, pad): of the folder's tokenizer where it has one, for old CLIP configurations are wrong."""
    source = text
    if (folder / "tokenizer_config.json").is_file():
        try:
            source = transformers_for(what).AutoTokenizer.from_pretrained(folder, **LOCAL)
        except Exception as error:  # as in read_config
            raise ValueError(f"{what}: its tokenizer cannot be read: {first_line(error)}") from error
    ids: dict[str, Any] = {key: getattr(source, f"{key}_token_id", None) for key in ("bos", "eos", "pad")}
    end = ids["eos"]
    wanted = {"eos": end, **({"bos": ids["bos"]} if family == "clip" else {"pad": ids["pad"]})}
    for key, value in wanted.items():
        if not isinstance(value, int) or not 0 <= value < text.vocab_size:
            raise ValueError(f"{what}: {key}_token_id={value} is none of its {text.vocab_size} tokens")
    return (ids["bos"], end, end) if family == "clip" else (None, end, ids["pad"])


def _check_sizes(config: TextConfig, words: int, places: int, what: str) -> None:
    if config.vocab_size > words:
        raise ValueError(
            f"{what}: has {words} tokens, fewer than model.text.vocab_size={config.vocab_size}: its embedding must "
            "hold all tokens of data.tokenizer"
        )
    if config.max_tokens > places:
        raise ValueError(
            f"{what}: has places for {places} tokens, fewer than model.text.max_tokens={config.max_tokens}"
        )


def _load_text(found: TextFolder) -> tuple[Any, Any]:
    """(model up to its last norm, projection), fp32, without dropout."""
    folder, whole, family, names, what = found.folder, found.whole, found.family, found.names, found.what
    transformers = transformers_for(what)
    settings: dict[str, Any] = {"dtype": torch.float32, "attention_dropout": 0.0}
    if family == "clip" and not any(name.endswith("text_projection.weight") for name in names):
        return load(transformers.CLIPTextModel, folder, what, **settings), nn.Identity()
    if family == "clip":
        settings["projection_dim"] = whole.projection_dim  # what its text part says of it is not used and may be wrong
        model: Any = load(transformers.CLIPTextModelWithProjection, folder, what, **settings)
        return model.text_model, model.text_projection
    model = load(transformers.SiglipTextModel, folder, what, **settings)
    inner = getattr(model, "text_model", model)
    projection, inner.head = inner.head, nn.Identity()  # else it would run once more, on what nobody uses
    return inner, projection


def build_text_encoder(config: TextConfig) -> nn.Module:
    """Our text encoder, uninitialised, or the one in config.folder with its weights; both have `width` and `pool`.

    Raises ValueError, naming the key, for a folder that cannot serve.
    """
    return TextEncoder(config) if config.folder is None else HuggingFaceText(config)
