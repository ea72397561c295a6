"""Items 13 – 21: the reward model. Sources B, O, S, T as in test_items_data.py; InstructGPT = Ouyang et al. 2022.

Judged on any adapter that has the method: all; with methods that only ours has so far: 13, 18, 19, 20.
"""

import itertools
import math

import pytest
import torch

from .contract import assert_close, differences, gradient, need, tensor

SEQUENCES = [[3, 5, 8, 1, 21], [4, 21], [2, 9, 9, 7, 1, 1, 6, 21], [8, 21]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_item_13_the_head_starts_at_a_deviation_of_one_over_the_root_of_its_inputs(adapter):
    """B, O. N(0, 1/(d + 1)), bias 0. d = 1024: the deviation is 0.03124; of 1024 draws its standard error is σ/√2048, here 5 of them."""
    weight, bias = need(adapter, "head_weights")(1024)
    sigma = 1 / math.sqrt(1025)
    assert weight.shape == (1024,) and abs(float(weight.std()) - sigma) < 5 * sigma / math.sqrt(2 * 1024)
    assert abs(float(weight.mean())) < 5 * sigma / math.sqrt(1024)
    assert bias is None or float(bias.abs().max()) == 0


def test_item_14_the_score_is_read_at_the_last_token_whatever_the_batch(adapter):
    """B, S, T. The same alone, in a batch of 2 or of 4, and beside a sequence that is much longer; another last token changes it."""
    score = need(adapter, "score")
    alone = torch.cat([score([s]) for s in SEQUENCES])
    assert_close(score(SEQUENCES), alone, 1e-5)
    assert_close(torch.cat([score(SEQUENCES[:2]), score(SEQUENCES[2:])]), alone, 1e-5)
    assert_close(score([*SEQUENCES, [1] * adapter.longest])[:4], alone, 1e-5)
    assert (score([s[:-1] + [20] for s in SEQUENCES]) - alone).abs().min() > 1e-4


def test_item_15_no_share_of_scores_moves_with_padding(adapter):
    """S logs the share of scores that differ by more than 1e-2 between left and right padding, and it is not 0. The batch is sorted
    both ways and filled with one long sequence, so that padding, where there is any, changes side and amount."""
    score = need(adapter, "score")
    long = [1] * adapter.longest
    one, other = score([long, *SEQUENCES])[1:], score([*SEQUENCES[::-1], [2] * 9])[:4].flip(0)
    assert int(((one - other).abs() > 1e-2).sum()) == 0


def test_item_16_two_ranked_completions_are_bradley_terry(adapter):
    """InstructGPT eq. 1 with K = 2: −log σ(1.5), gradients σ(1.5) − 1 and 1 − σ(1.5). (O has a softmax over the best of 4 instead, which
    is the same for two.)"""
    loss, grad = gradient(lambda s: need(adapter, "kwise_loss")(s, torch.tensor([0, 1])), tensor(2, 0.5))
    assert_close(loss, -math.log(sigmoid(1.5)))
    assert_close(grad, [sigmoid(1.5) - 1, 1 - sigmoid(1.5)])


def test_item_16_all_pairs_of_a_prompt_are_one_loss_in_any_order(adapter):
    """InstructGPT eq. 1: 1/C(K,2) Σ over pairs. Scores 1, 0, 3, −1 of ranks 0 – 3, by a loop; each of the 24 orders; the gradient by
    differences."""
    kwise = need(adapter, "kwise_loss")
    scores, ranks = tensor(1, 0, 3, -1), torch.arange(4)
    by_loop = lambda s: sum(-math.log(sigmoid(float(s[i] - s[j]))) for i in range(4) for j in range(i + 1, 4)) / 6
    found, grad = gradient(lambda s: kwise(s, ranks), scores)
    assert_close(found, by_loop(scores))
    assert_close(grad, differences(by_loop, scores), 1e-7)
    for order in itertools.permutations(range(4)):
        assert_close(kwise(scores[list(order)], ranks[list(order)]), by_loop(scores))


def test_item_16_a_margin_is_what_a_pair_has_to_be_apart(adapter):
    """Touvron et al. 2023 eq. 2: −log σ(2 − 0.5 − m) for m = 0, 1, 1.5, averaged."""
    found = need(adapter, "pairwise_loss")(tensor(2, 2, 2), tensor(0.5, 0.5, 0.5), tensor(0, 1, 1.5))
    assert_close(found, sum(math.log1p(math.exp(-d)) for d in (1.5, 0.5, 0)) / 3)


def test_item_17_one_forward_of_both_is_two_forwards(adapter):
    """S. Chosen and rejected concatenated have the scores that each has alone."""
    score = need(adapter, "score")
    for chosen, rejected in zip(SEQUENCES[::2], SEQUENCES[1::2]):
        assert_close(score([chosen, rejected]), torch.cat([score([chosen]), score([rejected])]), 1e-5)


def test_item_18_normalised_scores_have_mean_0_and_deviation_1_on_fresh_samples(adapter):
    """B, O: gain and bias fitted on samples. On 6000 others the mean is 0 ± 0.05 and the deviation 1 ± 0.05: about 3 standard errors."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(0, adapter.vocab, (6000, 6), generator=generator).tolist()
    normalised = need(adapter, "normalised_scores")
    _, fresh = normalised(draw(), draw())
    assert abs(float(fresh.mean())) < 0.05 and abs(float(fresh.std(unbiased=False)) - 1) < 0.05


def test_item_19_the_bias_is_the_mean_score_of_what_it_was_fitted_on(adapter):
    """S subtracts the mean score of the demonstrations: on them the mean is 0."""
    fitted, _ = need(adapter, "normalised_scores")(SEQUENCES, SEQUENCES)
    assert_close(fitted.mean(), 0.0, 1e-5)


def test_item_20_a_pass_looks_at_every_comparison_once_in_another_order(adapter):
    """O. The multiset of indices of one pass is each once, and shuffled."""
    seen = need(adapter, "reward_order")(18)
    assert sorted(seen) == list(range(18)) and seen != list(range(18))


def test_item_21_accuracy_counts_ties_as_half(adapter):
    """S. Gaps 1, −1, 0, 2: (1 + 0 + ½ + 1)/4."""
    assert_close(need(adapter, "pair_accuracy")([1.0, -1.0, 0.0, 2.0]), 0.625)


@pytest.mark.parametrize("right, error", [(3, abs(0.75 - 0.8807970779778823)), (4, 1 - 0.8807970779778823)])
def test_item_21_calibration_is_how_often_the_models_chance_comes_true(adapter, right, error):
    """S. Four pairs with σ(2) = 0.8808 for the one that the model prefers, of which 3 or 4 are right (Guo et al. 2017 eq. 3)."""
    gaps = [2.0] * right + [-2.0] * (4 - right)
    assert_close(need(adapter, "calibration")(gaps)["error"], error)
