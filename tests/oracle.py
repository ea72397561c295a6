"""The earned tolerance: a kernel may be at most twice as far from fp64 as the plain torch code in its own precision."""

import torch


def values_and_gradients(op, inputs, dtype, seed=1):
    """op's outputs and the gradients of its inputs, all in ``dtype``, for one fixed random upstream gradient."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(upstream, outputs, strict=True)])
    return [x.detach() for x in (*outputs, *gradients)]


def assert_earned(op, reference, inputs, dtype=torch.float32, factor=2.0, roundings=4):
    """Compares op in ``dtype`` with the reference in fp64, and the reference in ``dtype`` with the same."""
    inputs = [x.to(dtype).double() for x in inputs]  # what bf16 cannot hold is no error of the kernel
    exact = values_and_gradients(reference, inputs, torch.float64)
    naive = values_and_gradients(reference, inputs, dtype)
    ours = values_and_gradients(op, inputs, dtype)
    # A few roundings of the largest value anywhere: what cancels to nothing in one output was that large before.
    floor = roundings * torch.finfo(dtype).eps * max(z.abs().max() for z in exact if z.numel()) if inputs[0].numel() else 0
    for i, (x, y, z) in enumerate(zip(ours, naive, exact, strict=True)):
        assert x.shape == z.shape
        if not x.numel():
            continue
        error, allowed = (x.double() - z).abs().max(), (y.double() - z).abs().max()
        assert error <= factor * allowed + floor, f"output {i}: error {error:.3g}, naive {allowed:.3g}"
