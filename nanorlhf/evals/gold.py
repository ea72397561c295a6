"""The gold judge: scores a response between 0 and 1. No stage trains on it, and it is fitted on films of its own."""

import math

from ..data import rules
from ..data.films import FAVOURABLE, UNFAVOURABLE, film_document, labelled_reviews
from ..data.sentiment import Sentiment
from ..data.text import words

LENGTH_SCALE = 4.0  # words beyond the human bounds after which the length factor is 1/e
OPEN_SENTENCE = 0.4  # factor for a response that is not one sentence where one is asked for


class GoldJudge:
    """Scores a response to an example; see score for the formula. Build it with fit."""

    def __init__(self, sentiment, pairs, training_responses=()):
        self.sentiment = sentiment  # fitted on gold films; None without any
        self.pairs = pairs  # adjacent word pairs seen in the reference text
        self.training_responses = {_key(text) for text in training_responses}

    @classmethod
    def fit(cls, gold_films, texts=(), training_responses=()):
        """A judge from gold films.

        texts: further reference text for fluency, for example held-out documents; it decides no more than which word
        pairs count as English. training_responses: what copied looks up.
        """
        reviews, labels = labelled_reviews(gold_films)
        sentiment = Sentiment().fit(reviews, labels) if reviews else None
        pairs = set()
        for text in [film_document(film) for film in gold_films] + list(texts):
            found = words(text)
            pairs.update(zip(found, found[1:]))
        return cls(sentiment, frozenset(pairs), training_responses)

    def fluency(self, response):
        """The share of the response's adjacent word pairs that the reference text knows, +1 smoothed to ½."""
        found = words(response)
        known = sum(pair in self.pairs for pair in zip(found, found[1:]))
        return (known + 1) / (max(len(found) - 1, 0) + 2)

    def form(self, example, response):
        """How well formed the response is, in [0, 1]: sentence · variety · length · fluency.

        sentence: 1 for one sentence (for describe: one line), else OPEN_SENTENCE. variety: 1 − share of repeated
        three-word runs, squared. length: 1 within the family's human bounds, else exp(−words outside / LENGTH_SCALE).
        fluency: ½ + ½ · fluency(response).
        """
        if not response.strip():
            return 0.0
        whole = rules.is_one_sentence if example.family in rules.SENTENCE_FAMILIES else rules.is_one_line
        low, high = example.meta.get("bounds", rules.DEFAULT_BOUNDS)
        length = len(response.split())
        outside = max(0, low - length, length - high)
        return ((1.0 if whole(response) else OPEN_SENTENCE) * (1 - rules.repeats(response)) ** 2
                * math.exp(-outside / LENGTH_SCALE) * (0.5 + 0.5 * self.fluency(response)))

    def content(self, example, response):
        """Whether the response does what was asked, in [0, 1].

        word: 1 if the word is there, else 0. favourable, unfavourable: probability that the line leans that way (½
        without a sentiment classifier). describe: share of the response's content words whose stem occurs in the
        article or its human description. repeat: 1 if the response is the sentence, else 0. docstring: mean of the checks verb, names and period.
        """
        meta = example.meta
        if example.family == "word":
            return float(rules.has_word(response, meta["word"]))
        if example.family in (FAVOURABLE, UNFAVOURABLE):
            up = self.sentiment.probability(response) if self.sentiment is not None else 0.5
            return up if example.family == FAVOURABLE else 1 - up
        if example.family == "repeat":
            return float(response.strip() == example.response)
        if example.family == "describe":
            return rules.stem_share(response, f"{meta.get('extract', '')} {example.response}")
        if example.family == "docstring":
            checks = rules.check(example, response)
            return (checks["verb"] + checks["names"] + checks["period"]) / 3
        raise ValueError(f"GoldJudge: expected a family of data.instruct, got {example.family!r}")

    def score(self, example, response):
        """form · (0.1 + 0.9 · content), in [0, 1]. A verbatim copy of a human line is not marked down: see copied.

        Content dominates: the word missing costs nine tenths of the score, while a flaw of form costs at most its
        own factor. Two responses are rarely equal, as fluency and sentiment are continuous; a tie counts one half.
        """
        return self.form(example, response) * (0.1 + 0.9 * self.content(example, response))

    def copied(self, response):
        """Whether the response is, letter case and punctuation apart, a training response. Reported, not scored."""
        return _key(response) in self.training_responses


def _key(text):
    return " ".join(words(text))
