"""A linear sentiment classifier in plain numpy: logistic regression over words and word pairs."""

import re

import numpy as np

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]|\d+")


_STEM = 6  # letters; of a longer word its beginning counts as well, so that "brilliantly" knows "brilliant"


def features(text):
    """The distinct words, adjacent word pairs and beginnings of long words of a text, sorted.

    >>> features("Not good, not boring.")
    ['boring', 'good', 'good not', 'not', 'not boring', 'not good']
    >>> features("Brilliant")
    ['brilliant', 'brilli…']
    """
    tokens = _TOKEN.findall(text.lower().replace("’", "'"))
    beginnings = {token[:_STEM] + "…" for token in tokens if len(token) > _STEM}
    return sorted(set(tokens) | beginnings | {f"{a} {b}" for a, b in zip(tokens, tokens[1:])})


class Sentiment:
    """P(favourable | text) by logistic regression on features scaled by their naive-Bayes log-count ratio.

    Source: Wang and Manning 2012, "Baselines and Bigrams" (NBSVM). We deviate in two ways: the logistic loss for the
    hinge, so that the output is a log-odds; and the ridge draws the weights to prior (a damped naive Bayes), which
    does the work of their interpolation. The fit is full-batch, so it depends on the data alone.
    """

    def __init__(self, l2=10.0, prior=0.2, alpha=1.0, steps=100):
        self.l2 = l2  # weight of ½‖w − prior‖² against the summed log-loss
        self.prior = prior  # what a weight is without evidence; 1 would be naive Bayes
        self.alpha = alpha  # added count of the naive-Bayes ratio
        self.steps = steps  # accelerated gradient steps
        self.index = None

    def fit(self, texts, labels):
        """Fit to texts with labels 1 (favourable) and 0. Raises ValueError unless both labels occur."""
        labels = np.asarray(labels, dtype=np.float64)
        if len(texts) != len(labels) or not 0 < labels.sum() < len(labels):
            raise ValueError(f"Sentiment.fit: expected texts with labels of both kinds, got {len(texts)} texts and "
                             f"{int(labels.sum())} favourable of {len(labels)} labels")
        rows = [features(text) for text in texts]
        self.index = {name: i for i, name in enumerate(sorted({name for row in rows for name in row}))}
        doc = np.repeat(np.arange(len(rows)), [len(row) for row in rows])  # (nnz,)
        column = np.fromiter((self.index[name] for row in rows for name in row), np.int64, len(doc))  # (nnz,)
        size = len(self.index)
        up = np.bincount(column, labels[doc], size) + self.alpha
        down = np.bincount(column, 1 - labels[doc], size) + self.alpha
        ratio = np.log(up / up.sum()) - np.log(down / down.sum())
        self.weight, self.bias = self._descend(doc, column, ratio[column], labels, size)
        self.weight *= ratio
        return self

    def _descend(self, doc, column, value, labels, size):
        """Nesterov's accelerated gradient on the ridge log-loss; returns (weight over scaled features, bias)."""
        n = len(labels)
        # The summed log-loss has curvature at most ¼ of the largest eigenvalue of XᵀX, found by power iteration (from
        # below, hence the tenth on top); the bias is a column of ones, whose eigenvalue is n.
        probe = np.full(size, size**-0.5)
        for _ in range(20):
            probe = np.bincount(column, value * np.bincount(doc, value * probe[column], n)[doc], size)
            top = np.linalg.norm(probe)
            if top == 0:
                break  # no feature tells the labels apart
            probe /= top
        rate = 1.0 / (0.25 * (1.1 * top + n) + self.l2)
        weight = previous = np.full(size, self.prior)
        bias = previous_bias = 0.0
        for step in range(self.steps):
            momentum = step / (step + 3)
            look, look_bias = weight + momentum * (weight - previous), bias + momentum * (bias - previous_bias)
            score = np.bincount(doc, value * look[column], n) + look_bias
            residual = 0.5 * (1 + np.tanh(0.5 * score)) - labels
            previous, previous_bias = weight, bias
            weight = look - rate * (np.bincount(column, value * residual[doc], size) + self.l2 * (look - self.prior))
            bias = look_bias - rate * residual.sum()
        return weight, bias

    def log_odds(self, text):
        """log P(favourable) − log P(unfavourable); 0 is undecided. Unknown words count nothing."""
        if self.index is None:
            raise ValueError("Sentiment.log_odds: expected a fitted classifier, got one before fit")
        known = [self.index[name] for name in features(text) if name in self.index]
        return float(self.weight[known].sum() + self.bias)

    def probability(self, text):
        """P(favourable) in (0, 1)."""
        return float(0.5 * (1 + np.tanh(0.5 * self.log_odds(text))))


def pair_accuracy(score, pairs):
    """The share of (title, fresh, rotten) pairs in which score(fresh) > score(rotten); a tie counts one half.

    >>> pair_accuracy(len, [("T", "long", "no"), ("T", "a", "b")])
    0.75
    """
    if not pairs:
        raise ValueError("pair_accuracy: expected at least one pair, got none")
    cached = {text: score(text) for _, fresh, rotten in pairs for text in (fresh, rotten)}
    return float(np.mean([0.5 * (1 + np.sign(cached[fresh] - cached[rotten])) for _, fresh, rotten in pairs]))
