"""Frequencies of scaled rotary positions against those of transformers, at the sizes of models that use them."""

import pytest
import torch

from tandem.train.models.language.rope import Rope, check_scaling, check_sections
from tandem.train.models.layers.rotary import turn

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


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_three_positions_are_those_of_transformers(family):
    """Sections side by side, and interleaved."""
    generator = torch.Generator().manual_seed(0)
    positions_S3 = torch.randint(50, (7, 3), generator=generator)
    q_SHK, base = torch.randn(7, 2, 64, generator=generator), 10_000.0
    sections = {"qwen2_5_vl": [8, 12, 12], "qwen3_vl": [14, 9, 9]}[family]
    cos_SK, sin_SK = Rope(64, base, {}, tuple(sections), family == "qwen3_vl").tables(positions_S3)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    rope = {"rope_theta": base, "rope_type": "default", "mrope_section": sections}
    if family == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

        rotary = theirs.Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope))
    else:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

        rope["mrope_interleaved"] = True
        rotary = theirs.Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**sizes, rope_parameters=rope))
    cos, sin = rotary(q_SHK[None], positions_S3.T[:, None])
    q = q_SHK.transpose(0, 1)[None]
    if family == "qwen2_5_vl" and cos.dim() == 4:
        wanted, _ = theirs.apply_multimodal_rotary_pos_emb(q, q, cos, sin, sections)
    else:
        wanted, _ = theirs.apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(turn(q_SHK, cos_SK, sin_SK), wanted[0].transpose(0, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("sections", "interleaved", "words"),
    [
        (None, True, "model.llm.mrope_interleaved=true needs model.llm.mrope_sections"),
        ([4, 4], False, "model.llm.mrope_sections=[4, 4]: must be three numbers, for t, y and x, whose sum is 8"),
        ([4, 3, 2], False, "whose sum is 8"),
        ([5, -1, 4], False, "whose sum is 8"),
        ([1, 3, 4], True, "there are not enough of 8"),
    ],
)
def test_sections_that_do_not_fit_are_refused(sections, interleaved, words):
    with pytest.raises(ValueError) as refused:
        check_sections(sections, interleaved, 16)
    assert words in f"{refused.value}"


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
