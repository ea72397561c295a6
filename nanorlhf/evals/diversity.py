"""How varied and how long a model's responses are: what mode collapse and length hacking would show in."""

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


def mean_length(responses: Sequence[Sequence]) -> float:
    """Mean number of tokens a response; a string is split into words at white space.

    Raises ValueError on no responses.

    >>> mean_length([[5, 6, 7], [8]])
    2.0
    """
    if not responses:
        raise ValueError("mean_length: expected at least 1 response, got 0")
    return sum(len(r.split() if isinstance(r, str) else r) for r in responses) / len(responses)
