"""The standard deviation of a model's first weights: the papers' at their sizes, and what takes its place at others.

A weight (m, n) of N(0, std^2) has the spectral norm std (sqrt(m) + sqrt(n)), and m and n are multiples of the width. So the
same std is a small matrix in a narrow model; with gamma = sigma(W) at the start it learns nothing there.
"""

import math
from typing import Any

# By width: the weights' standard deviation, the patch embedding's, and how many inputs that has.
VITS = {768: (0.02, 0.02, 768), 1024: (0.01, 0.0025, 768), 1280: (0.01, 0.0025, 588)}
GPTS = {768: 0.02, 1024: 0.02, 1280: 0.02, 1600: 0.02}


def vit_init_std(width: int, patch_inputs: int) -> tuple[float, float]:
    """The standard deviations of a σReparam ViT's Linear layers and of its patch embedding.

        weights:          std sqrt(w / width)                        the same spectral norm
        patch embedding:  std sqrt(patch inputs / patch_inputs)      tokens of the same size

    with std, w and patch inputs of the paper's model of this width: ViT-B (768) .02 and .02, ViT-L (1024) and ViT-H (1280)
    .01 and .0025, of 16 x 16 x 3 inputs and for ViT-H 14 x 14 x 3 [σ, Tables 13, 14, App. I]. A width between them has those
    of the next narrower model, and one below 768 ViT-B's.

    Args:
        width: of the model, from 1.
        patch_inputs: pixels of a patch times channels, from 1.

    Raises:
        ValueError: fewer than one.
    """
    if not patch_inputs >= 1:
        raise ValueError(f"patch_inputs = {patch_inputs!r}: allowed are whole numbers from 1")
    paper = _paper_width(width, VITS)
    weights, patches, inputs = VITS[paper]
    return weights * math.sqrt(paper / width), patches * math.sqrt(inputs / patch_inputs)


def gpt_init_std(width: int) -> float:
    """The same of a reparametrised GPT's Linear layers: GPT-2's .02 at its widths (768, 1024, 1280, 1600)."""
    paper = _paper_width(width, GPTS)
    return GPTS[paper] * math.sqrt(paper / width)


def _paper_width(width: int, papers: dict[int, Any]) -> int:
    if not width >= 1:
        raise ValueError(f"width = {width!r}: allowed are whole numbers from 1")
    return max((paper for paper in papers if paper <= width), default=min(papers))
