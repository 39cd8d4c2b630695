"""What turns files and conversations into inputs: tokenizer, chat template and processors of an exported folder."""

import json
from typing import Any

from tandem.data.media.text import LAYOUT, Tokenizer
from tandem.data.media.turns import BOX_TAGS, IMAGE, ROLES, VIDEO
from tandem.data.vision import VisionSpec
from tandem.train.config.schema import Config
from tandem.train.export.settings import CODE

# A turn is its role's token, its text and the end token; placeholders are replaced by the processor.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in {begin} -%}"
    "{{- raise_exception('a role must be one of {roles_in_words}, not ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- {begin}[message['role']] -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '{image}' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '{video}' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '{eos}' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '{assistant}' -}}{%- endif -%}"
)


def chat_template(tokenizer: Tokenizer) -> str:
    """The tokenizer's own, or our format (`data.media.own_format`) in Jinja, as transformers renders it."""
    if tokenizer.template is not None:
        return tokenizer.template
    token = tokenizer.meaning
    words = {
        "{begin}": repr({role: token[role] for role in ROLES}),
        "{roles_in_words}": ", ".join(ROLES),
        "{image}": token["image"],
        "{video}": token["video"],
        "{eos}": token["end_of_turn"],
        "{assistant}": token["assistant"],
    }
    text = CHAT_TEMPLATE
    for name, word in words.items():
        text = text.replace(name, word)
    return text


def text_files(config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """Files of the tokenizer, and what generation needs of it."""
    tokens = {
        **tokenizer.named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.meaning["pad"],
        "eos_token": tokenizer.meaning["end_of_turn"],
        "padding_side": "left",
        "model_max_length": config.train.seq_length,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "do_sample": False}
    return {
        "tokenizer.json": tokenizer.to_json(),
        "tokenizer_config.json": as_json(tokens),
        "chat_template.jinja": chat_template(tokenizer),
        "generation_config.json": as_json(generation),
    }


def image_files(vision: VisionSpec) -> dict[str, str]:
    """Files of the image processor."""
    return {"preprocessor_config.json": as_json(_image_processor(vision))}


def processor_files(config: Config) -> dict[str, str]:
    """Files of the processor of images, videos and text."""
    source = next(iter(config.data.sources.values()), None)
    said = {
        "processor_class": "TandemProcessor",
        "auto_map": {"AutoProcessor": f"{CODE['processor']}.TandemProcessor"},
        "image_token": IMAGE,
        "video_token": VIDEO,
        "before": "".join(LAYOUT.before),
        "after": "".join(LAYOUT.after),
        "plain_tokens": list(BOX_TAGS),
        "fps": source.fps if source else 1.0,
        "video_budget": config.data.video.budget,
        "video_levels": list(config.data.video.levels),
    }
    return {**image_files(config.vision), "processor_config.json": as_json(said)}


def _image_processor(vision: VisionSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "TandemImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{CODE['processor']}.TandemImageProcessor"},
        "patch_size": vision.patch_size,
        "merge": vision.merge,
        "min_patches": vision.min_patches,
        "max_patches": vision.max_patches,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def as_json(said: dict[str, Any]) -> str:
    return json.dumps(said, indent=2) + "\n"
