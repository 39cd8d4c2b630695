"""Hugging Face tokenizer folders made on the spot: a tokenizer of each kind, chat templates after well-known ones."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCE = "the sign says no parking here and a seven moves to the left What number is it now answer briefly"
TEXTS = [f"{SENTENCE[i:]} {SENTENCE[:i]}. {i}, {i + 1}!\n" for i in range(0, len(SENTENCE), 5)]

# Written for these tests, each with the habits of a public template.
CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are of help.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header|>' + m['role'] + '<|end_header|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}"""
INST = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in loop_messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
    {%- if m['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\\n\\n' + m['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + m['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{% for m in messages %}
{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}"""
PIPES = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}
{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|end|>\\n' }}
{% endfor %}{{ eos_token }}"""
THOUGHTS = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}"""
PARTS = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m['content'] is string %}{{ m['content'] }}
    {%- else %}
        {%- for part in m['content'] %}
            {%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}{{ part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
IMAGES_FIRST = """\
{%- for m in messages %}
    {{- 'USER: ' if m.role == 'user' else 'ASSISTANT: ' if m.role == 'assistant' else '' }}
    {%- for part in m.content if part.type == 'image' %}{{ '<|image_pad|>\\n' }}{% endfor %}
    {%- for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {{- eos_token if m.role == 'assistant' else ' ' }}
{%- endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "inst": INST,
    "turns": TURNS,
    "pipes": PIPES,
    "thoughts": THOUGHTS,
    "parts": PARTS,
    "images first": IMAGES_FIRST,
}
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>")
SPECIAL += ("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>")
SPECIAL += ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|box|>", "<|/box|>")
VISION = {
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "start_of_box": "<|box|>",
    "end_of_box": "<|/box|>",
}


def byte_level() -> tokenizers.Tokenizer:
    """As Qwen's and Llama 3's."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


def unigram() -> tokenizers.Tokenizer:
    """As that of T5: SentencePiece's model, a space in front of every string."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def _metaspace_bpe(**options) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    bytes_first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.decoder = decoders.Metaspace(**options)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=bytes_first, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    raw = json.loads(inner.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] == "<unk>"]
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def metaspace_first() -> tokenizers.Tokenizer:
    """As Mistral's: a space in front of a string's first word, and no splits."""
    return _metaspace_bpe(prepend_scheme="first", split=False)


def prepended() -> tokenizers.Tokenizer:
    """As Llama 2's: the normalizer writes the space, behind every special token."""
    inner = metaspace_first()
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = None
    return inner


KINDS = {each.__name__: each for each in (byte_level, unigram, metaspace_first, prepended)}


def write_folder(folder, kind: str, template: str | None, special=SPECIAL, **config):
    """A folder with tokenizer.json, tokenizer_config.json and chat_template.jinja; returns it."""
    inner = KINDS[kind]()
    strip = {"<|end|>", "<|user|>", "<|assistant|>", "<|system|>"}  # which take the white space behind them, as Phi-3's
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=name in strip) for name in (*special, "<|end|>")]
    inner.add_special_tokens(tokens)
    inner.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
