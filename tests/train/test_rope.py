"""Frequencies of scaled rotary positions against those of transformers, at the sizes of models that use them."""

import pytest
import torch

from tandem.train.models.language.rope import Rope, check_scaling

ORIGINAL = {"original_max_position_embeddings": 8192}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama 3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, ramp between fractions": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "beta_fast": 16,
        **ORIGINAL,
    },
    "yarn, temperature given": {"rope_type": "yarn", "factor": 40.0, "attention_factor": 1.5, **ORIGINAL},
    "yarn of deepseek": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707, **ORIGINAL},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, base = SCALINGS[name], 500_000.0
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters={**scaling, "rope_theta": base}
    )
    wanted_J, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    rope = Rope(128, base, scaling)
    torch.testing.assert_close(rope.frequencies(torch.device("cpu")), wanted_J, rtol=2e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)
    cos_SK, sin_SK = rope.tables(torch.tensor([0, 5]))
    assert cos_SK.shape == (2, 128) and cos_SK[0, 0] == pytest.approx(factor)
    assert sin_SK[1, 0] == pytest.approx(factor * torch.sin(5 * wanted_J[0]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"factor": 2.0}, "rope_type=None: must be one of linear, llama3, yarn"),
        ({"rope_type": "llama3", "factor": 2.0, **ORIGINAL}, "llama3 needs high_freq_factor, low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, **ORIGINAL}, "linear does not use original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5: must be a number of at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor=4: must be a number of at least 1"),
        (SCALINGS["llama 3.1"] | {"low_freq_factor": 4.0}, "low_freq_factor=4.0: must be below high_freq_factor=4.0"),
    ],
)
def test_a_scaling_that_is_not_whole_is_refused(scaling, words):
    with pytest.raises(ValueError) as refused:
        check_scaling(scaling)
    assert f"{refused.value}".startswith("model.llm.rope_scaling") and words in f"{refused.value}"
