"""A checkpoint as a folder that transformers opens: the whole model, its language model or its encoder alone.

all       the whole model's own class where one holds all three parts; else our modeling, configuration and processing
          files beside the weights, the language model being its family's
llm       the family's own class; no code of ours
encoder   the encoder with its image processor: its family's own class where it has one, else our code
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tandem.data.media.text import Tokenizer
from tandem.train import families
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.config.architecture import check_architecture
from tandem.train.config.schema import Config
from tandem.train.export import inputs, settings, weights
from tandem.train.export.card import model_card
from tandem.train.export.weights import Weights
from tandem.train.families import connectors, encoders
from tandem.train.families.base import Family
from tandem.train.families.connectors.base import ConnectorFamily
from tandem.train.families.encoders.base import EncoderFamily
from tandem.train.models.connectors import between

MODULES = {"all": ("encoder", "adapter", "llm"), "llm": ("llm",), "encoder": ("encoder",)}
REMOTE = Path(__file__).with_name("remote")


@dataclass(frozen=True)
class Content:
    """What a folder will hold.  texts: files by name.  what: the model in words."""

    weights: Weights
    texts: dict[str, str]
    what: str


def content(reader: Reader, config: Config, part: str, dtype: str) -> Content:
    """The folder of a part of a run: all, llm or encoder; dtype: fp32 or bf16.

    Raises ValueError, before anything is written, for what the folder could not hold.
    """
    if missing := [name for name in MODULES[part] if name not in reader.modules]:
        raise ValueError(f"--part {part}: checkpoint {reader.path} of task={config.task} has no {', '.join(missing)}")
    check_architecture(config, reader.state.architecture, MODULES[part], reader.path)
    if part == "encoder":
        what, held, texts = _encoder(reader, config, dtype)
    else:
        what, held, texts = (_language if part == "llm" else _whole)(reader, config, dtype)
    return Content(held, {"README.md": model_card(config, reader.path, reader.state, part)} | texts, what)


def _language(reader: Reader, config: Config, dtype: str) -> tuple[str, Weights, dict[str, str]]:
    # Of a text alone the three positions of M-RoPE are equal.
    model = replace(config.model.llm, mrope_sections=None, mrope_interleaved=False)
    family = families.of_model(model)
    texts = {"config.json": inputs.as_json(family.config(model, settings.DTYPES[dtype]))}
    texts |= inputs.text_files(config, _tokenizer(config))
    return f"a {family.architecture}", weights.of_family(reader, family, model), texts


def _encoder(reader: Reader, config: Config, dtype: str) -> tuple[str, Weights, dict[str, str]]:
    model = config.model
    if (family := encoders.of_model(model.encoder)) is not None:
        return _encoder_of_family(reader, config, family, dtype)
    texts = {"config.json": inputs.as_json(settings.encoder_alone(model.encoder, model.connector, dtype))}
    texts |= inputs.image_files(config.vision) | _sources()
    return "an encoder", weights.of_modules(reader, {"encoder"}), texts


def _encoder_of_family(
    reader: Reader, config: Config, family: EncoderFamily, dtype: str
) -> tuple[str, Weights, dict[str, str]]:
    encoder = config.model.encoder
    held = weights.of_family(reader, family, encoder, part="encoder")
    what, fills = f"a {family.architecture}", family.fills(encoder)
    if fills:
        held |= weights.constant(fills)
        what += f", with {', '.join(fills)} of ones and zeros, which the encoder has not"
    texts = {
        "config.json": inputs.as_json(family.config(encoder, settings.DTYPES[dtype])),
        "preprocessor_config.json": inputs.as_json(family.preprocessor(encoder)),
        "README.md": model_card(config, reader.path, reader.state, "encoder", family.call),
    }
    return what, held, texts


def _whole(reader: Reader, config: Config, dtype: str) -> tuple[str, Weights, dict[str, str]]:
    model = config.model
    family, tokenizer = families.of_model(model.llm), _tokenizer(config)
    encoder, connector = encoders.of_model(model.encoder), connectors.of_model(model.connector)
    if encoder and connector and connector.architecture == family.architecture:
        return _whole_of_family(reader, config, tokenizer, family, encoder, connector, dtype)
    if not tokenizer.is_ours:
        raise ValueError(
            f"--part all: data.tokenizer={config.data.tokenizer} has a chat template or special tokens of its own, "
            "and the exported processor does not write them; --part llm exports the language model with them"
        )
    held = weights.of_modules(reader, {"encoder", "adapter"})
    held |= weights.of_family(reader, family, model.llm, prefix="language_model.")
    texts = {"config.json": inputs.as_json(settings.whole(model, family, dtype, tokenizer.image_id))}
    texts |= inputs.text_files(config, tokenizer) | inputs.processor_files(config) | _sources()
    return f"a vision encoder and a {family.architecture}", held, texts


def _whole_of_family(
    reader: Reader,
    config: Config,
    tokenizer: Tokenizer,
    language: Family,
    encoder: EncoderFamily,
    connector: ConnectorFamily,
    dtype: str,
) -> tuple[str, Weights, dict[str, str]]:
    model, name = config.model, settings.DTYPES[dtype]
    _, sizes, _ = between(model.encoder, model.connector, model.llm.width)
    visual, joined = encoder.prefixes[0], connector.prefixes[0]
    held = weights.of_family(reader, language, model.llm)
    held |= weights.of_family(reader, encoder, model.encoder, part="encoder", prefix=visual)
    held |= weights.of_family(reader, connector, sizes, part="adapter", prefix=joined)
    text = language.config(model.llm, name)
    said = {
        "architectures": [language.architecture],
        "model_type": language.model_type,
        "dtype": name,
        "tie_word_embeddings": text.pop("tie_word_embeddings"),
        "text_config": text,
        "vision_config": encoder.config(model.encoder, name) | connector.fields(model.connector, sizes),
        "image_token_id": tokenizer.image_id,
        "vision_start_token_id": tokenizer.before_ids[0],
        "vision_end_token_id": tokenizer.after_ids[-1],
    }
    texts = {"config.json": inputs.as_json(said), **inputs.text_files(config, tokenizer)}
    texts["preprocessor_config.json"] = inputs.as_json(encoder.preprocessor(model.encoder))
    return f"a {language.architecture}", held, texts


def _sources() -> dict[str, str]:
    return {f"{name}.py": (REMOTE / f"{name}.py").read_text() for name in settings.CODE.values()}


def _tokenizer(config: Config) -> Tokenizer:
    try:
        return Tokenizer(config.data.tokenizer, config.data.special_tokens, config.data.chat)
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}; name it with --tokenizer") from error
