"""Items 1 – 12: tokens, positions, sampling, rates, seeds, data.

Sources: B = Huang et al. 2023, "The N implementation details of RLHF with PPO"; O = the code of Ziegler et al. 2019
(lm-human-preferences); S = Huang et al. 2024, "The N+ implementation details of RLHF with PPO", and its code; T = issues of TRL.
Judged on any adapter that has the method: all; with methods that only ours has so far: 2, 7, 8, 9.
"""

import math

import pytest
import torch

from .contract import assert_close, differences, gradient, need, tensor

PROMPT, ANSWERS = [3, 5, 8], ([1, 4], [6, 4, 2], [9])


def test_item_01_the_reward_model_sees_the_query_and_the_response(adapter):
    """B1. One score a conversation. The response alone, or after another query, has another score."""
    score = need(adapter, "score")
    whole = score([PROMPT + a for a in ANSWERS])
    assert whole.shape == (3,)
    assert (whole - score(list(ANSWERS))).abs().min() > 1e-4
    assert (whole - score([[2, 2, 2] + a for a in ANSWERS])).abs().min() > 1e-4


def test_item_02_the_end_of_a_turn_is_no_padding_and_is_learnt(adapter):
    """B2, S. Where padding and end are one id, masking the padding also masks the end, and no turn ever learns to end.
    Every assistant turn's last id is the end, and marked; of the user's turns nothing is."""
    ids, learn, end, _ = need(adapter, "render")([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"},
                                                  {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}])
    turns = [i for i, id in enumerate(ids) if id == end]
    assert [learn[i] for i in turns] == [0, 1, 0, 1] and len(turns) == 4


def test_item_03_log_probs_do_not_depend_on_the_company_in_the_batch(adapter):
    """B3. Positions count tokens, not padding: |Δ log-prob| < 1e-5 in fp32, alone and beside sequences of other lengths."""
    logprobs = need(adapter, "logprobs")
    batch = [[3, 5, 8, 1], [2] * adapter.longest, [7, 6], [1, 2, 3, 4, 5, 6, 7, 8]]
    for together, sequence in zip(logprobs(batch), batch):
        assert len(together) == len(sequence) - 1
        assert_close(together, logprobs([sequence])[0], 1e-5)


def test_item_04_generation_counts_positions_as_scoring_does(adapter):
    """B3. Positions shifted twice, by the caller and by generate, show as log-probs of the sampler that scoring does not find.
    Prompts of unlike lengths in one batch; each response scored by itself."""
    generate, logprobs = need(adapter, "generate", "logprobs")
    prompts = [[3], [3, 5, 8, 1, 2, 9], [4, 4]]
    for prompt, (ids, sampled, _) in zip(prompts, generate(prompts, 6)):
        assert_close(sampled, logprobs([prompt + ids])[0][len(prompt) - 1:], 1e-4)


def test_item_05_tokens_come_as_often_as_the_softmax_says_and_the_end_is_one_of_them(adapter):
    """B4, O. Pure sampling, no filter. Pearson's χ² of 20,000 first tokens over the whole vocabulary, whose chances are e^log-prob;
    for V − 1 = 22 degrees of freedom P(χ² > 58.2) is about 4e-5 (Wilson-Hilferty: z = 3.9). Without a stop id, nothing stops."""
    generate, logprobs = need(adapter, "generate", "logprobs")
    n, V = 20_000, adapter.vocab
    chances = torch.tensor([logprobs([PROMPT + [v]])[0][-1] for v in range(V)], dtype=torch.float64).exp()
    assert_close(chances.sum(), 1.0, 1e-5)
    counts = torch.bincount(torch.tensor([ids[0] for ids, _, _ in generate([PROMPT], 1, n)]), minlength=V).double()
    degrees = V - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.9 * math.sqrt(2 / (9 * degrees))) ** 3
    assert float(((counts - n * chances) ** 2 / (n * chances)).sum()) < bound
    assert all(len(ids) == 8 for ids, _, _ in generate([PROMPT], 8, 50))


def test_item_06_the_rate_falls_in_a_line_to_zero(adapter):
    """B5, O. Of 8 steps: 1, 7/8, … 1/8, and 0 would be the next."""
    rate = need(adapter, "learning_rate")
    assert_close([rate(step, 8) for step in range(8)], [1 - step / 8 for step in range(8)])


def test_item_07_ranks_draw_differently_and_share_one_order_of_data(adapter):
    """B6, O. Every prompt is asked on exactly one rank; the same prompt twelve times gives different draws on both; and ranks draw
    what one rank alone would have."""
    ranks = need(adapter, "ranks")
    prompts = [[i, i + 1] for i in range(7)]
    (a, _), (b, _) = ranks(prompts, 2)
    assert sorted(a + b) == sorted(prompts) and abs(len(a) - len(b)) == 1
    (_, first), (_, second) = ranks([PROMPT] * 12, 2)
    assert len({tuple(ids) for ids in first + second}) > 6 and first != second
    ((_, alone),) = ranks([PROMPT] * 12, 1)
    assert alone == first + second


@pytest.mark.parametrize("content", ["plain", "a <|end|> inside", ""])
def test_item_08_a_response_ends_once(adapter, content):
    """S. Exactly one end after each turn, whatever the text spells, and the text comes back whole."""
    ids, learn, end, _ = need(adapter, "render")([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
    assert ids.count(end) == 2 and ids[-1] == end
    assert sum(learn) == len(content.encode()) + 1  # bytes and the end: in the adapter's tokenizer an id is a byte


def test_item_09_no_text_is_on_both_sides_of_a_split(adapter):
    """S. By hash of the text, as one would look for a leak."""
    splits = need(adapter, "splits")()
    for train, held in splits.values():
        assert train and held and not {hash(t) for t in train} & {hash(t) for t in held}


def three_rows():
    """Logits of 2 responses of 4 ids over 3 tokens, and marks that leave out the prompt; row 1 is shorter, its rest is padding."""
    logits = torch.arange(24, dtype=torch.float64).view(2, 4, 3).sin()
    return logits, torch.tensor([[0, 2, 1, 2], [1, 0, 2, 0]]), torch.tensor([[False, False, True, True], [False, True, True, False]])


def test_item_10_the_sft_loss_is_over_the_learnt_ids_with_the_end_among_them(adapter):
    """S, T. By loops: −mean log softmax(logits[t])[ids[t+1]] over the marked ids; where id t+1 is marked the gradient of logits[t] is
    (p − onehot)/4, the end (the last mark of each row) included, and elsewhere 0."""
    sft_loss = need(adapter, "sft_loss")
    logits, ids, learn = three_rows()
    expected, pulls = 0.0, torch.zeros_like(logits)
    for b, t in [(0, 1), (0, 2), (1, 0), (1, 1)]:
        weights = [math.exp(x) for x in logits[b, t].tolist()]
        p = tensor(*weights) / sum(weights)
        expected -= math.log(p[ids[b, t + 1]]) / 4
        pulls[b, t] = p / 4
        pulls[b, t, ids[b, t + 1]] -= 1 / 4
    found, grad = gradient(lambda x: sft_loss(x, ids, learn), logits)
    assert_close(found, expected, 1e-6)
    assert_close(grad, pulls, 1e-6)


def test_item_10_the_stage_learns_the_end_and_nothing_of_the_prompt(adapter):
    """The loss of the stage itself is the mean of the learnt ids' −log p as scoring gives them, and the end's output row is pulled."""
    step, logprobs = need(adapter, "sft_step", "logprobs")
    examples = [([3, 5, 8, adapter.end], [0, 0, 1, 1]), ([1, 2, 9, 9, adapter.end], [0, 1, 1, 1, 1])]
    loss, grad = step(examples)
    learnt = [p for ids, mask in examples for p, m in zip(logprobs([ids])[0], mask[1:]) if m]
    assert_close(loss, -sum(learnt) / 6, 1e-5)
    assert float(grad[adapter.end].norm()) > 1e-2


def test_item_11_an_update_is_the_gradient_over_its_own_size(adapter):
    """S: AdamW with eps 1e-5 at one rate for all stages. A setting and no arithmetic, but for what such an update is: without decay
    the first step is lr · g/(|g| + ε), for g = 1 and lr 0.01 0.0099999; and for g = 1e-5 half of the rate, since ε is as large."""
    adam = need(adapter, "adam")
    assert_close(adam([1.0], 0.01, (0.9, 0.95), 1e-5), [-0.01 / (1 + 1e-5)], 1e-7)
    assert_close(adam([1e-5], 0.01, (0.9, 0.95), 1e-5)[0] / -0.005, 1.0, 1e-3)


def test_item_12_the_same_batch_twice_gives_the_same_bits(adapter):
    """B, S. No dropout in any of the models, in training mode too: with dropout the ratio of PPO is not 1 where nothing has moved."""
    logprobs, score = need(adapter, "logprobs", "score")
    batch = [[3, 5, 8, 1, 2, 9], [4, 4, 7]]
    assert logprobs(batch) == logprobs(batch)
    assert torch.equal(score(batch), score(batch))


def test_the_suites_own_differences_are_right():
    """d/dx of x₀²·x₁ at (3, 2): (12, 9)."""
    assert_close(differences(lambda x: x[0] ** 2 * x[1], tensor(3, 2)), [12, 9], 1e-7)
