"""z-loss against its formula written out, and its gradient against finite differences."""

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from stable_core import WithZLoss, reference, z_loss

LOGITS = [[[0.5, -1.0, 2.0], [3.0, 3.0, 3.0]], [[-40.0, 0.0, 1.0], [7.0, -2.0, 0.25]]]


def by_hand(rows: list[list[float]], coefficient: float = 1e-4) -> float:
    return coefficient * sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in rows) / len(rows)


def test_the_formula_and_papers_coefficient():
    rows = [row for rows in LOGITS for row in rows]
    assert z_loss(torch.tensor(LOGITS)).item() == pytest.approx(by_hand(rows), rel=1e-6)
    torch.testing.assert_close(z_loss(torch.tensor(rows), 0.5), reference.z_loss(torch.tensor(rows), 0.5))
    assert z_loss(torch.tensor(LOGITS), 0.5, reduction="sum").item() == pytest.approx(4 * by_hand(rows, 0.5), rel=1e-6)
    mask = torch.tensor([[True, False], [False, True]])
    assert z_loss(torch.tensor(LOGITS), mask=mask).item() == pytest.approx(by_hand([rows[0], rows[3]]), rel=1e-6)


def test_a_distribution_has_none():
    """Logits that are logarithms of probabilities: Z = 1."""
    probabilities = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    assert z_loss(probabilities.log()).item() == pytest.approx(0, abs=1e-30)


def test_gradients_by_finite_differences_and_closed_form():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda x: z_loss(x, 0.3, mask), logits)
    assert torch.autograd.gradgradcheck(lambda x: z_loss(x, 0.3, mask), logits)
    z_loss(logits, 0.3, mask).backward()
    log_z = logits.detach().exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(logits.grad, 0.3 * 2 / 3 * log_z * logits.detach().softmax(-1) * mask[:, None])


def test_compiled_in_one_graph():
    logits, mask = torch.tensor(LOGITS), torch.tensor([[True, False], [False, True]])
    compiled = torch.compile(z_loss, fullgraph=True, backend="aot_eager")
    assert compiled(logits, 1e-4, mask).item() == pytest.approx(z_loss(logits, 1e-4, mask).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_in_at_least_fp32_under_autocast_too(dtype):
    """Logits of 90, of which exp is infinite in fp32, and log Z to more digits than bfloat16 has."""
    logits = torch.tensor([[90.0, 90.0, 88.0], [-90.0, -89.0, -90.0]], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = z_loss(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(by_hand(logits.tolist()), rel=1e-6)
    found.backward()
    assert logits.grad.isfinite().all() and logits.grad.dtype == dtype


def test_the_loss_of_a_loop_has_it_in_training_alone():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    plain = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = WithZLoss(plain, 0.1)
    kept = by_hand(logits[[0, 2, 3]].tolist(), 0.1)
    assert loss(logits, target).item() == pytest.approx(plain(logits, target).item() + kept)
    assert torch.equal(loss.eval()(logits, target), plain(logits, target))
    soft = torch.rand(4, 3).softmax(-1)
    expected = SoftTargetCrossEntropy()(logits, soft).item() + by_hand(logits.tolist(), 0.1)
    assert WithZLoss(SoftTargetCrossEntropy(), 0.1)(logits, soft).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"coefficient": -1e-4}, "coefficient = -0.0001: allowed are finite numbers from 0"),
        ({"coefficient": math.nan}, "coefficient = nan: allowed"),
        ({"reduction": "none"}, "reduction = 'none': allowed are 'mean', 'sum'"),
        (
            {"mask": torch.ones(2, dtype=torch.bool)},
            r"mask of shape \(2,\): allowed is that of the positions, \(2, 2\)",
        ),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        z_loss(torch.tensor(LOGITS), **wrong)


@pytest.mark.parametrize(
    "loss, message",
    [
        (nn.BCEWithLogitsLoss(), r"loss = BCEWithLogitsLoss\(\): it has a sigmoid for each class"),
        (BinaryCrossEntropy(), "a sigmoid for each class"),
        (nn.CrossEntropyLoss(reduction="sum"), "reduction = 'sum': allowed is 'mean'"),
    ],
)
def test_losses_without_a_softmax_or_mean_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        WithZLoss(loss)
