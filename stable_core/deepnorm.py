"""DeepNorm: LayerNorm(alpha * x + f(x)), with the weights of f scaled down by beta at initialisation.

Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers" (2022), Figure 2; the residual rescaling of the
σReparam paper's translation models (App. F).
"""

from typing import NamedTuple


class DeepNormScale(NamedTuple):
    """alpha multiplies the residual stream x; beta multiplies the initial v, output and feed-forward weights."""

    alpha: float
    beta: float


class DeepNormScales(NamedTuple):
    """One scale for each side; a side without layers has the identity (1, 1)."""

    encoder: DeepNormScale
    decoder: DeepNormScale


def deepnorm_scales(encoder_layers: int, decoder_layers: int) -> DeepNormScales:
    """alpha and beta of each side of a transformer with N encoder and M decoder layers.

        encoder-only (M = 0)   alpha = (2N)^(1/4)              beta = (8N)^(-1/4)
        decoder-only (N = 0)   alpha = (2M)^(1/4)              beta = (8M)^(-1/4)
        encoder-decoder        encoder 0.81 (N^4 M)^(1/16)     0.87 (N^4 M)^(-1/16)
                               decoder (3M)^(1/4)              (12M)^(-1/4)

    beta is for the weight matrices of the value and output projections and of the feed-forward layers. It is not for
    biases, nor for the query and key projections. (torchscale's code scales biases too, and divides the encoder's weights
    by X / 1.15 with X = (N^4 M)^(1/16), where the paper multiplies them by 0.87 / X. This function follows the paper.)

    Raises:
        ValueError: a negative or non-integer number of layers, or no layers on either side.
    """
    for name, layers in (("encoder_layers", encoder_layers), ("decoder_layers", decoder_layers)):
        if not isinstance(layers, int) or layers < 0:
            raise ValueError(f"{name} = {layers!r}: give a whole number of layers, 0 for a side that is not there")
    n, m = encoder_layers, decoder_layers
    if n == 0 and m == 0:
        raise ValueError("encoder_layers = decoder_layers = 0: DeepNorm's scales need at least one layer")

    def alone(layers: int) -> DeepNormScale:
        return DeepNormScale((2 * layers) ** 0.25, (8 * layers) ** -0.25)

    identity = DeepNormScale(1.0, 1.0)
    if m == 0:
        return DeepNormScales(alone(n), identity)
    if n == 0:
        return DeepNormScales(identity, alone(m))
    depth = (n**4 * m) ** (1 / 16)
    return DeepNormScales(
        DeepNormScale(0.81 * depth, 0.87 / depth),
        DeepNormScale((3 * m) ** 0.25, (12 * m) ** -0.25),
    )
