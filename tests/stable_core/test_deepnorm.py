"""DeepNorm's scales, against numbers worked out by hand from Figure 2 of the DeepNet paper."""

import pytest

from stable_core import deepnorm_scales


def test_encoder_decoder_scales_differ_by_side():
    # (100^4 * 100)^(1/16) = 10^0.625 = 4.21697; 300^(1/4) = 4.16179; 1200^(1/4) = 5.88566; 54^(1/4) = 2.71081.
    encoder, decoder = deepnorm_scales(100, 100)
    assert (encoder.alpha, encoder.beta) == pytest.approx((0.81 * 4.21697, 0.87 / 4.21697), rel=1e-5)
    assert (decoder.alpha, decoder.beta) == pytest.approx((4.16179, 1 / 5.88566), rel=1e-5)
    assert deepnorm_scales(18, 18).decoder == pytest.approx((2.71081, 216**-0.25), rel=1e-5)


def test_one_sided_models():
    assert deepnorm_scales(8, 0).encoder == pytest.approx((2.0, 64**-0.25))
    assert deepnorm_scales(0, 8).decoder == pytest.approx((2.0, 64**-0.25))
    assert deepnorm_scales(8, 0).decoder == (1.0, 1.0)
