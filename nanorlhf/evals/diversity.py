"""How varied and how long a model's responses are: what mode collapse and length hacking would show in."""

import math
from collections import Counter
from collections.abc import Sequence


def distinct_n(responses: Sequence[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of all responses, in [0, 1]; 0 when no response is that long.

    A response is a sequence of tokens; a string is split into words at white space. The figure falls as the
    sample grows, so compare models on equally many responses of like length.

    Raises ValueError for n < 1.
    Source: Li et al. 2016, "A diversity-promoting objective function for neural conversation models", §5.

    >>> distinct_n(["the cat sat", "the cat ran"], 2)      # the-cat twice, cat-sat, cat-ran
    0.75
    """
    if n < 1:
        raise ValueError(f"distinct_n: expected n ≥ 1, got {n}")
    seen, total = set(), 0
    for response in responses:
        tokens = tuple(response.split() if isinstance(response, str) else response)
        grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def self_bleu(responses: Sequence[Sequence], n: int = 4) -> float:
    """Mean BLEU-n of each response against all others, in [0, 1]: 1 when all are alike, near 0 when none share words.

    Precision of each order is smoothed by ε = 0.1 where nothing matches; a response too short for an order is measured on the
    orders it has. The brevity penalty takes the other response of nearest length. Raises ValueError on fewer than two responses.
    Source: Zhu et al. 2018 (Texygen) §3.2; Papineni et al. 2002 eq. 2-3; smoothing 1 of Chen & Cherry 2014.

    >>> self_bleu(["a b c d e", "a b c d e"])
    1.0
    """
    if len(responses) < 2:
        raise ValueError(f"self_bleu: expected at least 2 responses, got {len(responses)}")
    tokens = [tuple(r.split() if isinstance(r, str) else r) for r in responses]
    counts = [[_grams(t, k) for k in range(1, n + 1)] for t in tokens]
    best = [[Counter(), Counter()] for _ in range(n)]  # of each n-gram the most often that one response has it, and the next
    for own in counts:
        for k, grams in enumerate(own):
            first, second = best[k]
            for gram, count in grams.items():
                if count > first[gram]:
                    first[gram], second[gram] = count, first[gram]
                elif count > second[gram]:
                    second[gram] = count
    return sum(_bleu(i, tokens, counts[i], best) for i in range(len(tokens))) / len(tokens)


def _grams(tokens: tuple, n: int) -> Counter:
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


def _bleu(i: int, tokens: list, own: list, best: list) -> float:
    length = len(tokens[i])
    logs = []
    for k, grams in enumerate(own):
        total = sum(grams.values())
        if total:
            first, second = best[k]
            others = lambda gram, count: second[gram] if first[gram] == count else first[gram]
            matched = sum(min(count, others(gram, count)) for gram, count in grams.items())
            logs.append(math.log((matched or 0.1) / total))
    if not logs:
        return 0.0
    nearest = min((len(t) for j, t in enumerate(tokens) if j != i), key=lambda other: (abs(other - length), other))
    return min(1.0, math.exp(1 - nearest / length)) * math.exp(sum(logs) / len(logs))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that one of k answers is right when ``correct`` of n drawn ones are: 1 − C(n − c, k) / C(n, k), unbiased for k ≤ n.

    Raises ValueError unless 0 ≤ correct ≤ n and 1 ≤ k ≤ n. Source: Chen et al. 2021 (Codex) eq. 1.

    >>> pass_at_k(4, 2, 2)  # 1 of the 6 pairs holds no right answer
    0.8333333333333334
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: expected 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def mean_length(responses: Sequence[Sequence]) -> float:
    """Mean number of tokens a response; a string is split into words at white space.

    Raises ValueError on no responses.

    >>> mean_length([[5, 6, 7], [8]])
    2.0
    """
    if not responses:
        raise ValueError("mean_length: expected at least 1 response, got 0")
    return sum(len(r.split() if isinstance(r, str) else r) for r in responses) / len(responses)
