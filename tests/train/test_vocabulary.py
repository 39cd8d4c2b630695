"""Rows of a folder's vocabulary: read as they are, new ones as the mean of the tokens before; whose tokenizer fits."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tandem.data.media.text import Tokenizer
from tandem.data.media.tokenizer_files import SpecialTokens
from tandem.train import families
from tandem.train.families.vocabulary import GrownFolder, check_vocabulary
from tests.data.chat_tokenizers import TEMPLATES, VISION, write_folder
from tests.support import settings

EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 40 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=40)
    path = tmp_path_factory.mktemp("model")
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def grown(folder, vocab_size, known, added):
    llm = settings("stage1", f"model.llm.folder={folder}", f"model.llm.vocab_size={vocab_size}").model.llm
    return GrownFolder(families.open_folder(llm), 40, 16, known, added)


def test_without_new_tokens_every_row_is_the_folders(folder):
    weights = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    read = grown(folder, 40, known=33, added=range(0)).read
    assert torch.equal(read(EMBEDDING, "param", (0, 0), (40, 16)), weights)
    assert torch.equal(read(EMBEDDING, "param", (30, 4), (7, 3)), weights[30:37, 4:7])


def test_new_tokens_are_the_mean_of_those_before_and_others_stay(folder):
    """Tokens 33 to 45: seven have a row of the folder, which no token had; rows 46 to 49 the user has asked for."""
    weights = load_file(folder / "model.safetensors")["lm_head.weight"]
    found = grown(folder, 50, known=33, added=range(33, 46))
    mean = weights[:33].double().mean(0).float()
    assert torch.equal(found.read("output_layer.weight", "param", (0, 0), (33, 16)), weights[:33])
    assert torch.equal(found.read("output_layer.weight", "param", (33, 2), (17, 5)), mean[2:7].expand(17, -1))
    assert torch.equal(found.read("output_layer.weight", "param", (48, 0), (2, 16)), mean.expand(2, -1))
    assert found.description == f"{folder}; tokens 33 to 45 start as the mean of the 33 before"
    norm = "decoder.final_layernorm.weight"
    assert torch.equal(found.read(norm, "param", (0,), (16,)), torch.ones(16))


def test_a_model_of_fewer_tokens_than_its_folder_is_refused(folder):
    with pytest.raises(ValueError, match="model.llm.vocab_size=39, but model.llm.folder=.* has 40"):
        grown(folder, 39, 33, range(0))


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_a_tokenizer_must_have_the_folders_tokens(tmp_path, kind):
    path = write_folder(tmp_path / "model", kind, TEMPLATES["chatml"])
    check_vocabulary(path, Tokenizer(path, SpecialTokens(image="<|new|>")))
    check_vocabulary(tmp_path, Tokenizer(path))  # which has no tokenizer
    raw = json.loads((path / "tokenizer.json").read_text())
    more = {"content": "<extra>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    size = Tokenizer(path, SpecialTokens(**VISION, pad="</s>")).vocab_size
    raw["added_tokens"].append(more | {"normalized": False, "id": size})
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(raw))
    check_vocabulary(path, Tokenizer(other))  # has all, and one more
    with pytest.raises(ValueError, match=f"has no token '<extra>', which is {size} in model.llm.folder"):
        check_vocabulary(other, Tokenizer(path, SpecialTokens(**VISION, pad="</s>")))
