"""Files of a tokenizer, a tokenizer.json or a Hugging Face folder, and the meaning of its special tokens.

tokenizer.json             vocabulary, pre-tokenizer, added tokens
tokenizer_config.json      named tokens (bos_token, eos_token, pad_token ...), more added tokens, chat_template
special_tokens_map.json    named tokens, where tokenizer_config.json lists no added tokens (transformers below 4.34)
chat_template.jinja        takes precedence over chat_template
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from tandem.data.vision import VisionSpec

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OWN_FORMAT = "none"  # value of ChatConfig.template


@dataclass
class SpecialTokens:
    """The special token of each meaning.

    null: `pad` and `end_of_turn` default to the folder's, all others to tandem's.  system, user and assistant begin a
    turn if there is no chat template; a chat template writes the roles itself.
    """

    pad: str | None = None
    end_of_turn: str | None = None
    system: str | None = None
    user: str | None = None
    assistant: str | None = None
    start_of_image: str | None = None
    end_of_image: str | None = None
    image: str | None = None
    video: str | None = None
    start_of_box: str | None = None
    end_of_box: str | None = None


OURS = SpecialTokens(
    pad="<pad>",
    end_of_turn="<eos>",
    system="<system>",
    user="<user>",
    assistant="<assistant>",
    start_of_image=VisionSpec.layout.before[0],
    end_of_image=VisionSpec.layout.after[0],
    image="<image>",
    video="<video>",
    start_of_box="<bbox>",
    end_of_box="</bbox>",
)
ROLES = ("system", "user", "assistant")


@dataclass
class ChatConfig:
    """template: null for the folder's own, none for tandem's format, or a Jinja file.  date: value of today's date
    passed to the template (YYYY-MM-DD).  variables: further variables of the template, such as enable_thinking."""

    template: str | None = None
    date: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerFiles:
    """raw: bytes of tokenizer.json.  named: tokens by NAMED.  added: tokens that tokenizer_config.json adds.
    template: the chat template; None for tandem's format."""

    raw: bytes
    named: dict[str, str]
    added: tuple[AddedToken, ...]
    template: str | None

    def build(self) -> tokenizers.Tokenizer:
        """Build the tokenizer that transformers would build from these files."""
        inner = tokenizers.Tokenizer.from_str(self.raw.decode())
        known = {repr(token) for token in inner.get_added_tokens_decoder().values()}
        inner.add_tokens([token for token in self.added if repr(token) not in known])
        spelled = {token.content for token in inner.get_added_tokens_decoder().values()}
        inner.add_tokens([AddedToken(name, special=True) for name in self.named.values() if name not in spelled])
        return inner


def read_files(path: str | Path, chat: ChatConfig) -> TokenizerFiles:
    """Read the tokenizer files at `path`.  Raises ValueError, naming the file, if one cannot be read."""
    path = Path(path)
    folder = path.is_dir()
    if folder and not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"data.tokenizer={path} is a folder without a tokenizer.json; "
            "transformers writes one with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raw = _read(path / "tokenizer.json" if folder else path)
    config = _json(path / "tokenizer_config.json") if folder else {}
    named, decoder = dict(config), config.get("added_tokens_decoder") or {}
    if folder and not decoder:
        named |= _json(path / "special_tokens_map.json")
    try:
        added = tuple(AddedToken(**decoder[token_id]) for token_id in sorted(decoder, key=int))
        named = {name: _spelling(named[name]) for name in NAMED if named.get(name)}
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}/tokenizer_config.json: invalid token entry: {error}") from error
    return TokenizerFiles(raw, named, added, _template(path, config, chat))


def _template(path: Path, config: Mapping, chat: ChatConfig) -> str | None:
    if chat.template == OWN_FORMAT:
        return None
    if chat.template is not None:
        return _text(Path(chat.template))
    if (path / "chat_template.jinja").is_file():
        return _text(path / "chat_template.jinja")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found


def resolve(special: SpecialTokens, files: TokenizerFiles) -> dict[str, str]:
    """Return {meaning: token}.

    With a chat template the roles are absent, and `end_of_turn` is absent if the chat template determines it.  Raises
    ValueError for a token without an effect and for a token with two meanings.
    """
    chosen = {each.name: getattr(special, each.name) for each in fields(special)}
    default = vars(OURS) | {"pad": files.named.get("pad_token", OURS.pad)}
    default["end_of_turn"] = files.named.get("eos_token", OURS.end_of_turn)
    if files.template is not None:
        for role in ROLES:
            if chosen.pop(role) is not None:
                raise ValueError(
                    f"data.special_tokens.{role}={getattr(special, role)}: the chat template writes the roles; "
                    f"leave it null, or set data.chat.template={OWN_FORMAT}"
                )
        if chosen["end_of_turn"] is None:
            del chosen["end_of_turn"]
    names = {key: value or default[key] for key, value in chosen.items()}
    first: dict[str, str] = {}
    for key, name in names.items():
        other = first.setdefault(name, key)
        if other != key and {other, key} != {"pad", "end_of_turn"}:
            both = f"data.special_tokens.{key} and .{other} are both {name!r}"
            raise ValueError(f"{both}; each needs its own token")
    return names


def _spelling(token: str | Mapping) -> str:
    return token if isinstance(token, str) else token["content"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer file {path} cannot be read: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template {path} cannot be read: {error}") from error


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object")
    return found
