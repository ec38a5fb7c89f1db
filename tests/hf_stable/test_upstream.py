"""transformers' own common tests, on our models in every setting that changes what they are made of."""

import types
import unittest

import pytest
import torch

import hf_stable

from .never import never
from .upstream import common_tests

common = common_tests()
BATCH, TOKENS, VOCABULARY, SIDE = 3, 7, 99, 16
GPT = {
    "vocab_size": VOCABULARY,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_inner": 37,
    "block_size": 64,
    "dropout": 0.1,
}
VIT = {"image_size": SIDE, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 37, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # fmt: skip
MT = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
      "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "share_all_embeddings": True}  # fmt: skip
CASES = {
    "StableGPT": ("StableGPT", GPT),
    "StableGPTSigma": ("StableGPT", {**GPT, "reparam": "sigma", "qkv": "joint", "norm": "none", "attention": "dot"}),
    "StableGPTWeightNorm": ("StableGPT", {**GPT, "reparam": "weight", "norm": "layernorm", "attention": "qknorm"}),
    "StableGPTL2": ("StableGPT", {**GPT, "attention": "l2", "norm": "rmsnorm", "init": "xavier"}),
    "StableViT": ("StableViT", VIT),
    "SigmaViT": ("SigmaViT", VIT),
    "SigmaTransformer": ("SigmaTransformer", MT),
    "PostLNTransformer": (
        "SigmaTransformer",
        {
            **MT,
            "residual": "post-ln",
            "reparam": "none",
            "norm": "stable",
            "attention": "stable",
            "tie_word_embeddings": True,
        },
    ),
}
HEADS = {
    "StableGPT": ("ForCausalLM", common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "StableViT": ("ForImageClassification", common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "SigmaViT": ("ForImageClassification", common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "SigmaTransformer": ("ForConditionalGeneration", common.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
# Tests that ask for what a model of this kind cannot have, and why.
BUFFERS = ("test_init_weights_can_init_buffers", "u and v belong to weights that are drawn; it wants constants")
EMBEDDING = (
    "test_model_get_set_embeddings",
    "an image model's input embedding is no nn.Embedding; transformers' ViT too",
)
HEAD = ("test_can_load_ignoring_mismatched_shapes", "a head's gamma has one entry, whatever the number of classes")
NOT_APPLICABLE = {
    "StableGPTSigma": [BUFFERS],
    "StableViT": [EMBEDDING],
    "SigmaViT": [BUFFERS, EMBEDDING, HEAD],
    "SigmaTransformer": [BUFFERS],
}


def inputs(family: str) -> dict[str, torch.Tensor]:
    if family.endswith("ViT"):
        return {"pixel_values": common.floats_tensor([BATCH, 3, SIDE, SIDE])}
    tokens = common.ids_tensor([BATCH, TOKENS], VOCABULARY).clamp(min=4)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family == "SigmaTransformer":
        given |= {f"decoder_{name}": tensor.clone() for name, tensor in given.items()}
    return given


def build_case(name: str, family: str, settings: dict) -> type:
    head, mapping = HEADS[family]
    config_class = getattr(hf_stable, f"{family}Config")
    # transformers' tests know by its tables which models take labels.
    common.MODEL_MAPPING_NAMES[config_class.model_type] = f"{family}Model"
    mapping[config_class.model_type] = f"{family}{head}"

    def set_up(self) -> None:
        config = lambda: config_class(**settings)  # noqa: E731
        self.model_tester = types.SimpleNamespace(
            batch_size=BATCH, seq_length=17 if family.endswith("ViT") else TOKENS, is_training=True, num_hidden_layers=2,
            hidden_size=32, num_attention_heads=2, vocab_size=VOCABULARY, get_config=config,
            prepare_config_and_inputs_for_common=lambda: (config(), inputs(family)),
        )  # fmt: skip

    # The generation mixin is an empty stand-in here, but there is a test that asks for it.
    mixins = (common.ModelTesterMixin,) + (() if family.endswith("ViT") else (common.GenerationTesterMixin,))
    left_out = {*never(family, dir(common.ModelTesterMixin)), *(test for test, _ in NOT_APPLICABLE.get(name, ()))}
    attributes = {
        "setUp": set_up,
        "all_model_classes": tuple(getattr(hf_stable, f"{family}{kind}") for kind in ("Model", head)),
        "test_resize_embeddings": not family.endswith("ViT"),
        "is_encoder_decoder": family == "SigmaTransformer",
        **dict.fromkeys(left_out),  # None in a test's place is no test
    }
    return type(f"Test{name}", (*mixins, unittest.TestCase), attributes)


for name, (family, settings) in CASES.items():
    case = build_case(name, family, settings)
    # Of StableGPT's four, the two whose parts the others have between them.
    globals()[f"Test{name}"] = pytest.mark.slow(case) if name in ("StableGPTWeightNorm", "StableGPTL2") else case
del case
del common_tests
