"""Muon, AdamW's grouping, the schedule and resuming."""

import pytest
import torch

from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.optim import Muon, Optimizer, is_hidden_matrix, learning_rate, orthogonalise

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
