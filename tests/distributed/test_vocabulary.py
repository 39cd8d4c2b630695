"""A language model of a folder with the folder's own tokenizer: more rows than tokens, more tokens than rows, padding.

padded   config.json says 401 rows for fewer tokens; at tp = 2 they are 402
grown    config.json says as many rows as tokens, and the run adds more
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tandem.data.media.text import Tokenizer
from tandem.data.media.tokenizer_files import SpecialTokens
from tandem.launch import checkpoint as checkpoint_command
from tandem.launch import index_shards
from tandem.train.checkpoints.checkpoint import Reader, resolve
from tests.data.chat_tokenizers import TEMPLATES, VISION, write_folder
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import read_metrics

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
}  # fmt: skip
TOKENS = {"padded": VISION, "grown": {"image": "<|image_pad|>", "video": "<|video_pad|>"}}  # others are added
EMBEDDING = "llm.embedding.word_embeddings.weight"
SMALL = ["train.steps=2", "train.seq_length=256", "train.global_batch_size=2", "data.block_samples=64"]
SMALL += ["train.precision=fp32", "data.max_patches=64", "checkpoint.keep=9", "train.deterministic=true"]
NORMS = ("grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """of(case) -> (folder of model and tokenizer, overrides of a run), each made once."""
    made = {}

    def of(case):
        if case in made:
            return made[case]
        root = tmp_path_factory.mktemp(case)
        folder, special = write_folder(root / "model", "byte_level", TEMPLATES["chatml"]), TOKENS[case]
        known = Tokenizer(folder, SpecialTokens(**special)).known
        torch.manual_seed(0)
        config = transformers.Qwen3Config(**SIZES, vocab_size=401 if case == "padded" else known)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
        (root / "shards").mkdir()
        for shard in sorted(Path(corpus, "train").glob("read-*.tar")):
            (root / "shards" / shard.name).symlink_to(shard)
        chosen = [word for key, token in special.items() for word in ("--set", f"special_tokens.{key}={token}")]
        assert index_shards.main([f"{root}/shards/*.tar", "--tokenizer", str(folder), *chosen]) == 0
        overrides = [f"data.special_tokens.{key}='{token}'" for key, token in special.items()]
        overrides += [f"data.tokenizer={folder}", f"data.sources.main.shards=['{root}/shards/*.tar']"]
        made[case] = folder, [*SMALL, *overrides, f"model.llm.folder={folder}"]
        return made[case]

    return of


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """of(case) -> (directory of the run on two ranks, of that on one)."""
    made = {}

    def of(case):
        if case not in made:
            root, overrides = tmp_path_factory.mktemp("runs"), folders(case)[1]
            run_world(train_run, 2, "stage1", [*overrides, "parallel.tp=2"], str(root / "tp2"), timeout=180)
            run_world(train_run, 1, "stage1", overrides, str(root / "one"), timeout=180)
            made[case] = root / "tp2", root / "one"
        return made[case]

    return of


def reader_of(run: Path) -> Reader:
    return Reader(resolve(run))


@pytest.mark.parametrize("case", TOKENS)
def test_padding_and_growth_change_nothing_that_is_computed(runs, case):
    two, one = (read_metrics(run) for run in runs(case))
    for here, there in zip(two, one, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        for norm in NORMS:
            assert here[norm] == pytest.approx(there[norm], rel=1e-4)
    assert len(two) == 2


@pytest.mark.parametrize("case", TOKENS)
def test_a_checkpoint_holds_the_rows_that_there_are(folders, runs, case):
    folder, _ = folders(case)
    tokenizer = Tokenizer(folder, SpecialTokens(**TOKENS[case]))
    rows = 401 if case == "padded" else tokenizer.vocab_size
    assert case == "padded" or (tokenizer.vocab_size > tokenizer.known and rows % 2)
    for run in runs(case):
        reader = reader_of(run)
        shapes = [reader.tensors[name]["shape"] for name in (EMBEDDING, "llm.output_layer.weight")]
        assert shapes == [[rows, 64], [rows, 64]]
        assert reader.state.tokenizer["ids"] == tokenizer.sha256


def test_new_tokens_start_as_the_mean_of_the_others(folders, tmp_path):
    folder, overrides = folders("grown")
    still = [*overrides, "train.steps=1", "train.trainable=[adapter]", "parallel.tp=2"]
    run_world(train_run, 2, "stage1", still, str(tmp_path / "run"), timeout=180)
    tokenizer = Tokenizer(folder, SpecialTokens(**TOKENS["grown"]))
    theirs, reader = load_file(folder / "model.safetensors"), reader_of(tmp_path / "run")
    for ours, name in ((EMBEDDING, "model.embed_tokens.weight"), ("llm.output_layer.weight", "lm_head.weight")):
        found = reader.whole(ours)
        assert torch.equal(found[: tokenizer.known], theirs[name])
        mean = theirs[name].double().mean(0).float()
        assert torch.equal(found[tokenizer.known :], mean.expand(len(tokenizer.added), -1))
    log = (tmp_path / "run/config.yaml").read_text()
    assert f"vocab_size: {tokenizer.vocab_size}" in log


@pytest.mark.parametrize("case", TOKENS)
def test_an_exported_model_has_these_rows_and_this_tokenizer(folders, runs, tmp_path, case):
    folder, _ = folders(case)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        checkpoint_command.main(["export", str(runs(case)[0]), str(out), "--format", "hf", "--part", "llm"])
    assert done.value.code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours, theirs = Tokenizer(folder, SpecialTokens(**TOKENS[case])), transformers.AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(model.lm_head.weight) == (401 if case == "padded" else ours.vocab_size)
    turns = [("user", "What number is it?"), ("assistant", "a 7")]
    wanted = ours.encode_sample([{"role": role, "text": text} for role, text in turns], (), [], "s").tokens_T.tolist()
    messages = [{"role": role, "content": text} for role, text in turns]
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == wanted
    assert len(theirs) == ours.vocab_size and theirs.pad_token_id == ours.pad_id


def test_a_tokenizer_of_another_vocabulary_is_refused(folders, tmp_path):
    """Unless it is allowed by name."""
    folder, overrides = folders("padded")
    other = json.loads((folder / "tokenizer.json").read_text())
    for token in other["added_tokens"]:
        token["content"] = {"<|user|>": "<|assistant|>", "<|assistant|>": "<|user|>"}.get(
            token["content"], token["content"]
        )
    model = tmp_path / "model"
    model.mkdir()
    for file in folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "tokenizer.json").write_text(json.dumps(other))
    start = [*overrides, f"model.llm.folder={model}", "train.steps=1"]
    with pytest.raises(RuntimeError, match="has id .* for '<|.*model.llm.folder.*set checkpoint.other_tokenizer=true"):
        run_world(train_run, 1, "stage1", start, str(tmp_path / "refused"), timeout=180)
    run_world(train_run, 1, "stage1", [*start, "checkpoint.other_tokenizer=true"], str(tmp_path / "run"), timeout=180)
