"""Every two methods in every model of this plugin: built, trained, saved, loaded, folded."""

import pytest
import torch

import hf_stable
from hf_stable import (
    SigmaTransformerConfig,
    SigmaTransformerForConditionalGeneration,
    StableGPTConfig,
    StableGPTForCausalLM,
    StableViTConfig,
    StableViTForImageClassification,
)
from tests.combinations import combined, label

IDS = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GPT = {"vocab_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
VIT = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 24, "num_labels": 3}  # fmt: skip
MT = {"vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
      "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 8}  # fmt: skip
MODELS = {
    "gpt": (StableGPTForCausalLM, StableGPTConfig(**GPT), {"input_ids": IDS, "labels": IDS}),
    "vit": (
        StableViTForImageClassification,
        StableViTConfig(**VIT),
        {"pixel_values": IMAGES, "labels": torch.tensor([0, 2])},
    ),
    "mt": (
        SigmaTransformerForConditionalGeneration,
        SigmaTransformerConfig(**MT),
        {"input_ids": IDS, "labels": IDS.flip(1)},
    ),
}


@pytest.mark.parametrize("settings", combined(), ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_trains_saves_loads_and_folds(kind, settings, tmp_path):
    cls, config, batch = MODELS[kind]
    torch.manual_seed(0)
    model = cls(type(config)(**{**config.to_dict(), **settings}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(**batch).loss < losses[0]
        model.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert {slot: getattr(loaded.config, slot) for slot in settings} == settings
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        if settings["reparam"] != "none":
            folded = hf_stable.fold(loaded)
            assert not any("parametrizations" in name for name in folded.state_dict())
            torch.testing.assert_close(folded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
