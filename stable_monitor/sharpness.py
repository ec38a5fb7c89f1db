"""Sharpness, the largest curvature of the training loss, and the curvature above which AdamW diverges.

Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023), Appendix B.1.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stable_core.extras import extra

LossFn = Callable[[nn.Module, Any], Tensor]


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    k: int = 5,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:
    """The k eigenvalues of largest magnitude of the Hessian of the training loss.

    H = d^2 L / d theta^2, H v_i = lambda_i v_i (Appendix B.1, eq. 24); the paper's sharpness is |lambda_1|. L is the mean
    over `batches` of `loss_fn(model, batch)`, and theta all parameters that require grad. The eigenvalues are found by Lanczos'
    method with some 20 to 50 Hessian-vector products, each of which takes about as long as three training steps over all
    batches.

    With `optimizer` they are the eigenvalues of P^-1/2 H P^-1/2, where P = sqrt(v_hat) + eps is the divisor of Adam's update.
    These are those of P^-1 H, to which `adamw_stability_threshold` applies. A parameter entry that has had no gradient yet,
    such as the embedding of a word not yet seen, has P = eps and so a huge curvature: measure on batches that were trained on.

    The model is measured in evaluation mode, so without dropout and with BatchNorm's running statistics, and left as it
    was, gradients, buffers and random state included. Attention runs on torch's math kernel and compiled code runs eagerly,
    as fused kernels and compiled graphs have no second derivative.

    For σReparam, u is a constant of this Hessian, as it is in training between two optimizer steps, so that the Hessian is
    symmetric (to fp32 rounding, 1e-7). It lacks the curvature of the exact norm, dL/dsigma d^2 sigma/dW^2, which grows
    without bound as the two largest singular values approach each other. There power iteration hardly moves u in a step, so
    that this curvature does not act on training. This was checked in 54 small models: gradient descent with Algorithm 1,
    linearised in W, gamma, u and v together, lost its stability at a step size of 2/lambda to within 8 %, where lambda is the
    largest positive eigenvalue of this Hessian (v was a constant then, too; it is W^T u / |W^T u| now). With the curvature of
    the exact norm, lambda was up to 500 times as large.

    Args:
        model: in float32 or float64 and in one process (of DDP, its `.module`).
        loss_fn: (model, batch) -> scalar, the mean loss of the batch. Its random numbers from torch are the same in each
            product.
        batches: kept in a list and given to loss_fn one at a time, with equal weights; cut an endless loader with
            `itertools.islice`. A batch may be an index, if loss_fn loads the data.
        k: number of eigenvalues, fewer than there are parameters.
        optimizer: torch's Adam or AdamW, after a step on every parameter.

    Returns:
        (k,) on the CPU, signed and by falling magnitude, to three digits or better, in loss per squared unit of theta. The
        same call gives the same result. Lanczos' method keeps 20 vectors of the size of theta (2k + 1 if more) on the host.

    Raises:
        ValueError: k, batches, a parameter's dtype or the optimizer not as above; more parameters than ARPACK can index; a
            loss that is not scalar or does not depend on the model; a loss or a product that is not finite.
        RuntimeError: Lanczos did not converge.
        ModuleNotFoundError: scipy is not installed.
    """
    with extra("monitor"):
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    named: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = list(named.values())
    with _fork_rng(weights):  # a loader may draw random numbers
        batches = list(batches)
    size = sum(weight.numel() for weight in weights)
    basis_limit = (2**31 - 1) // max(size, 1)  # ARPACK indexes its basis, (size, basis), in 32 bits
    if not isinstance(k, int) or not 1 <= k < size:
        raise ValueError(f"k = {k!r}: allowed are 1 and more, below the {size} parameters that require grad")
    if basis_limit < k + 2:
        raise ValueError(f"k = {k!r}: ARPACK allows (k + 2) * {size} parameters < 2**31; lower k, or freeze some")
    if not batches:
        raise ValueError("batches = []: at least one is needed")
    for name, weight in named.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: {weight.dtype} is too coarse; allowed are float32 and float64, as in model.float()"
            )
    scales = None if optimizer is None else list(_inverse_roots(optimizer, named))

    def product(x: "np.ndarray") -> "np.ndarray":
        parts = torch.from_numpy(x).split([weight.numel() for weight in weights])
        vector = [part.view_as(weight).to(weight) for part, weight in zip(parts, weights, strict=True)]
        if scales is not None:
            vector = [v * scale for v, scale in zip(vector, scales, strict=True)]
        with _fork_rng(weights):
            result = _hessian_vector_product(model, loss_fn, batches, weights, vector)
        if scales is not None:
            result = [h * scale for h, scale in zip(result, scales, strict=True)]
        y = torch.cat([part.flatten().cpu() for part in result])
        if not y.isfinite().all():
            raise ValueError(
                "the loss is finite but its second derivative is not; look for a root or a norm taken at 0"
            )
        return y.numpy()

    dtype = reduce(torch.promote_types, [weight.dtype for weight in weights])
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype).numpy()
    with (
        _evaluation_mode(model),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
    ):
        start = product(start)
        if not start.any():  # H = 0, which ARPACK refuses
            return torch.zeros(k, dtype=dtype)
        try:
            values = eigsh(
                LinearOperator((size, size), matvec=product, dtype=start.dtype),
                k,
                which="LM",
                v0=start,
                ncv=min(max(2 * k + 1, 20), size, basis_limit),
                maxiter=100,  # restarts; a handful is usual
                tol=1e-3,  # of the residual; the eigenvalue is better, by its square where well separated
                return_eigenvectors=False,
                rng=0,  # ARPACK draws when H has fewer than ncv different eigenvalues
            )
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"{len(error.eigenvalues)} of k = {k} eigenvalues converged in 100 restarts: lower k, or use model.double()"
            ) from error
    return torch.from_numpy(values[np.argsort(-np.abs(values))])


def adamw_stability_threshold(lr: float, beta1: float = 0.9) -> float:
    """(2 + 2 beta1) / ((1 - beta1) lr), 38 / lr at 0.9: the curvature above which AdamW diverges (Appendix B.1, eq. 25).

    Cohen et al., "Adaptive Gradient Methods at the Edge of Stability" (2022) derive it, with Adam's second moment frozen and
    the loss quadratic, for the largest positive eigenvalue of the preconditioned Hessian P^-1 H: compare
    `sharpness(..., optimizer=optimizer)`. The σReparam paper draws the eigenvalues of the plain Hessian against it.

    Raises:
        ValueError: lr not positive; beta1 not in [0, 1).
    """
    if not lr > 0:
        raise ValueError(f"lr = {lr!r}: allowed are positive numbers")
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 = {beta1!r}: allowed are 0 <= beta1 < 1")
    return (2 + 2 * beta1) / ((1 - beta1) * lr)


def _hessian_vector_product(
    model: nn.Module, loss_fn: LossFn, batches: list[Any], weights: list[Tensor], vector: list[Tensor]
) -> list[Tensor]:
    """H v = d(g . v)/d theta with g = dL/d theta, by parameter; zeros for those that the loss does not depend on."""
    total = [torch.zeros_like(weight) for weight in weights]
    for index, batch in enumerate(batches):
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"batch {index}: loss_fn gives {what}; allowed is a scalar with a gradient to the model")
        if not loss.isfinite():
            raise ValueError(f"batch {index}: loss = {loss.item()}; allowed are finite losses")
        gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
        slope: Any = sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
        if slope.requires_grad:  # else this loss is linear in theta
            derivative = torch.autograd.grad(slope, weights, allow_unused=True, materialize_grads=True)
            for sum_, part in zip(total, derivative, strict=True):
                sum_ += part / len(batches)
    return total


def _inverse_roots(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]) -> Iterator[Tensor]:
    """P^-1/2 of each parameter, P = sqrt(v_hat) + eps, v_hat = v / (1 - beta2^t)."""
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(f"optimizer = {type(optimizer).__name__}: allowed are torch.optim's Adam and AdamW")
    groups = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in weights.items():
        state = optimizer.state.get(weight)
        if not state:
            raise ValueError(f"{name}: the optimizer has made no step on it; make one before, or freeze it")
        group = groups[weight]
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        v_hat = v / (1 - group["betas"][1] ** float(state["step"]))
        yield (v_hat.sqrt() + group["eps"]).rsqrt()


def _fork_rng(weights: Iterable[Tensor]) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices={weight.device for weight in weights if weight.is_cuda})


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context with all modules in evaluation mode, set by their flags: some models' own eval() does more than that."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training
