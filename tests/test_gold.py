"""The gold judge."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data.films import Film
from nanorlhf.data.instruct import Example
from nanorlhf.evals.gold import GoldJudge

GOLD = [Film(f"G{i}", f"The story of a man {i}.", (f"A fine, lovely film {i}.",), (f"A dull, dreary film {i}.",))
        for i in range(10)]
JUDGE = GoldJudge.fit(GOLD, ["There is rain in the hills."], ["It rains."])
WORD = Example("word", "Write a sentence with the word rain.", "", {"word": "rain", "bounds": (4, 10)})


def test_the_score_is_form_times_content_worked_by_hand():
    """"There is rain there." holds the word; one sentence, no repetition, 4 words within bounds; of its pairs
    there-is, is-rain, rain-there two are known, so fluency = (2 + 1)/(3 + 2) = 0.6 and form = ½ + ½·0.6 = 0.8; the score
    is 0.8 · (0.1 + 0.9)."""
    assert JUDGE.score(WORD, "There is rain there.") == pytest.approx(0.8)


def test_the_word_dominates_form():
    with_word, without = "there is rain there", "There is a man in the hills."
    assert JUDGE.form(WORD, with_word) < JUDGE.form(WORD, without)
    assert JUDGE.score(WORD, with_word) > JUDGE.score(WORD, without)


def test_each_flaw_of_form_costs():
    good = JUDGE.score(WORD, "There is rain in the hills.")
    for flawed in ("There is rain in the hills", "There is rain. In the hills.", "There is rain in the rain in the rain in the.",
                   "There is rain in the hills of a man in the story of a man in the hills.", "Rain zqx vbn wpl."):
        assert JUDGE.score(WORD, flawed) < good, flawed
    assert JUDGE.score(WORD, " \n") == 0


def test_a_film_line_is_judged_in_the_direction_that_was_asked():
    fine, dull = "A fine film of a man.", "A dull film of a man."
    up, down = Example("favourable", "", "", {}), Example("unfavourable", "", "", {})
    assert JUDGE.score(up, fine) > JUDGE.score(up, dull) and JUDGE.score(down, fine) < JUDGE.score(down, dull)


def test_a_description_is_judged_by_its_article_and_a_docstring_by_its_checks():
    article = Example("describe", "", "Moon of Jupiter", {"extract": "Io is a moon.", "bounds": (2, 9)})
    assert JUDGE.score(article, "A moon of Jupiter") > 3 * JUDGE.score(article, "American film actor")
    function = Example("docstring", "", "", {"signature": "copy_file(src)", "bounds": (3, 12)})
    assert JUDGE.content(function, "Copy the file.") == 1 and JUDGE.content(function, "the man") == 0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["word", "favourable", "unfavourable", "describe", "docstring"]))
def test_every_score_lies_between_0_and_1(text, family):
    example = Example(family, "p", "Human words.", {"word": "a", "signature": "f(x)", "extract": "x"})
    assert 0 <= JUDGE.score(example, text) <= 1


def test_a_copied_line_is_reported_and_not_scored():
    assert JUDGE.copied("it rains!") and not JUDGE.copied("It pours.")
    assert JUDGE.score(WORD, "There is rain there.") == GoldJudge.fit(
        GOLD, ["There is rain in the hills."], ["There is rain there."]).score(WORD, "There is rain there.")


def test_without_gold_films_sentiment_is_undecided_and_an_unknown_family_is_refused():
    judge = GoldJudge.fit([])
    assert judge.content(Example("favourable", "", "", {}), "A fine film.") == 0.5
    with pytest.raises(ValueError, match="expected a family"):
        judge.score(Example("poem", "", "", {}), "A line.")
