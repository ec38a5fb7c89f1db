"""What Muon and AdamW each get of fairseq's models."""

import re

import pytest

from stable_core import muon_param_groups

from . import test_language_model, test_transformer

LAYERS = r"(en|de)coder\.layers\.\d+\.((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc[12])"
WEIGHT = {"sigma": r"\.parametrizations\.weight\.original", "none": r"\.weight"}


@pytest.mark.parametrize(
    "build, arch, overrides, reparam, number",
    [
        (test_transformer.build, "sigma_transformer_18l", {"encoder_layers": 2, "decoder_layers": 2}, "sigma", 32),
        (test_transformer.build, "preln_transformer_18l", {"encoder_layers": 2, "decoder_layers": 2}, "none", 32),
        (test_transformer.build, "sigma_transformer_18l", {"share_all_embeddings": True}, "sigma", 18 * 16),
        (test_language_model.build, "sigma_transformer_lm_wiki103", {}, "sigma", 12),
        (
            test_language_model.build,
            "sigma_transformer_lm_wiki103",
            {"adaptive_input": False, "tie_adaptive_weights": False},
            "sigma",
            12,
        ),
        (test_language_model.build, "preln_transformer_lm_wiki103", {"tie_adaptive_proj": False}, "none", 12),
    ],
)
def test_muon_gets_the_layers_and_adamw_embeddings_and_softmax(build, arch, overrides, reparam, number):
    model = build(arch, **overrides)
    by_id = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = (
        [by_id[id(p)] for group in groups for p in group["params"]] for groups in muon_param_groups(model, 1, 0)
    )
    assert len(muon) == number and all(re.fullmatch(LAYERS + WEIGHT[reparam], name) for name in muon)
    assert sorted(muon + adamw) == sorted(by_id.values())
