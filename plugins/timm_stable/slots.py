"""Where timm's Vision Transformer has its norm, its queries and keys, and its residuals."""

from functools import partial

import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stable_core.attentions import build_attention
from stable_core.norms import build_norm
from stable_core.options import Options
from stable_core.residuals import Residual, build_residuals


class FeatureAttention(Attention):
    """timm's attention whose kernel is given `features` of queries and keys, or the queries for keys where `tied`."""

    features, tied = None, False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(q if self.tied else k)
        if self.features is not None:
            q, k = self.features(q, k)
        dropout = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=self.scale)
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class PostNormBlock(Block):
    """timm's block with the norm after the sum: norm(alpha x + f(x))."""

    residual = Residual(norm_first=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.drop_path1(self.ls1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal)))

        x = self.residual.connect(x, self.norm1, attend)
        return self.residual.connect(x, self.norm2, lambda x: self.drop_path2(self.ls2(self.mlp(x))))


def fill_in(timm: dict, options: Options) -> None:
    """Puts into the keywords of timm's `VisionTransformer` what the options say.

    Raises:
        ValueError: a norm_layer or block_fn of the caller's, where the norm or the residual is another one.
    """
    if options.norm != "layernorm":
        if timm.get("norm_layer") is not None:
            raise ValueError(
                f"norm_layer = {timm['norm_layer']!r}: norm = {options.norm!r} is another; allowed with 'layernorm'"
            )
        timm["norm_layer"] = nn.Identity if options.norm == "none" else partial(build_norm, options=options)
    if not build_attention(1, options, 2).only_norms:
        timm.setdefault("attn_layer", FeatureAttention)
    if not build_residuals(options, 1, 0)[0].norm_first:
        if "block_fn" in timm:
            raise ValueError(f"block_fn = {timm['block_fn']!r}: residual = {options.residual!r} has a block of its own")
        timm["block_fn"] = PostNormBlock
        timm.setdefault("final_norm", False)  # the last block ends with one


def put_in(vit: VisionTransformer, options: Options, **made) -> float:
    """Gives every attention of the blocks, whatever their class is, its norms, and every block its residual.

    Returns:
        The residual's beta, for the first weights.

    Raises:
        ValueError: the blocks have another attention than one that could do it.
    """
    residual = build_residuals(options, len(vit.blocks), 0)[0]
    for block in vit.blocks:
        if isinstance(block, PostNormBlock):
            block.residual = residual
    if options.attention == "dot":
        return residual.beta
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens
    attentions = [module for module in vit.blocks.modules() if hasattr(module, "q_norm")]
    for attn in attentions:
        kinds = build_attention(attn.head_dim, options, tokens, **made)
        attn.q_norm, attn.k_norm, attn.features, attn.tied = kinds
        if not kinds.only_norms and not isinstance(attn, FeatureAttention):
            raise ValueError(
                f"attention = {options.attention!r}: a {type(attn).__name__} cannot do it; allowed is timm's own"
            )
    if not attentions:
        raise ValueError(f"attention = {options.attention!r}: no attention of the blocks has q_norm and k_norm")
    return residual.beta
