"""engine/graph.py: a step that is repeated in the same memory draws what an eager one does, through the whole engine.

On the CPU a Tape stands for the capture: it repeats the very operations on the very tensors that it saw, and refuses to wait for a value.
"""

import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanorlhf import ops
from nanorlhf.config import OptimConfig
from nanorlhf.engine import Engine, Request, SamplingConfig, graph
from nanorlhf.model import Model
from nanorlhf.optim import Optimizer
from test_engine import Alternating, V as BYTES, empty
from tiny import SHAPE, model, random_sequences

GREEDY = SamplingConfig(temperature=0)
MIXED = [SamplingConfig(), GREEDY, SamplingConfig(temperature=0.7, top_k=5), SamplingConfig(top_p=0.8), SamplingConfig(1.3, min_p=0.05)]


class Tape(TorchDispatchMode):
    """As a CUDA graph does it: operations with the addresses and numbers that they were called with, and none in between."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is waited for")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]))
        return out

    def replay(self):
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, tree_leaves(func(*args, **kwargs))):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():  # neither in place nor a view
                    old.copy_(new)


class Taping:
    """A Capture, and how often it was one."""

    count = 0

    def __call__(self, run):
        with Tape() as tape:
            run()
        self.count += 1
        return tape.replay


@pytest.fixture(autouse=True)
def rows_by_themselves(monkeypatch):
    """Products and a GELU whose rows do not depend on how many there are, as torch's do, and a sampler that a tape can see."""
    linear, sample, steps = (sys.modules[f"nanorlhf.{name}"] for name in ("ops.linear", "ops.sample", "engine.steps"))

    def product(x, rows, biases, sizes):
        return torch.split_with_sizes(ops.matmul(x, rows, torch.cat(list(biases)) if biases else None), sizes, -1)

    monkeypatch.setattr(linear, "_product", product)
    monkeypatch.setattr(steps, "logits_of", lambda hidden, head: ops.matmul(hidden.float(), head.float()))
    monkeypatch.setattr(sys.modules["nanorlhf.model"], "gelu", lambda x: ops.swiglu(x * 1.702, 1 / torch.full_like(x, 1.702)))
    monkeypatch.setattr(sample, "_sample", sample._sample_op)
    monkeypatch.setattr(steps, "packed_decoder", lambda model: None)


def engine_of(net, capture, **options):
    made = Engine(net, graphs=capture, **options)
    if capture:
        made.steps._graphs.patience = 0
    return made


def requests(count, sampling=MIXED, longest=14, **more):
    """Of which many begin alike, and some end early by a stop token."""
    starts = random_sequences(3, 12, seed=1, shortest=8)
    tails = random_sequences(count, 5, seed=2, shortest=1)
    return [Request(starts[i % 3] + tails[i], 3 + (7 * i) % longest, sampling[i % len(sampling)], seed=5 + i % 2, stream=i,
                    stop=(1, 2) if i % 4 == 0 else (), **more) for i in range(count)]


def told(completions):
    return [(c.ids, c.logprobs, c.unfiltered, c.kept, c.finish_reason) for c in completions]


def pages_of(engine):
    """Keys and values, but those of pads."""
    return torch.stack((engine.steps.cache.k_pages, engine.steps.cache.v_pages))[:, :, :-1]


OPTIONS = [{}, {"slots": 3, "page_size": 2}, {"slots": 5, "pool_tokens": 60, "page_size": 4}, {"slots": 13, "page_size": 3, "keep": False}]


@pytest.mark.parametrize("changes", [{}, {"variant": "gpt2"}, {"qk_norm": True, "tied": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_engine_draws_the_same_bits(changes, dtype):
    """Joining and leaving, shared prefixes, pages that grow, rows put off, stops within a window."""
    net = Model(type(SHAPE)(**{**SHAPE.__dict__, **changes}), dtype=dtype)
    for options in OPTIONS:
        engines = []
        for capture in (False, Taping()):
            made = engine_of(net, capture, **options)
            made._refresh()
            made.steps.cache.k_pages.zero_(), made.steps.cache.v_pages.zero_()
            engines.append((made, told(made.run(requests(17))), pages_of(made)))
        (_, eager, pages), (made, drawn, graphs_pages) = engines
        assert drawn == eager and torch.equal(pages, graphs_pages), options
        assert made.steps._graphs._capture.count and empty(made)


def test_prefixes_are_read_through_a_graph(monkeypatch):
    shapes = []
    monkeypatch.setattr(graph, "shape_of", lambda *args, f=graph.shape_of: shapes.append(f(*args)) or shapes[-1])
    net = model()
    asked = [Request([3] * 9 + [i % 2], 8, stream=i) for i in range(6)] + [Request([4] * 8 + [i], 9, stream=i) for i in range(3)]
    eager, drawn = (told(engine_of(net, capture, page_size=4).run(asked)) for capture in (False, Taping()))
    assert drawn == eager and {s[2] for s in shapes} >= {(4, 8)} and all(s[0] in (1, 2, 4, 8, 16) for s in shapes)


def test_what_a_window_draws_after_a_stop_is_forgotten():
    """Rows of one token each way: the stop token is drawn in the middle of a window, in which others go on."""
    net = model()
    free = engine_of(net, False).run([Request([5, 6], 14, GREEDY), Request([7, 8, 9], 14, GREEDY)])
    stop = free[0].ids[4]
    first = free[0].ids.index(stop)
    made = engine_of(net, Taping())
    stopped, other = made.run([Request([5, 6], 14, GREEDY, stop=(stop,)), Request([7, 8, 9], 14, GREEDY)])
    assert stopped.ids == free[0].ids[:first + 1] and stopped.finished and other.ids == free[1].ids and empty(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimisers_step_is_seen_without_another_capture(dtype):
    """Casts of weights are made again where they are."""
    net, capture = Model(SHAPE, dtype=dtype), Taping()
    made, ids = engine_of(net, capture, slots=4), []
    optimizer = Optimizer(net, OptimConfig(lr=0.5, muon_lr=0.5, warmup=0), 3)
    asked = [Request([3 + i, 4], 20, stream=i) for i in range(4)]
    for step in range(3):
        drawn = told(made.run(asked))
        assert drawn == told(engine_of(net, False, slots=4).run(asked))
        ids.append([d[0] for d in drawn])
        if step == 0:
            captured = capture.count
        tokens = torch.arange(20) % SHAPE.vocab_size
        logprobs, _ = net.logprobs(tokens, torch.tensor([0, 20], dtype=torch.int32))
        (-logprobs.mean()).backward()
        optimizer.step(step)
    assert ids[0] != ids[1] != ids[2] and captured == capture.count > 0


def test_weights_that_lie_elsewhere_are_captured_anew():
    net, capture = model(), Taping()
    made, asked = engine_of(net, capture), [Request([3], 12), Request([4, 5], 12, stream=1)]
    made.run(asked)
    before = capture.count
    for change in (lambda: setattr(net.model.norm, "weight", torch.nn.Parameter(torch.linspace(-1, 2, SHAPE.hidden_size))),
                   lambda: net.model.layers[0].mlp.up_proj.weight.__setattr__("data", torch.ones(24, 16))):
        change()
        assert told(made.run(asked)) == told(engine_of(net, False).run(asked))
        assert capture.count > before
        before = capture.count


def test_weights_that_change_while_requests_are_under_way():
    net, drawn = model(), []
    for capture in (False, Taping()):
        torch.manual_seed(0)
        made = engine_of(net, capture)
        handles = [made.submit(r) for r in requests(6, longest=17)]
        while made.step():
            with torch.no_grad():
                net.model.norm.weight.mul_(1.01)
        with torch.no_grad():
            net.model.norm.weight.fill_(1)
        drawn.append(told(h.result() for h in handles))
    assert drawn[0] == drawn[1]


def test_what_is_not_plain_goes_eagerly():
    net = model(vocab_size=BYTES)
    for more in ({"entropy": True}, {"top_logprobs": 2}, {"constraint": Alternating(5)}, {"sampling": SamplingConfig(logit_bias=((1, 2.0),))},
                 {"sampling": SamplingConfig(repetition_penalty=1.5)}):
        capture = Taping()
        made = engine_of(net, capture)
        assert told(made.run([Request([3], 6, **more)])) == told(engine_of(net, False).run([Request([3], 6, **more)]))
        assert not capture.count
        made.run([Request([3], 6)])
        assert capture.count


def test_callbacks_are_called_for_every_token_in_order():
    net, heard = model(), []
    made = engine_of(net, Taping())
    (found,) = made.run([Request([3], 9, on_token=heard.append)])
    assert heard == found.ids == engine_of(net, False).run([Request([3], 9)])[0].ids


def test_a_capture_that_fails_is_one_warning():
    net, calls = model(), []

    def failing(run):
        calls.append(run)
        raise RuntimeError("operation not permitted")

    made = engine_of(net, failing)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs.*operation not permitted") as seen:
        drawn = told(made.run(requests(9)))
    assert drawn == told(engine_of(net, False).run(requests(9))) and len(calls) == len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.run(requests(3))


def test_references_that_wait_for_values_cannot_be_captured():
    before, net = ops.backend.force("reference"), model()
    try:
        with pytest.warns(UserWarning, match="a value is waited for"):
            engine_of(net, Taping()).run(requests(3))
        assert not graph.capturable(net)
    finally:
        ops.backend.force(before)
    assert graph.capturable(net)


def test_logits_that_are_no_distribution_leave_the_books_right():
    net, drawn = model(), []
    for capture in (False, lambda run: run):
        made = engine_of(net, capture, slots=2, keep=False)
        handles = [made.submit(Request([3 + i], 20, stream=i)) for i in range(2)]
        made.step()
        held = net.model.norm.weight.data.clone()
        with torch.no_grad():
            net.model.norm.weight.fill_(float("nan"))
        with pytest.raises(ValueError):
            made.step()
        with torch.no_grad():
            net.model.norm.weight.copy_(held)
        while made.step():
            pass
        drawn.append(told(h.result() for h in handles))
        assert empty(made)
    assert drawn[0] == drawn[1]


def test_an_error_within_a_window_loses_nothing_that_was_drawn():
    net, left = model(), [3]

    def capture(run):
        def replay():
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("the third step")
            run()

        return replay

    made = engine_of(net, capture)
    handle = made.submit(Request([3], 12))
    made._refresh()
    with pytest.raises(RuntimeError, match="third"):
        made.step()
    assert made.batch.ints[graph.STEP, 0] == 2  # the prompt's, and two steps
    while made.step():
        pass
    assert handle.result().ids == engine_of(net, False).run([Request([3], 12)])[0].ids


def test_a_shape_is_captured_once_it_has_come_often_and_the_latest_are_kept(monkeypatch):
    net, capture = model(), Taping()
    made = engine_of(net, capture)
    made.steps._graphs.patience = 20
    for expected in (0, 0, 1, 1):  # 10 steps a time: 20, at most, and then more
        made.run([Request([3], 11)])
        assert capture.count == expected
    made.steps._graphs.patience = 0
    monkeypatch.setattr(graph, "MOST_GRAPHS", 2)
    for n in (1, 2, 4, 8, 1, 1):
        made.run([Request([3], 11, stream=i) for i in range(n)])
    assert capture.count == 5 and len(made.steps._graphs._graphs) == 2  # that of one row was the oldest


def test_pads_stay_where_they_are_and_rows_move_on():
    """Rows of 3, 2 and 2 tokens; the first of 9 new ones comes with the prompt, the other 8 in a window."""
    made = engine_of(model(), Taping())
    handles = [made.submit(Request(prompt, 9, stream=i)) for i, prompt in enumerate([[3, 4, 5], [6, 7], [8, 9]])]
    assert not made.step()
    (found,) = made.steps._graphs._graphs.values()
    position, length, step, live = found.state.tolist()
    assert (position, length, step, live) == ([10, 9, 9, 0], [11, 10, 10, 1], [8, 8, 8, 0], [1, 1, 1, 0])
    assert found.table[3].unique().tolist() == [made.pool.count] and found.at.item() == 8
    assert found.tokens[:8, :3].T.tolist() == [h.result().ids[1:] for h in handles]


def test_of_a_larger_batch_nothing_is_left_in_the_pads():
    """8 rows of 3 beginnings, then 5 of 2, by the same graph."""
    made = engine_of(model(), Taping(), page_size=4)
    for count, starts in ((8, 3), (5, 2)):
        made.run([Request([3 + i % starts] * 9 + [i], 9, MIXED[i % 5], seed=i + 1, stream=i + 1) for i in range(count)])
    (found,) = made.steps._graphs._graphs.values()
    _, lengths, owner = (x.tolist() for x in found.prefix)
    assert owner == [0, 1, 0, 1, 0, -1, -1, -1] and lengths == [8, 8, 0, 0]
    settings = {name: x.tolist() for name, x in found.settings.items()}
    assert settings["temperature"][:5] == [1, 0, 0.7, 1, 1.3] and settings["seed"][:5] == [1, 2, 3, 4, 5]
    assert all(x[5:] == [graph.DEFAULTS[name]] * 3 for name, x in settings.items()) and found.streams[5:].tolist() == [0] * 3
    pads = torch.stack((found.token, *found.state))[:, 5:]
    assert (pads == pads[:, :1]).all() and (found.table[5:] == made.pool.count).all()


def test_a_machine_without_a_gpu_has_no_graphs():
    assert Engine(model()).steps._graphs is None and Engine(model(), graphs=False).steps._graphs is None


def test_casts_are_made_again_where_they_are():
    weights, casts = [torch.nn.Parameter(torch.full((2, 3), float(i))) for i in range(2)], {}
    with torch.no_grad(), ops.weights_held(casts):
        ops.linear(torch.ones(1, 3, dtype=torch.bfloat16), weights)
        (_, rows), address = next(iter(casts.values())), next(iter(casts.values()))[1].data_ptr()
        weights[1].fill_(7)
        ops.recast(casts)
    assert rows.tolist() == [[0.0] * 3] * 2 + [[7.0] * 3] * 2 and rows.data_ptr() == address


def test_a_seed_and_a_stream_of_64_bits():
    net = model()
    asked = [Request([3], 8, seed=2**63 + 5, stream=2**64 - 1), Request([3], 8, seed=-4, stream=2**63)]
    for some in (asked, asked[:1]):
        assert told(engine_of(net, Taping()).run(some)) == told(engine_of(net, False).run(some))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_on_a_gpu_is_what_it_captured(dtype, monkeypatch):
    """Bits against the same padded step called again and again: products may round by how many rows they have."""
    monkeypatch.undo()
    net, drawn = Model(SHAPE, dtype=dtype).cuda(), []
    for capture in (lambda run: run, graph.CudaCapture(net.device)):
        made = engine_of(net, capture, slots=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a capture that fails
            drawn.append([told(made.run(requests(17))) for _ in range(2)])
        assert made.steps._graphs._graphs and empty(made)
    assert drawn[0] == drawn[1]
