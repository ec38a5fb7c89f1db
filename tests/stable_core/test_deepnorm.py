"""DeepNorm's scales, of the library and of the reference, against numbers worked out by hand [DeepNet paper, Figure 2]."""

import pytest

from stable_core import deepnorm_scales, reference

both = pytest.mark.parametrize("scales", [deepnorm_scales, reference.deepnorm_scales])


@both
def test_encoder_decoder_scales_differ_by_side(scales):
    # (100^4 * 100)^(1/16) = 10^0.625 = 4.21697; 300^(1/4) = 4.16179; 1200^(1/4) = 5.88566; 54^(1/4) = 2.71081.
    encoder, decoder = scales(100, 100)
    assert encoder == pytest.approx((0.81 * 4.21697, 0.87 / 4.21697), rel=1e-5)
    assert decoder == pytest.approx((4.16179, 1 / 5.88566), rel=1e-5)
    assert scales(18, 18)[1] == pytest.approx((2.71081, 216**-0.25), rel=1e-5)


@both
def test_one_sided_models(scales):
    assert scales(8, 0) == (pytest.approx((2.0, 64**-0.25)), (1.0, 1.0))
    assert scales(0, 8) == ((1.0, 1.0), pytest.approx((2.0, 64**-0.25)))
    assert (deepnorm_scales(8, 0).encoder.alpha, deepnorm_scales(0, 8).decoder.alpha) == pytest.approx((2.0, 2.0))
