"""The simulated labeller: ranks completions of a prompt by a known utility with known noise.

It stands for the people who compared completions in InstructGPT (Ouyang et al. 2022, §3.4). Nothing here is a human
judgement, and whatever is trained on it is to be reported as trained on simulated labels. It knows rules and, for
films, a classifier fitted on training films; it shares no film with the gold judge.
"""

import numpy as np

from .films import FAVOURABLE, UNFAVOURABLE, labelled_reviews
from .rules import DEFAULT_BOUNDS, check, repeats
from .sentiment import Sentiment
from .text import stable_hash

# Points of utility for each rule that holds; a point is one unit of log-odds at temperature 1.
RULE_POINTS = {"one_line": 1.0, "length": 1.5, "no_repeat": 1.5, "one_sentence": 2.0, "word": 4.0, "exact": 4.0, "article": 3.0,
               "period": 0.5, "verb": 1.5, "names": 1.5}
SENTIMENT_POINTS = 1.0  # per unit of the classifier's log-odds in the asked direction …
SENTIMENT_CAP = 4.0  # … which is capped, so that no extreme word buys back a broken sentence
REPEAT_POINTS = 4.0  # taken off for a text that is all repetition
LENGTH_POINTS = 0.2  # taken off per word outside the bounds, at most 20 words of them


class Labeller:
    """A simulated labeller. temperature: of the Bradley-Terry noise, in units of utility; 0 means no noise."""

    def __init__(self, sentiment=None, temperature=0.5):
        if temperature < 0:
            raise ValueError(f"Labeller: expected a temperature of at least 0, got {temperature}")
        self.sentiment, self.temperature = sentiment, temperature

    @classmethod
    def fit(cls, train_films, temperature=0.5):
        """A labeller whose sentiment comes from training films; without any film it goes by the rules alone."""
        texts, labels = labelled_reviews(train_films)
        return cls(Sentiment().fit(texts, labels) if texts else None, temperature)

    def utility(self, example, response):
        """The utility of a response before noise, in units of log-odds."""
        points = sum(RULE_POINTS[name] for name, holds in check(example, response).items() if holds)
        low, high = example.meta.get("bounds", DEFAULT_BOUNDS)
        length = len(response.split())
        points -= LENGTH_POINTS * min(20, max(0, low - length, length - high)) + REPEAT_POINTS * repeats(response)
        if self.sentiment is not None and example.family in (FAVOURABLE, UNFAVOURABLE):
            direction = 1 if example.family == FAVOURABLE else -1
            points += SENTIMENT_POINTS * float(np.clip(direction * self.sentiment.log_odds(response),
                                                       -SENTIMENT_CAP, SENTIMENT_CAP))
        return points

    def rank(self, example, completions, seed=0):
        """The simulated rank of each completion, 0 the best, no ties but equal texts.

        The order is Plackett-Luce: P(i above j) = sigmoid((uᵢ − uⱼ) / temperature), as independent Gumbel noise of
        scale temperature on each utility gives it. The noise depends on (seed, prompt) alone.
        """
        rng = np.random.default_rng([seed, stable_hash(example.prompt, "labeller")])
        distinct = list(dict.fromkeys(completions))
        noise = rng.gumbel(size=len(distinct)) * self.temperature
        noisy = {text: self.utility(example, text) + extra for text, extra in zip(distinct, noise)}
        place = {text: i for i, text in enumerate(sorted(distinct, key=lambda text: -noisy[text]))}
        return tuple(place[text] for text in completions)
