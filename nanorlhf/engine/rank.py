"""Which of several completions of a prompt to keep. A ranker is a function of them that returns their numbers, the best first; of equals,
the earlier first.

>>> from nanorlhf.engine import Completion
>>> drawn = [Completion([1, 2], [-3.0, -3.0], text="so 7"), Completion([1], [-1.0], text="so 8"), Completion([2, 2, 2], [-0.4] * 3, text="thus 7")]
>>> by_likelihood()(drawn), by_likelihood(length_penalty=1)(drawn), by_vote(lambda c: c.text[-1])(drawn)
([1, 2, 0], [2, 1, 0], [2, 0, 1])
"""

import math
from collections import defaultdict
from typing import Callable, Dict, Hashable, List, Optional, Sequence

from .request import Completion

Ranker = Callable[[Sequence[Completion]], List[int]]


def by_score(score: Callable[[Completion], float]) -> Ranker:
    """The highest score first, which may be a reward model's. Errors: ValueError for a score that is NaN."""

    def rank(completions: Sequence[Completion]) -> List[int]:
        scores = [float(score(c)) for c in completions]
        if any(map(math.isnan, scores)):
            raise ValueError(f"by_score: completion {[math.isnan(x) for x in scores].index(True)} has no number for a score")
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    return rank


def by_likelihood(length_penalty: float = 0.0) -> Ranker:
    """The most probable first, by log p / ((5 + T) / 6)^length_penalty for T tokens: a sum of log-probs favours short texts. Log-probs are
    those that ``Completion`` has, under what was drawn from. Source: Wu et al., arXiv 1609.08144, eq. 14."""
    return by_score(lambda c: sum(c.logprobs) / ((5 + len(c.ids)) / 6) ** length_penalty)


def by_vote(answer: Callable[[Completion], Optional[Hashable]], weight: Callable[[Completion], float] = lambda c: 1.0) -> Ranker:
    """Those first whose answer most completions give, by the sum of their weights; among them the most probable. An answer of None
    is no vote, and comes last. Errors: ValueError for a weight that is NaN. Source: self-consistency, Wang et al., arXiv 2203.11171, §2."""

    def rank(completions: Sequence[Completion]) -> List[int]:
        answers = [answer(c) for c in completions]
        votes: Dict[Optional[Hashable], float] = defaultdict(float)
        for said, c in zip(answers, completions):
            votes[said] += weight(c)
        votes[None] = -math.inf
        for said, weighed in votes.items():
            if math.isnan(weighed):
                raise ValueError(f"by_vote: the votes for {said!r} have no number for a weight")
        place = {said: i for i, said in enumerate(votes)}
        return sorted(range(len(answers)), key=lambda i: (-votes[answers[i]], place[answers[i]], -sum(completions[i].logprobs)))

    return rank
