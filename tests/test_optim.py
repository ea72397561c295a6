"""Muon, AdamW's grouping, the schedule and resuming."""

import copy

import pytest
import torch

from nanorlhf import ops
from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.optim import AdamW, Muon, Optimizer, is_hidden_matrix, learning_rate, orthogonalise

SMALL = ModelConfig(vocab_size=50, hidden_size=16, layers=1, heads=2, kv_heads=1, head_size=8, intermediate_size=24,
                    context=32)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 6, 20), (2, 20, 6), (3, 7, 5)])
def test_orthogonalise_keeps_singular_vectors_and_brings_values_near_one(shape):
    """With G = U S Vᵀ the result must be U S' Vᵀ, S' in about [0.7, 1.2], so UᵀXV is diagonal."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    inner = U.mT @ orthogonalise(G) @ Vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert float((inner - torch.diag_embed(values)).abs().max()) < 1e-9
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_one_muon_step_by_hand():
    """1 × 1 matrix, gradient 3, zero momentum: the buffer is 0.05·3, the Nesterov update positive; orthogonalised, its
    value is f⁵(1) with f(x) = 3.4445x − 4.775x³ + 2.0315x⁵. Decay takes lr·wd = 0.01 of the weight 2."""
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    p = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    p.grad = torch.tensor([[3.0]], dtype=torch.float64)
    Muon([p], lr=0.1, momentum=0.95, weight_decay=0.1).step()
    assert float(p) == pytest.approx(2 * 0.99 - 0.1 * value, abs=1e-6)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_everything_else():
    model = Model(SMALL, scalar_head=True)
    optimizer = Optimizer(model, OptimConfig(), 10)
    names = {id(p): n for n, p in model.named_parameters()}
    muon = {names[id(p)] for g in optimizer.parts[1].param_groups for p in g["params"]}
    adam = {names[id(p)] for g in optimizer.parts[0].param_groups for p in g["params"]}
    assert muon == {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
    assert muon | adam == set(names.values()) and not muon & adam
    assert "model.embed_tokens.weight" in adam and "score.weight" in adam
    assert len(Optimizer(model, OptimConfig(muon_lr=0), 10).parts) == 1


def test_the_schedule_rises_holds_and_falls_to_its_last_share():
    config = OptimConfig(warmup=0.2, decay=0.4, final=0.1)
    rates = [learning_rate(s, 10, config) for s in range(10)]
    assert rates[0] == pytest.approx(0.5) and rates[1:7] == pytest.approx([1.0] * 6)
    assert rates[7:] == pytest.approx([0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.25])


def fit(model, optimizer, steps):
    tokens, cu_seqlens = torch.arange(20), torch.tensor([0, 20], dtype=torch.int32)
    for step in steps:
        (-model.logprobs(tokens, cu_seqlens)[0].mean()).backward()
        optimizer.step(step)


def test_a_restored_optimizer_goes_on_bit_for_bit():
    straight, first = Model(SMALL), Model(SMALL)
    fit(straight, Optimizer(straight, OptimConfig(), 6), range(6))
    half = Optimizer(first, OptimConfig(), 6)
    fit(first, half, range(3))
    second = Model(SMALL, seed=9)
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, OptimConfig(), 6)
    resumed.load_state_tensors({k: v.clone() for k, v in half.state_tensors().items()})
    fit(second, resumed, range(3, 6))
    for (name, a), b in zip(straight.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name


def test_a_gradient_that_is_not_finite_stops_the_training():
    model = Model(SMALL)
    optimizer = Optimizer(model, OptimConfig(), 1)
    model.head_weight.grad = torch.full_like(model.head_weight, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        optimizer.step(0)


SHAPES = [(), (1,), (15,), (16, 16), (3, 0), (33, 7), (130, 257)]  # the last is more than one run of a kernel


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, lambda: [setattr(p, "grad", torch.randn(p.shape, generator=generator).to(dtype)) for p in params]


def three_steps(optimizer, params, renew, **given):
    for _ in range(3):
        renew()
        optimizer.step(**given)
    return [p.detach().double() for p in params]


def forced(backend, work):
    before = ops.backend.force(backend)
    try:
        return work()
    finally:
        ops.backend.force(before)


def test_adamw_is_torchs_within_rounding():
    choice = dict(lr=0.03, betas=(0.8, 0.95), weight_decay=0.1)
    results = []
    for kind, dtype in ((torch.optim.AdamW, torch.float64), (torch.optim.AdamW, torch.float32), (AdamW, torch.float32)):
        params, renew = parameters(dtype=torch.float32)
        with torch.no_grad():
            params = [torch.nn.Parameter(p.to(dtype)) for p in params]
        single, (sources, renew) = params, parameters()

        def fresh(renew=renew, sources=sources, params=params):
            renew()
            for p, source in zip(params, sources):
                p.grad = source.grad.to(p.dtype)

        results.append(three_steps(kind(single, **choice), single, fresh))
    for exact, theirs, ours in zip(*results, strict=True):
        if exact.numel():
            assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[(16, 16)] * 3, [(33, 7), (7, 33), (33, 7)], [(1, 5)]])
def test_muon_is_torchs(shapes, dtype):
    """torch's own is always in bf16, which moves an update's elements by about one hundredth."""
    results = []
    for make in (lambda p: torch.optim.Muon(p, 0.1, 0.1, 0.9), lambda p: Muon(p, 0.1, 0.9, 0.1, dtype)):
        params, renew = parameters(shapes)
        results.append(three_steps(make(params), params, renew))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.1), lambda p: Muon(p, 0.1, weight_decay=0.1)])
def test_the_reference_does_the_same_and_so_does_any_layout_or_number_of_threads(make):
    shapes = [(33, 7), (130, 257), (130, 257)]

    def run(threads=torch.get_num_threads(), turned=False):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params, renew = parameters(shapes)

        def fresh():
            renew()
            for p in params if turned else []:
                p.grad = p.grad.T.contiguous().T

        result = three_steps(make(params), params, fresh, scale=0.5)
        torch.set_num_threads(before)
        return result

    ours, plain = run(), forced("reference", run)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, run(turned=True), rtol=0, atol=0)
    if make([torch.nn.Parameter(torch.ones(1, 1))]).__class__ is AdamW:  # torch's products may add in another order
        torch.testing.assert_close(ours, run(threads=1), rtol=0, atol=0)


def test_a_parameter_that_does_not_lie_flat_is_updated_all_the_same():
    turned = torch.nn.Parameter(torch.ones(4, 3).T)
    turned.grad = torch.ones(3, 4)
    AdamW([turned], lr=0.5, weight_decay=0.0).step()
    torch.testing.assert_close(turned.detach(), torch.full((3, 4), 0.5))


def test_the_norm_is_that_of_all_gradients_and_shows_what_is_not_finite():
    gradients = [p.detach() for p in parameters()[0]]
    exact = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert ops.optim.gradient_norm(gradients) == pytest.approx(exact, rel=1e-6)
    assert ops.optim.gradient_norm([]) == 0
    assert forced("reference", lambda: ops.optim.gradient_norm(gradients)) == pytest.approx(exact, rel=1e-5)
    for bad in (torch.nan, torch.inf):
        gradients[3][7, 7] = bad
        assert not ops.optim.gradient_norm(gradients) < torch.inf


def test_a_parameter_without_gradient_keeps_its_value_and_its_count():
    params, renew = parameters([(4, 4), (4, 4)])
    optimizer = AdamW(params, lr=0.1)
    renew()
    params[1].grad, before = None, params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and not optimizer.state[params[1]]
    renew()
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 1]


def test_an_update_is_seen_by_autograd():
    """The kernels write behind torch's back; a graph that saved the old weight must refuse."""
    for make in (AdamW, lambda p, lr: Muon(p, lr)):
        (p,), renew = parameters([(4, 4)])
        loss = (p * p).sum()
        renew()
        make([p], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_copied_model_trains_apart_from_its_source():
    model = Model(SMALL)
    other = copy.deepcopy(model)
    fit(model, Optimizer(model, OptimConfig(), 2), range(2))
    for a, b in zip(other.parameters(), Model(SMALL).parameters()):
        assert torch.equal(a, b)
