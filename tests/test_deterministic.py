"""The claim of ops.backend.deterministic: a token's log-prob is the same bits in prefill, decode and training, whatever the batch."""

import pytest
import torch

from nanorlhf import ops
from nanorlhf.config import preset
from nanorlhf.engine.sample import SamplingConfig
from nanorlhf.engine.generate import generate, ragged
from nanorlhf.ops import backend
from nanorlhf.run import open_run
from test_backend import ISAS, python
from tiny import model

# Tokens are generated across the edges of tiles (16, 32 queries) and passes (128, 256 keys).
CLAIM = """
import sys
import torch
from nanorlhf import _C, ops
from nanorlhf.config import ModelConfig
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model

assert _C.isa() == sys.argv[1]
ops.backend.deterministic(sys.argv[2] == "on")
torch.manual_seed(0)
LENGTHS = [1, 14, 30, 31, 33, 60, 124, 128, 252, 257]
SHAPE = dict(vocab_size=333, layers=2, context=300, intermediate_size=100)
MODELS = [
    dict(hidden_size=64, heads=4, kv_heads=2, head_size=32),
    dict(hidden_size=48, heads=3, kv_heads=1, head_size=24, qk_norm=False, tied=False),
    dict(hidden_size=64, heads=2, kv_heads=2, head_size=40, qk_norm=False, variant="gpt2"),
]

def logprobs(net, sequences, grad):
    with torch.set_grad_enabled(grad):
        values = net.logprobs(*ragged(sequences), temperature=0.7)[0].detach()
    return values.split([len(s) - 1 for s in sequences])

for config in MODELS:
    for dtype in (torch.float32, torch.bfloat16):
        net = Model(ModelConfig(**SHAPE, **config), dtype=dtype)
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)  # norms and biases are something too
        prompts = [torch.randint(0, 333, (n,)).tolist() for n in LENGTHS]
        seen = {}
        for threads, batch in [(1, 1), (1, 3), (1, 10), (2, 10), (3, 7)]:
            torch.set_num_threads(threads)
            drawn = generate(net, prompts, 6, sampling=SamplingConfig(0.7), seed=5, batch=batch)
            seen[threads, batch] = [(c.ids, c.logprobs) for c in drawn]
        first = seen[1, 1]
        assert all(other == first for other in seen.values()), "decoding depends on its batch"
        whole = [p + ids for p, (ids, _) in zip(prompts, first)]
        for threads, order in [(1, [[i] for i in range(10)]), (2, [list(range(10))]), (3, [[7, 2, 9, 0], [5, 5, 1], [8, 6, 4, 3]])]:
            torch.set_num_threads(threads)
            for rows in order:
                for i, found in zip(rows, logprobs(net, [whole[i] for i in rows], threads == 2)):
                    reported = torch.tensor(first[i][1])
                    assert torch.equal(found[len(prompts[i]) - 1:], reported), (config, dtype, threads, rows, i)
"""


@pytest.fixture
def deterministic():
    before = backend.deterministic(True)
    yield
    backend.deterministic(before)


@pytest.mark.parametrize("isa", ISAS)
def test_log_probs_of_the_engine_are_those_of_training_to_the_last_bit(isa):
    done = python(CLAIM, isa, "on", NANORLHF_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_without_it_they_are_not():
    assert "AssertionError" in python(CLAIM, ISAS[-1], "off", NANORLHF_ISA=ISAS[-1]).stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_attends_as_training_does(deterministic, dtype):
    """Each query of sequences of 1 to 300 keys, from a cache with strides of its own and NaN behind the end; none gives zeros."""
    q, k, v = (torch.randn(300, heads, 40).to(dtype) for heads in (6, 2, 2))
    whole = ops.attention(q, k, v, torch.tensor([0, 300], dtype=torch.int32), scale=-0.3)
    lengths = torch.tensor([0, *range(1, 300, 13), 128, 256, 300], dtype=torch.int32)
    cache = torch.full((len(lengths), 2, 2, 310, 44), torch.nan, dtype=dtype)
    for row, n in enumerate(lengths.tolist()):
        cache[row, 0, :, :n, :40], cache[row, 1, :, :n, :40] = k[:n].transpose(0, 1), v[:n].transpose(0, 1)
    keys, values = (cache[:, i, :, :, :40].transpose(1, 2) for i in (0, 1))
    out = ops.attention_decode(q[lengths.long() - 1], keys, values, lengths, scale=-0.3)
    assert torch.equal(out[1:], whole[lengths[1:].long() - 1]) and not out[0].any()


def test_a_filtered_distribution_keeps_its_own_log_probs(deterministic):
    greedy, filtered = (generate(model(), [[1, 2, 3]], 4, sampling=SamplingConfig(**s))[0] for s in ({"temperature": 0}, {"top_k": 1}))
    assert greedy.logprobs == filtered.logprobs == [0.0] * 4 and greedy.ids == filtered.ids


def test_training_learns_as_it_does_without(deterministic):
    gradients = []
    for on in (True, False):
        backend.deterministic(on)
        torch.manual_seed(0)  # which biases start from
        net = model(1, variant="gpt2", qk_norm=False)
        net.logprobs(*ragged([[1, 2, 3, 4], [5, 6, 7]]))[0].sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_where_no_kernel_runs_it_says_so(deterministic):
    with pytest.raises(ValueError, match="linear: deterministic needs the CPU kernels, and they cannot run here: .* not torch.float64"):
        ops.linear(torch.zeros(1, 2, dtype=torch.float64), [torch.eye(2)])
    before = backend.force("reference")
    try:
        with pytest.raises(ValueError, match="attention_decode: deterministic needs .*: NANORLHF_BACKEND=reference"):
            x = torch.zeros(1, 1, 1, 4)
            ops.attention_decode(x[0], x, x, torch.ones(1, dtype=torch.int32))
    finally:
        backend.force(before)


def test_a_run_turns_it_on_and_refuses_another_device(tmp_path):
    before = backend.is_deterministic()
    try:
        for on in (True, False):
            open_run(preset("tiny", out=str(tmp_path / str(on)), deterministic=on, device="cpu"))
            assert backend.is_deterministic() == on
        with pytest.raises(ValueError, match="deterministic needs the CPU kernels: ask for device cpu instead of meta"):
            open_run(preset("tiny", out=str(tmp_path / "no"), deterministic=True, device="meta"))
    finally:
        backend.deterministic(before)
