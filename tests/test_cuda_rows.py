"""The CUDA kernels of rows (csrc/softmax.cu, loss.cu, norm.cu, swiglu.cu, rope.cu, embedding.cu) on the emulator."""

import math

import pytest
import torch

import emulated
from nanorlhf import ops
from nanorlhf.ops.embedding import embedding_reference
from nanorlhf.ops.loss import logits_logprobs_reference
from nanorlhf.ops.norm import add_rms_norm_reference, rms_norm_reference
from nanorlhf.ops.rope import rope_qkv_reference, rope_reference
from nanorlhf.ops.softmax import softmax_reference
from nanorlhf.ops.swiglu import swiglu_reference
from oracle import assert_earned

DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(autouse=True)
def cuda():
    with emulated.kernels() as module:
        yield module


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def unaligned(x):
    """The same values, contiguous, from an address that is a multiple of the element's size only."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def results_of_seeds(cuda, run):
    results = []
    for seed in range(4):
        cuda.seed(seed)
        results.append(run())
    return results


def assert_same_bits(results):
    """Lists of tensors: NaN equals NaN."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Every way of holding a row: a part of a warp, a warp, blocks of all sizes, by 16 bytes and by one element, and longer.
COLUMNS = [1, 3, 8, 17, 64, 100, 136, 256, 264, 513, 520, 1000, 2056, 4104, 8200, 9001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_softmax_matches_the_oracle_for_rows_of_all_lengths(columns, dtype):
    assert_earned(ops.softmax, softmax_reference, [3 * normal(9 if columns < 1000 else 2, columns)], dtype)


@pytest.mark.parametrize(("columns", "dtype"), [(16400, torch.float32), (40000, torch.float32), (40001, torch.bfloat16),
                                                (65544, torch.bfloat16), (70001, torch.bfloat16), (131072, torch.float32)])
def test_softmax_matches_the_oracle_for_rows_longer_than_registers(columns, dtype):
    assert_earned(ops.softmax, softmax_reference, [3 * normal(1, columns)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_takes_what_no_kernel_likes(dtype):
    assert ops.softmax(torch.zeros(0, 4, dtype=dtype)).shape == (0, 4)
    many = 3 * normal(1030, 24).to(dtype)
    torch.testing.assert_close(ops.softmax(many), softmax_reference(many))
    shifted = unaligned(many)
    assert shifted.data_ptr() % 16 and torch.equal(ops.softmax(shifted), ops.softmax(shifted))
    torch.testing.assert_close(ops.softmax(shifted), softmax_reference(many))
    assert ops.softmax(torch.tensor([1e4, 0.0], dtype=dtype)).tolist() == [1, 0]
    assert ops.softmax(torch.full((40,), -1e30, dtype=dtype)).unique().numel() == 1
    assert ops.softmax(torch.tensor([-math.inf, 2.0], dtype=dtype)).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_that_are_no_multiple_of_16_bytes(dtype):
    """The same values from elsewhere; sums may be taken in another order."""
    x, weight, positions = normal(6, 64).to(dtype), normal(64, seed=1), torch.arange(6)

    def run(place):
        leaf, scale = place(x).requires_grad_(), place(weight).requires_grad_()
        outputs = [ops.softmax(leaf), ops.rms_norm(leaf, scale), *ops.add_rms_norm(leaf, leaf, scale), ops.swiglu(leaf, leaf),
                   *ops.logits_logprobs(leaf, positions), ops.rope(leaf.view(6, 2, 32), positions),
                   *ops.rope_qkv(*[leaf.view(6, 2, 32)] * 3, positions, 1e4, scale[:32], scale[32:]),
                   ops.embedding(positions, leaf), ops.embedding(positions, leaf, torch.float32)]  # fmt: skip
        gradients = torch.autograd.grad([y for y in outputs], [leaf, scale], [place(normal(*y.shape).to(y.dtype)) for y in outputs])
        return [y.detach() for y in outputs] + list(gradients)

    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for got, expected in zip(run(unaligned), run(torch.clone), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


def minus_infinity_and_nan(columns, dtype):
    """Row 1 is -inf alone, row 3 has one NaN; and the same without those."""
    clean = normal(5, columns).to(dtype)
    x = clean.clone()
    x[1], x[3, columns // 2] = -math.inf, NAN
    return x, clean, [0, 2, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 1500, 9000, 70000])
def test_minus_infinity_alone_in_a_row_and_nan_stay_in_their_row(columns, dtype):
    x, clean, sound = minus_infinity_and_nan(columns, dtype)
    y = ops.softmax(x)
    assert y[[1, 3]].isnan().all() and torch.equal(y[sound], ops.softmax(clean)[sound])
    targets = torch.zeros(5, dtype=torch.int64)
    for got, expected in zip(ops.logits_logprobs(x, targets), ops.logits_logprobs(clean, targets), strict=True):
        assert got[[1, 3]].isnan().all() and torch.equal(got[sound], expected[sound])
    norm = [ops.rms_norm(z, torch.ones(columns)) for z in (x, clean)]
    assert norm[0][3].isnan().all() and torch.equal(norm[0][sound], norm[1][sound])


def lane(size):
    memory = torch.full((max(size, 1),), 255, dtype=torch.uint8)
    return memory, (0, 0, memory.data_ptr(), size)


def softmax_with(cuda, x, size):
    y, (memory, where) = torch.full_like(x, NAN), lane(size)
    cuda.softmax(False, *x.shape, ops.backend.DTYPES[x.dtype], x.data_ptr(), 0, y.data_ptr(), where)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [70000, 65537])
def test_a_few_long_rows_are_shared_by_blocks_where_there_is_room_for_their_sums(columns, dtype, cuda):
    x = 5 * normal(3, columns).to(dtype)
    x[1, :40000], x[2] = -math.inf, -math.inf  # whole parts, and all of them
    size = cuda.softmax_workspace(3, columns)
    assert size > 0 == cuda.softmax_workspace(132, columns)
    for y in (softmax_with(cuda, x, size), softmax_with(cuda, x, 0)):
        torch.testing.assert_close(y, softmax_reference(x), equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 15, 17, 64, 1025, 2048, 5000, 40000, 40007])
def test_logprobs_and_entropy_match_the_oracle(columns, dtype, temperature):
    rows = 9 if columns < 2000 else 2
    targets = integers(columns, rows)
    assert_earned(
        lambda x: ops.logits_logprobs(x, targets, temperature),
        lambda x: logits_logprobs_reference(x, targets, temperature),
        [3 * normal(rows, columns)], dtype,
    )  # fmt: skip


def loss(cuda, logits, targets, temperature=1.0, grads=None, size=None):
    """(logprob, entropy, lse), and with three grads the gradient that took the logits' place."""
    rows, columns = logits.shape
    logprob, entropy = torch.full((2, rows), NAN)
    lse = torch.full((rows,), NAN, dtype=torch.float64)
    memory, where = lane(cuda.loss_workspace(rows, columns) if size is None else size)
    arguments = (rows, columns, logits.stride(0), ops.backend.DTYPES[logits.dtype], logits.data_ptr(), targets.data_ptr(), temperature,
                 logprob.data_ptr(), entropy.data_ptr(), lse.data_ptr())  # fmt: skip
    cuda.loss(False, *arguments, 0, 0, 0, where)
    if grads is not None:
        cuda.loss(True, *arguments, *(g.data_ptr() for g in grads), where)
    return logprob, entropy, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "stride"), [(40, 48), (40, 41), (33, 40), (40000, 40008)])
def test_rows_of_logits_may_lie_apart_and_what_is_between_them_is_left_alone(columns, stride, dtype, cuda):
    room = torch.full((3, stride), NAN, dtype=dtype)
    logits = room[:, :columns].copy_(2 * normal(3, columns))
    wide, targets, grads = logits.double().requires_grad_(), integers(columns, 3), normal(3, 3)
    expected = logits_logprobs_reference(wide, targets)
    lse = wide.logsumexp(-1)
    (gradient,) = torch.autograd.grad([*expected, lse], wide, list(grads.double()))
    logprob, entropy, own_lse = loss(cuda, logits, targets, grads=grads)
    for got, want in zip((logprob, entropy, own_lse), (*expected, lse), strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    assert room[:, columns:].isnan().all()


@pytest.mark.parametrize("columns", [40, 40000])
def test_a_target_out_of_range_gives_nan_for_its_row_alone(columns, cuda):
    logits = normal(5, columns)
    clean = logits.clone()
    targets = torch.tensor([1, -1, 2, columns, 2**40])
    logprob, *rest = loss(cuda, logits, targets, grads=torch.ones(3, 5))
    sound = targets.clamp(0, 3)
    expected, *others = loss(cuda, clean, sound, grads=torch.ones(3, 5))
    assert logprob.isnan().tolist() == [False, True, False, True, True] and torch.equal(logprob[[0, 2]], expected[[0, 2]])
    assert_same_bits([rest, others])
    assert logits[[1, 3, 4]].isnan().all() and torch.equal(logits[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("columns", [2, 17, 1030, 40000])
def test_logits_of_minus_infinity_but_one_are_certain(columns):
    x = torch.full((1, columns), -math.inf)
    x[0, columns - 1] = -5.0
    x.requires_grad_()
    logprobs, entropy = ops.logits_logprobs(x, torch.tensor([columns - 1]))
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == entropy.item() == 0 and x.grad.eq(0).all()
    assert ops.softmax(x.detach()).tolist() == [[0.0] * (columns - 1) + [1.0]]


def test_logprobs_are_never_positive_and_entropies_never_negative():
    for columns in (300, 40000):
        for scale in (1e-3, 1.0, 30.0, 1e4, 5e37):
            logits = scale * normal(3, columns, seed=2)
            logprobs, entropy = ops.logits_logprobs(logits, logits.argmax(-1))
            assert (logprobs <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(columns) + 1e-5).all()


def test_infinite_equal_and_huge_logits():
    logits = torch.tensor([[-math.inf, 1e4, -math.inf, 1e4]], requires_grad=True)
    logprob, entropy = ops.logits_logprobs(logits, torch.tensor([3]))
    assert math.isclose(logprob.item(), -math.log(2), abs_tol=1e-6) and math.isclose(entropy.item(), math.log(2), abs_tol=1e-6)
    (logprob + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5, 0.0, 0.5]]))
    assert ops.logits_logprobs(logits.detach(), torch.tensor([0]))[0].item() == -math.inf
    assert ops.logits_logprobs(torch.full((1, 3), -1e30), torch.tensor([0]))[0].item() == pytest.approx(-math.log(3))


def test_a_rows_logprob_does_not_depend_on_how_many_there_are(cuda):
    logits, targets = normal(150, 33000), integers(33000, 150)
    many, one = loss(cuda, logits, targets), loss(cuda, logits[:1].clone(), targets[:1])
    assert all(torch.equal(a[:1], b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (0, 8), (300, 64), (2, 3, 17), (40, 256), (9, 264), (20, 1000), (7, 1032), (3, 2056),
                                   (3, 4104), (2, 8200), (2, 16392)])  # fmt: skip
def test_norms_match_the_oracle_with_and_without_a_residual(shape, dtype):
    x, residual, weight = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    assert_earned(lambda *a: ops.rms_norm(*a), lambda *a: rms_norm_reference(*a), (x, weight), dtype)
    assert_earned(lambda *a: ops.add_rms_norm(*a), lambda *a: add_rms_norm_reference(*a), (x, residual, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40000, 70000])
def test_norms_of_rows_longer_than_registers(columns, dtype):
    inputs = normal(2, columns), normal(2, columns, seed=1), normal(columns, seed=2)
    assert_earned(lambda *a: ops.add_rms_norm(*a), lambda *a: add_rms_norm_reference(*a), inputs, dtype)


def test_a_norm_worked_by_hand_and_a_stream_that_ends():
    """(1, 4) + (2, 0) = (3, 4): the mean square is 25/2; dy_1/dx = sqrt(2) (1/5 - 3 * 3/125, -3 * 4/125)."""
    x, residual = torch.tensor([[1.0, 4.0]], requires_grad=True), torch.tensor([[2.0, 0.0]], requires_grad=True)
    y, total = ops.add_rms_norm(x, residual, torch.ones(2), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 * math.sqrt(2) / 5, 4 * math.sqrt(2) / 5]]))
    assert total.tolist() == [[3.0, 4.0]]
    (dx,) = torch.autograd.grad(y[0, 0], x, retain_graph=True)
    torch.testing.assert_close(dx, math.sqrt(2) * torch.tensor([[16 / 125, -12 / 125]]))
    assert torch.autograd.grad(total[0, 1], x)[0].tolist() == [[0.0, 1.0]]
    assert ops.rms_norm(torch.zeros(2, 8), torch.ones(8)).eq(0).all()


def test_more_rows_than_one_round_of_blocks():
    x, weight = normal(4700, 8), normal(8, seed=1)
    assert_earned(lambda *a: ops.rms_norm(*a), lambda *a: rms_norm_reference(*a), (x, weight), roundings=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (4, 16), (7, 300), (0, 8), (2, 5000)])
def test_swiglu_matches_the_oracle(shape, dtype):
    assert_earned(ops.swiglu, swiglu_reference, (4 * normal(*shape), normal(*shape, seed=1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 13])
def test_swiglu_of_halves_of_one_product_and_its_gradient(columns, dtype):
    product = normal(5, 2 * columns).to(dtype).requires_grad_()
    results = [op(*product.chunk(2, 1)) for op in (ops.swiglu, swiglu_reference)]
    gradients = [torch.autograd.grad(y, product, normal(5, columns, seed=3).to(dtype))[0] for y in results]
    for a, b in (results, gradients):
        torch.testing.assert_close(a, b)


def test_extreme_gates_neither_overflow_nor_turn_to_nan():
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0]], requires_grad=True)
    out = ops.swiglu(gate, torch.ones(1, 6))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 200.0]]))
    out.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 2), (5, 3, 30), (40, 2, 32), (9, 4, 34), (300, 2, 64), (0, 2, 8), (3, 2, 640),
                                         (2, 1, 70)])  # fmt: skip
def test_rope_matches_the_oracle(N, H, D, dtype):
    positions, x = integers(3000, N), normal(N, H, D)
    assert_earned(lambda x: ops.rope(x, positions), lambda x: rope_reference(x, positions), (x,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("N", "H", "Hkv", "D"), [(1, 1, 1, 2), (5, 3, 1, 30), (30, 4, 2, 32), (9, 2, 2, 34), (40, 2, 1, 128), (0, 2, 1, 8),
                                                  (3, 2, 1, 640), (3, 1, 2, 130), (300, 1, 1, 512)])  # fmt: skip
def test_queries_and_keys_of_one_product_match_the_oracle(N, H, Hkv, D, normed, dtype):
    positions, packed = integers(3000, N), normal(N, (H + 2 * Hkv) * D)
    weights = [normal(D, seed=i) for i in range(2 * normed)]

    def through(op):
        def run(packed, *weights):
            q, k, v = packed.unflatten(1, (-1, D)).split([H, Hkv, Hkv], 1)
            return op(q, k, v, positions, 1e4, *weights)

        return run

    assert_earned(through(ops.rope_qkv), through(rope_qkv_reference), (packed, *weights), dtype)


def test_angles_are_exact_far_out_and_position_zero_is_left_alone():
    """A quarter turn for each of the four quadrants, and positions that fp32 cannot tell from their neighbours."""
    quarter = ops.rope(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]).expand(4, 1, 4), torch.arange(4), base=(2 / math.pi) ** 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(quarter[:, 0, 1::2], expected, rtol=0, atol=1e-6)
    x, far = normal(6, 2, 32), torch.tensor([0, 2**20 + 1, 2**24 + 1, 2**25 + 3, 10**9 + 7, 4])
    turned = ops.rope(x, far)
    assert torch.equal(turned[0], x[0])
    torch.testing.assert_close(turned, rope_reference(x, far), rtol=1e-5, atol=2e-6)


def test_a_negative_position_gives_nan_for_its_token_alone():
    x = normal(3, 2, 8)
    out = ops.rope(x, torch.tensor([4, -1, 5]))
    assert out[1].isnan().all() and torch.equal(out[[0, 2]], ops.rope(x[[0, 2]], torch.tensor([4, 5])))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V", "C"), [(0, 3, 4), (1, 1, 1), (40, 7, 15), (300, 1000, 17), (99, 50, 64)])
def test_rows_by_id_are_torchs_to_the_last_bit(N, V, C, dtype, to):
    weight, ids = normal(V, C).to(dtype), integers(V, N)
    assert torch.equal(ops.embedding(ids, weight, to), torch.nn.functional.embedding(ids, weight).to(to))


def test_copied_rows_keep_every_bit_whatever_they_mean():
    for dtype, whole in zip(DTYPES, (torch.int32, torch.int16), strict=True):
        for columns in (8, 5):
            bits = torch.tensor([0x7F81, -2, 1, 0, -0x8000, 0x7FFF, 3, 4][:columns], dtype=torch.int64)
            bits = (bits << 16 if whole == torch.int32 else bits).to(whole)
            assert torch.equal(ops.embedding(torch.tensor([0]), bits.view(dtype)[None]).view(whole)[0], bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V", "C"), [(1, 1, 1), (500, 3, 15), (2000, 100, 40), (3000, 70000, 2), (9, 300, 16), (128, 1, 8),
                                         (1100, 3, 136)])  # fmt: skip
def test_gradients_of_rows_are_added_in_the_order_of_the_tokens(N, V, C, dtype):
    ids, dout = integers(V, N) * (integers(3, N, seed=1) > 0), normal(N, C).to(dtype)
    weight = torch.zeros(V, C, requires_grad=True)
    ops.embedding(ids, weight, dtype).backward(dout)
    expected = torch.zeros(V, C)
    for n in range(N):
        expected[ids[n]] += dout[n].float()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_matches_the_oracle(dtype):
    ids = integers(30, 200)
    assert_earned(lambda w: ops.embedding(ids, w), lambda w: embedding_reference(ids, w), (normal(30, 24),), dtype)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_out_of_range_gives_nan_and_no_gradient(dtype, to):
    ids, weight = torch.tensor([0, -1, 256, 2**40, 1]), normal(256, 16).to(dtype).requires_grad_()
    out = ops.embedding(ids, weight, to)
    assert out[1:4].isnan().all() and torch.equal(out[[0, 4]], weight[[0, 1]].to(to))
    out.backward(torch.ones_like(out))
    assert weight.grad[:2].eq(1).all() and weight.grad[2:].eq(0).all()


def test_no_bit_depends_on_the_order_of_threads(cuda):
    """Four orders; the workspaces hold NaN each time."""
    ids, positions = integers(300, 2100), integers(500, 60)

    def run():
        weight, scale, x = normal(300, 40).requires_grad_(), normal(520).requires_grad_(), normal(60, 520).requires_grad_()
        qk = normal(60, 3, 64).requires_grad_()
        heads = [normal(64, seed=i).requires_grad_() for i in (1, 2)]
        outputs = [ops.embedding(ids, weight), ops.rms_norm(x, scale), ops.softmax(x), ops.swiglu(x, x),
                   *ops.logits_logprobs(x, ids[:60]), *ops.rope_qkv(qk, qk, qk, positions, 1e4, *heads)]  # fmt: skip
        loss = sum((y * y).sum() for y in outputs)
        return [y.detach() for y in outputs] + list(torch.autograd.grad(loss, [weight, scale, x, qk, *heads]))

    results = results_of_seeds(cuda, run)
    assert_same_bits(results)
    assert all(r.isfinite().all() for r in results[0])


def test_a_workspace_too_small_is_refused(cuda):
    memory, where = lane(16)
    x = torch.zeros(4, 64)
    with pytest.raises(ValueError, match="rms_norm: expected a workspace of 1024 bytes, got 16"):
        cuda.norm(True, 4, 64, 0, *[x.data_ptr()] * 3, 0.0, *[x.data_ptr()] * 7, where)
