"""The simulated labeller."""

import math

import pytest

from nanorlhf.data.films import Film
from nanorlhf.data.instruct import Example
from nanorlhf.data.labeller import Labeller

WORD = Example("word", "Write a sentence with the word rain.", "", {"word": "rain", "bounds": (3, 8)})
FILMS = [Film(f"F{i}", "", (f"A fine, lovely film {i}.",), (f"A dull, dreary film {i}.",)) for i in range(10)]


def test_without_noise_the_order_is_that_of_the_utility():
    labeller = Labeller(temperature=0)
    texts = ["rain rain rain rain rain rain rain", "There is rain in Spain.", "There is sun in Spain."]
    assert labeller.rank(WORD, texts) == (2, 0, 1)


def test_ranks_are_places_and_equal_texts_tie():
    ranks = Labeller().rank(WORD, ["Rain falls here.", "Sun.", "Rain falls here.", "No rain today."], seed=3)
    assert ranks[0] == ranks[2] and sorted(set(ranks)) == [0, 1, 2]


def test_a_pair_flips_as_often_as_bradley_and_terry_say():
    """The two texts differ by the word's 4 points; at temperature 4 P = 1/(1 + e⁻¹) = 0.731. Over 4000 seeds the
    standard deviation of the share is 0.007; four of them are allowed."""
    labeller = Labeller(temperature=4.0)
    texts = ["There is rain here.", "There is snow here."]
    assert labeller.utility(WORD, texts[0]) - labeller.utility(WORD, texts[1]) == 4.0
    share = sum(labeller.rank(WORD, texts, seed)[0] == 0 for seed in range(4000)) / 4000
    assert abs(share - 1 / (1 + math.exp(-1))) < 0.028


def test_the_noise_depends_on_seed_and_prompt_alone():
    labeller, texts = Labeller(temperature=5.0), ["Rain a.", "Rain b.", "Rain c.", "Rain d."]
    assert labeller.rank(WORD, texts, 1) == labeller.rank(WORD, texts, 1)
    assert len({labeller.rank(WORD, texts, seed) for seed in range(20)}) > 1


def test_a_film_line_is_ranked_by_the_direction_that_was_asked():
    labeller = Labeller.fit(FILMS, temperature=0)
    texts = ["A dull thing, all of it.", "A fine thing, all of it."]
    assert labeller.rank(Example("favourable", "p", "", {}), texts) == (1, 0)
    assert labeller.rank(Example("unfavourable", "p", "", {}), texts) == (0, 1)


def test_without_films_the_rules_alone_decide():
    labeller = Labeller.fit([], temperature=0)
    assert labeller.rank(Example("favourable", "p", "", {}), ["good good good good good", "A film to see."]) == (1, 0)


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Labeller(temperature=-1)
