"""Standard deviations of first weights: the papers' at the widths of their models, scaled to other widths.

A weight (m, n) of N(0, std^2) has a spectral norm of about std (sqrt(m) + sqrt(n)), where m and n are multiples of the width.
So the paper's std gives a narrow model a small spectral norm, with which, as gamma = sigma(W) at the start, it does not learn.
"""

import math
from typing import Any

# Width: (std of the weights, std of the patch embedding, inputs of the patch embedding).
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
    """The standard deviation .02 sqrt(w / width) of a σReparam GPT's Linear layers, GPT-2's at its widths w.

    w is the largest of 768, 1024, 1280 and 1600 that is at most `width`, or 768.

    Raises:
        ValueError: width below 1.
    """
    paper = _paper_width(width, GPTS)
    return GPTS[paper] * math.sqrt(paper / width)


def _paper_width(width: int, papers: dict[int, Any]) -> int:
    if not width >= 1:
        raise ValueError(f"width = {width!r}: allowed are whole numbers from 1")
    return max((paper for paper in papers if paper <= width), default=min(papers))
