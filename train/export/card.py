"""The model card of an exported folder: where the model comes from, what it was trained on, and how to use it."""

import json
from pathlib import Path

from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.checkpoint import TrainState
from tandem.train.config.schema import Config

METRICS = ("loss", "lr", "grad_norm", "loss_by_domain")
PIPELINE = {"all": "image-text-to-text", "llm": "text-generation", "encoder": "image-feature-extraction"}
USAGE = {
    "all": """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)

content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is in the image?"}]
conversation = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))""",
    "llm": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

conversation = [{"role": "user", "content": "What is a house?"}]
options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
inputs = tokenizer.apply_chat_template(conversation, **options)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))""",
    "encoder": """\
from transformers import AutoImageProcessor, AutoModel

folder = "."
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)

features = model(**processor("image.png")).last_hidden_state  # one per patch
print(features.shape)""",
}


VISION_MODEL = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

folder = "."
processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)

inputs = processor(images=Image.open("image.png"), return_tensors="pt")
features = {call}.last_hidden_state
print(features.shape)"""


def model_card(config: Config, path: Path, state: TrainState, part: str, call: str | None = None) -> str:
    """Markdown of README.md; part: all, llm or encoder; call: how an encoder of a class of transformers is called."""
    usage = USAGE[part] if call is None else VISION_MODEL.format(call=call)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {PIPELINE[part]}", "tags: [tandem]", "---", ""]
    lines += [f"# {config.label}", ""]
    lines += [f"Trained with tandem, exported from checkpoint `{path.name}` of run `{_name(path)}`.", ""]
    lines += [
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(config, state)),
    ]
    lines += ["", "## Data", "", "| source | shards | weight |", "|---|---|---|"]
    lines += [
        f"| {name} | {', '.join(f'`{shard}`' for shard in source.shards)} | {source.weight or 'by size'} |"
        for name, source in config.data.sources.items()
    ]
    if metrics := _metrics(path, state.step):
        lines += ["", "## Last metrics", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in metrics)]
    lines += ["", "## Usage", "", "```python", usage, "```", ""]
    return "\n".join(lines)


def _facts(config: Config, state: TrainState) -> list[tuple[str, str]]:
    folders = [part.folder for part in (config.model.encoder, config.model.llm) if part.folder]
    tokens = state.step * config.train.global_batch_size * config.train.seq_length
    return [
        ("task", config.task),
        ("steps", f"{state.step:,}"),
        ("tokens seen, padding included", f"{tokens:,}"),
        ("batch", f"{config.train.global_batch_size} rows of {config.train.seq_length} tokens"),
        ("trained parts", ", ".join(config.train.trainable)),
        ("optimizer", f"{config.optim.name}, learning rate {config.optim.lr} to {config.optim.min_lr}"),
        ("precision", config.train.precision),
        ("started from", config.checkpoint.load_from or ", ".join(folders) or "random weights"),
    ]


def _metrics(path: Path, step: int) -> list[tuple[str, str]]:
    """Of the step that the checkpoint was saved after, where the run's directory has them."""
    try:
        text = (checkpoint.run_directory(path) / "metrics.jsonl").read_text()
        (line,) = [line for line in map(json.loads, text.splitlines()) if line["step"] == step - 1]
    except (OSError, ValueError, KeyError):
        return []
    return [(key, json.dumps(line[key])) for key in METRICS if key in line]


def _name(path: Path) -> str:
    return checkpoint.run_directory(path).resolve().name
