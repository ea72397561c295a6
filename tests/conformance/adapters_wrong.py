"""Adapters that are wrong on purpose: the defects of well-known code, re-stated from what it computes, and some of our own making.

Each is ours with one method replaced. The suite is worth what it catches: test_defects.py runs it against every one of them.
"""

import math
from typing import Callable, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from .adapters_ours import Ours


class Defect(NamedTuple):
    what: str
    adapter: Ours
    caught_by: tuple  # names of tests, all of which have to fail


DEFECTS: list[Defect] = []


def defect(what: str, *caught_by: str) -> Callable:
    """The decorated function replaces the method of its name; its first argument is the adapter that is right."""

    def register(function):
        wrong = Ours()
        wrong.name = what
        setattr(wrong, function.__name__, lambda *args, **kwargs: function(Ours, wrong, *args, **kwargs))
        DEFECTS.append(Defect(what, wrong, caught_by))
        return function

    return register


# --- read in the field (the first line of each says where) ------------------------------------------------------------

@defect("TRL's PPO, N+, DeepSpeed-Chat: the score lands one slot after the end", "test_item_30_every_token_pays_beta_times_its_log_ratio_and_the_last_has_the_score",
        "test_item_31_the_score_is_worth_all_of_itself_at_the_end_of_turn_action")
def token_rewards(right, self, scores, logprobs, ref_logprobs, mask, beta):
    rewards = -beta * (logprobs - ref_logprobs)
    after = mask.sum(1).clamp(max=mask.shape[1] - 1)
    return rewards.scatter_add(1, after[:, None], scores[:, None])


@defect("the same, and values and rewards count one slot more", "test_item_31_the_score_is_worth_all_of_itself_at_the_end_of_turn_action",
        "test_item_37_and_38_advantages_are_the_double_sum_and_returns_are_values_more")
def gae(right, self, rewards, values, mask, gamma, lam):
    longer = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)[:, :-1]
    return right.gae(self, rewards * 0.95, values, mask | longer, gamma, lam)


@defect("TRL before 0.29, N+: every pad adds −1 to the entropy", "test_item_33_padding_enters_no_entropy_and_no_divergence")
def entropy(right, self, logits, mask):
    rows = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return torch.where(mask, rows, -1.0).mean()


@defect("torchtune: whitening with the mean removed adds it again", "test_item_34_whitening_uses_the_population_variance_and_keeps_or_removes_the_mean_as_told",
        "test_item_34_whitened_numbers_have_mean_0")
def whiten(right, self, x, mask, shift_mean):
    return right.whiten(self, x, mask, not shift_mean)


@defect("torchtune: advantages keep their mean", "test_item_34_advantages_are_whitened_over_the_actions_alone")
def advantages(right, self, rewards, values, mask, gamma, lam):
    return right.whiten(self, right.gae(self, rewards, values, mask, gamma, lam)[0], mask, False)


@defect("trlx: advantages are whitened over padding", "test_item_34_advantages_are_whitened_over_the_actions_alone")
def advantages(right, self, rewards, values, mask, gamma, lam):  # noqa: F811
    return right.whiten(self, right.gae(self, rewards, values, mask, gamma, lam)[0], torch.ones_like(mask), True)


@defect("rlhf-book: the log-ratio has the other sign", "test_item_47_k1_and_k3_have_the_divergence_for_mean_and_k2_is_half_the_square",
        "test_item_47_as_losses_k1_pulls_nowhere_k2_as_the_divergence_k3_as_the_forward_one")
def kl(right, self, logprobs, ref_logprobs, kind):
    log_ratio = logprobs - ref_logprobs
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]


@defect("rlhf-book: the penalty pays for drift", "test_item_30_every_token_pays_beta_times_its_log_ratio_and_the_last_has_the_score")
def token_rewards(right, self, scores, logprobs, ref_logprobs, mask, beta):  # noqa: F811
    return right.token_rewards(self, scores, ref_logprobs, logprobs, mask, beta)


@defect("rlhf-book, nanochat: filtered samples, log-probs of the whole softmax", "test_item_49_log_probs_of_a_filtered_sampler_are_renormalised")
def generate(right, self, prompts, count, n=1, temperature=1.0, top_k=0, seed=0, stop=()):
    drawn = right.generate(self, prompts, count, n, temperature, top_k, seed, stop)
    return [(ids, self.logprobs([p + ids], temperature)[0][len(p) - 1:], finished)
            for (ids, _, finished), p in zip(drawn, (p for p in prompts for _ in range(n)))]


@defect("minimind: samples at one temperature, trains at 1", "test_item_22_a_token_is_trained_at_the_temperature_it_was_sampled_at")
def logprobs(right, self, sequences, temperature=1.0):
    return right.logprobs(self, sequences, 1.0)


@defect("rlhf-book: the temperature enters no log-prob", "test_item_22_log_probs_are_those_of_the_logits_over_the_temperature")
def token_logprobs(right, self, logits, ids, temperature):
    return right.token_logprobs(self, logits, ids, 1.0)


@defect("minimind: the critic normalises its last states twice", "test_item_24_a_value_function_starts_at_zero_or_at_the_scores")
def initial_values(right, self, sequences, start):
    values, scores = right.initial_values(self, sequences, start)
    return [[v * 0.9 for v in row] for row in values], scores


@defect("minimind, TRL: log-softmax in bf16", "test_item_52_log_probs_of_bf16_logits_are_sums_in_fp32")
def token_logprobs(right, self, logits, ids, temperature):  # noqa: F811
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@defect("nanochat, transformers: the mean of the micro-batches' means", "test_item_48_a_loss_over_tokens_does_not_depend_on_how_the_batch_is_cut")
def accumulated_loss(right, self, terms, mask, sizes):
    return torch.stack([right.masked_mean(self, x, m) for x, m in zip(terms.split(sizes), mask.split(sizes))]).mean()


@defect("DeepSpeed-Chat: dropout while experience is made", "test_item_12_the_same_batch_twice_gives_the_same_bits")
def logprobs(right, self, sequences, temperature=1.0):  # noqa: F811
    noise = torch.rand(1).item() * 1e-3
    return [[x - noise for x in row] for row in right.logprobs(self, sequences, temperature)]


@defect("DeepSpeed-Chat: the reward model's loss averages over positions, padding among them", "test_item_14_the_score_is_read_at_the_last_token_whatever_the_batch",
        "test_item_15_no_share_of_scores_moves_with_padding", "test_item_17_one_forward_of_both_is_two_forwards")
def score(right, self, sequences):
    longest = max(map(len, sequences))
    rows = [torch.cat([right.score(self, [s[:i]]) for i in range(1, len(s) + 1)]) for s in sequences]
    return torch.stack([row.sum() / longest for row in rows])


@defect("TRL: a missing end takes a penalty off", "test_item_28_a_response_without_an_end_has_its_score_replaced")
def missing_end(right, self, scores, finished, value):
    return torch.where(finished, scores, scores + value)


@defect("TRL's PPO: figures are means over padding too", "test_item_45_figures_of_the_update_do_not_see_padding")
def policy_metrics(right, self, logprobs, old, advantages, mask, clip):
    return {"approx_kl": 0.5 * ((logprobs - old) ** 2).mean()}


# --- of our own making -----------------------------------------------------------------------------------------------

@defect("sample variance", "test_item_34_whitening_uses_the_population_variance_and_keeps_or_removes_the_mean_as_told")
def whiten(right, self, x, mask, shift_mean):  # noqa: F811
    n = int(mask.sum())
    mean = x[mask].mean()
    return (x - mean) * math.sqrt((n - 1) / n) / (x[mask].var(unbiased=False) + 1e-8).sqrt() + (0 if shift_mean else mean)


@defect("a value bootstrapped after the end", "test_item_37_and_38_advantages_are_the_double_sum_and_returns_are_values_more",
        "test_item_38_lambda_1_is_reward_to_go_less_the_value")
def gae(right, self, rewards, values, mask, gamma, lam):  # noqa: F811
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return right.gae(self, rewards + gamma * values * last, values, mask, gamma, lam)


@defect("returns of whitened advantages", "test_item_37_and_38_advantages_are_the_double_sum_and_returns_are_values_more")
def gae(right, self, rewards, values, mask, gamma, lam):  # noqa: F811
    raw, _ = right.gae(self, rewards, values, mask, gamma, lam)
    return raw, right.whiten(self, raw, mask, True) + values


@defect("the smaller of the two losses", "test_item_41_the_clipped_loss_for_every_side_and_sign")
def policy_loss(right, self, logprobs, old, advantages, mask, clip):
    ratio = (logprobs - old).exp()
    return torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))[mask].mean()


@defect("the ratio clipped, and no more", "test_item_41_the_clipped_loss_for_every_side_and_sign")
def policy_loss(right, self, logprobs, old, advantages, mask, clip):  # noqa: F811
    return (-advantages * (logprobs - old).exp().clamp(1 - clip, 1 + clip))[mask].mean()


@defect("a mean that divides by all slots", "test_item_41_the_clipped_loss_for_every_side_and_sign")
def policy_loss(right, self, logprobs, old, advantages, mask, clip):  # noqa: F811
    return right.policy_loss(self, logprobs, old, advantages, mask, clip) * mask.sum() / mask.numel()


@defect("the value clipped around its return", "test_item_42_the_value_is_clipped_around_its_old_self")
def value_loss(right, self, values, old, returns, mask, clip):
    return right.value_loss(self, values, returns, returns, mask, clip)


@defect("no half in the value loss", "test_item_42_the_value_is_clipped_around_its_old_self")
def value_loss(right, self, values, old, returns, mask, clip):  # noqa: F811
    return 2 * right.value_loss(self, values, old, returns, mask, clip)


@defect("the controller's error unclipped", "test_item_43_the_kl_coefficient_follows_its_rule")
def kl_controller(right, self, beta, target, horizon):
    held = [beta]
    return lambda kl, n: held.append(held[-1] * (1 + (kl / target - 1) * n / horizon)) or held[-1]


@defect("Adam without its bias correction", "test_item_44_adam_is_one_of_its_two_forms_and_eps_is_where_that_form_has_it",
        "test_item_11_an_update_is_the_gradient_over_its_own_size")
def adam(right, self, gradients, lr, betas, eps):
    p, m, v, values = 0.0, 0.0, 0.0, []
    for g in gradients:
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        p -= lr * m / (v**0.5 + eps)
        values.append(p)
    return values


@defect("a rate that ends at a tenth", "test_item_06_the_rate_falls_in_a_line_to_zero")
def learning_rate(right, self, step, steps):
    return 1 - 0.9 * step / steps


@defect("the prompt is learnt too", "test_item_10_the_sft_loss_is_over_the_learnt_ids_with_the_end_among_them")
def sft_loss(right, self, logits, ids, learn):
    return right.sft_loss(self, logits, ids, torch.ones_like(learn))


@defect("logits and ids not shifted", "test_item_10_the_sft_loss_is_over_the_learnt_ids_with_the_end_among_them")
def sft_loss(right, self, logits, ids, learn):  # noqa: F811
    return right.sft_loss(self, torch.cat([logits[:, 1:], logits[:, :1]], 1), ids, learn)


@defect("the end is not learnt", "test_item_02_the_end_of_a_turn_is_no_padding_and_is_learnt", "test_item_08_a_response_ends_once")
def render(right, self, messages, generation_prompt=False):
    ids, learn, end, assistant = right.render(self, messages, generation_prompt)
    return ids, [m * (id != end) for id, m in zip(ids, learn)], end, assistant


@defect("pairs summed instead of averaged", "test_item_16_all_pairs_of_a_prompt_are_one_loss_in_any_order")
def kwise_loss(right, self, scores, ranks):
    i, j = torch.nonzero(ranks[:, None] < ranks, as_tuple=True)
    return -logsigmoid(scores[i] - scores[j]).sum()


@defect("the margin added", "test_item_16_a_margin_is_what_a_pair_has_to_be_apart")
def pairwise_loss(right, self, better, worse, margins):
    return right.pairwise_loss(self, better, worse, -margins)


@defect("DPO without the reference", "test_dpo_is_the_log_sigmoid_of_the_difference_of_log_ratios")
def dpo_loss(right, self, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    return right.dpo_loss(self, chosen, rejected, 0, 0, beta, smoothing)


@defect("IPO drawn to 1/β", "test_ipo_draws_the_margin_to_half_over_beta")
def ipo_loss(right, self, chosen, rejected, ref_chosen, ref_rejected, beta):
    return right.ipo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta / 2)


@defect("a baseline that holds the sample itself", "test_leave_one_out_compares_a_reward_with_the_mean_of_the_others")
def rloo_advantages(right, self, rewards):
    return rewards - rewards.mean(1, keepdim=True)


@defect("a group's deviation when it was not asked for", "test_a_group_is_compared_with_its_mean_over_its_deviation_or_not")
def grpo_advantages(right, self, rewards, std_norm):
    return right.grpo_advantages(self, rewards, True)


@defect("GRPO's tokens counted alike", "test_the_group_loss_by_hand")
def grpo_loss(right, self, logprobs, old, ref_logprobs, advantages, mask, clip, beta, length_norm, longest):
    loss = right.grpo_loss(self, logprobs, old, ref_logprobs, advantages, mask, clip, beta, False, 1.0)
    return loss * len(mask) / mask.sum()


@defect("the reward of the batch on every response", "test_reinforce_is_the_language_model_loss_weighted_by_the_reward")
def reinforce_loss(right, self, logprobs, rewards, mask, baseline):
    return right.reinforce_loss(self, logprobs, rewards.mean().expand_as(rewards), mask, baseline)


@defect("the forward divergence", "test_item_47_the_divergence_over_the_vocabulary_is_exact")
def exact_kl(right, self, logits, ref_logits):
    return right.exact_kl(self, ref_logits, logits)


@defect("best-of-n's log n", "test_item_53_the_divergence_of_the_best_of_n_is_log_n_less_a_share")
def best_of_n_kl(right, self, n):
    return math.log(n)


@defect("weights without a cap", "test_item_49_importance_weights_make_up_for_the_sampler_up_to_the_cap")
def importance_weights(right, self, logprobs, sampled, cap):
    return (logprobs - sampled).exp()


@defect("ranks that draw alike", "test_item_07_ranks_draw_differently_and_share_one_order_of_data")
def ranks(right, self, prompts, ranks):
    shares = right.ranks(self, prompts, ranks)
    return [(asked, shares[0][1][:len(asked)]) for asked, _ in shares]


@defect("the stop token kept out", "test_item_27_the_engine_ends_a_response_at_its_first_stop_token")
def generate(right, self, prompts, count, n=1, temperature=1.0, top_k=0, seed=0, stop=()):  # noqa: F811
    return [(ids[:-1] if f else ids, l[:-1] if f else l, f) for ids, l, f in right.generate(self, prompts, count, n, temperature, top_k, seed, stop)]


@defect("truncation that also drops the stop", "test_item_27_nothing_comes_after_the_stop_token")
def truncate(right, self, responses, stop, pad):
    return responses.masked_fill((responses == stop).cumsum(1) > 0, pad)
