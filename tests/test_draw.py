"""engine/draw.py: the log-probs that training will find, for the rows that draw from the policy itself."""

import numpy as np
import pytest
import torch

from nanorlhf import ops
from nanorlhf.engine import Request, SamplingConfig
from nanorlhf.engine.batch import Batch
from nanorlhf.engine.draw import draw, logits_of
from nanorlhf.engine.request import Handle
from nanorlhf.ops import backend
from tiny import model

CONFIGS = [SamplingConfig(), SamplingConfig(0), SamplingConfig(0.7), SamplingConfig(top_k=3), SamplingConfig(repetition_penalty=2.0)]


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_each_row_draws_by_its_own_settings(fixed):
    before = backend.deterministic(fixed)
    try:
        net, hidden = model(), torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 3
        batch = Batch(5, 8, 23, 9, 4, torch.device("cpu"))
        for i, config in enumerate(CONFIGS):
            batch.join(Handle(Request([4, 5], 3, config, 1, i), 3, None), np.array([i], np.int32), 2)
        batch.compose()
        tokens, marks, top = draw(net, logits_of(hidden, net.head_weight.detach()), hidden, batch, 0)
        assert top is None and marks.shape == (3, 5)
        logits = hidden.double() @ net.head_weight.double().T
        temperature = [1, 1, 0.7, 1, 1]
        for i, token in enumerate(tokens.tolist()):
            policy = (logits[i] / temperature[i]).log_softmax(-1)
            assert marks[1, i] == pytest.approx(float(policy[token]), abs=1e-4)
        assert tokens[1] == logits[1].argmax() and marks[0, 1] == 0 and tokens[3] in logits[3].topk(3)[1]
        for i in (0, 2):
            trained = ops.token_logprobs(hidden[i:i + 1], net.head_weight, tokens[i:i + 1], temperature[i])[0]
            assert float(marks[0, i]) == (float(trained) if fixed else pytest.approx(float(trained), abs=1e-5))
        alone = draw(net, logits_of(hidden[3:], net.head_weight.detach()), hidden[3:], batch, 3)
        assert alone[0].tolist() == tokens[3:].tolist()
    finally:
        backend.deterministic(before)
