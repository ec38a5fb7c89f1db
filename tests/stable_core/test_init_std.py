"""The first weights' standard deviations: the papers' numbers, and spectral norms measured on drawn matrices."""

import math

import pytest
import torch

from stable_core.init_std import gpt_init_std, vit_init_std


def drawn(rows: int, columns: int, std: float) -> torch.Tensor:
    return std * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def test_at_the_papers_sizes_they_are_the_papers():
    assert vit_init_std(768, 16 * 16 * 3) == (0.02, 0.02)  # ViT-B/16 [σ, Table 13]
    assert vit_init_std(1024, 16 * 16 * 3) == (0.01, 0.0025)  # ViT-L/16 [σ, Table 14]
    assert vit_init_std(1280, 14 * 14 * 3) == (0.01, 0.0025)  # ViT-H/14 [σ, App. I]
    for width in (768, 1024, 1280, 1600):  # GPT-2, nanoGPT's and [ST, Table 2]
        assert gpt_init_std(width) == 0.02


@pytest.mark.parametrize("width", [64, 96, 192, 384, 512])
def test_narrow_weights_have_the_spectral_norm_of_vit_b(width):
    for rows, columns in ((1, 1), (4, 1), (1, 4)):
        law = 0.02 * (math.sqrt(768 * rows) + math.sqrt(768 * columns))  # 1.1 and 1.7, of random matrices
        for std in (vit_init_std(width, 768)[0], gpt_init_std(width)):
            W = drawn(rows * width, columns * width, std)
            assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(law, rel=0.06)


@pytest.mark.parametrize(("width", "paper", "std"), [(1152, 1024, 0.01), (1408, 1280, 0.01), (896, 768, 0.02)])
def test_wider_ones_have_that_of_the_next_narrower_model(width, paper, std):
    W, theirs = drawn(width, width, vit_init_std(width, 768)[0]), drawn(paper, paper, std)
    assert torch.linalg.matrix_norm(W, 2).item() == pytest.approx(torch.linalg.matrix_norm(theirs, 2).item(), rel=0.02)


@pytest.mark.parametrize("width", [96, 1024])
def test_tokens_have_the_size_that_the_papers_patches_give(width):
    def size(inputs: int) -> float:
        patches = torch.randn(inputs, 4000, generator=torch.Generator().manual_seed(1))
        return (drawn(width, inputs, vit_init_std(width, inputs)[1]) @ patches).std().item()

    for inputs in (2 * 2, 8 * 8 * 3, 32 * 32 * 3):
        assert size(inputs) == pytest.approx({96: 0.02, 1024: 0.0025}[width] * math.sqrt(768), rel=0.05)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="width = 0: allowed are whole numbers from 1"):
        gpt_init_std(0)
    with pytest.raises(ValueError, match="patch_inputs = 0: allowed are whole numbers from 1"):
        vit_init_std(768, 0)
