"""Instruction pairs: real responses, derived prompts, held-out examples that are held out."""

import re

import pytest

from nanorlhf.data.films import Film, split_films
from nanorlhf.data.instruct import (FAMILIES, FAMILY_SHARES, Example, blend, few_shot, film_prompt, film_questions, instruct_pairs,
                                    prompts, usable_sentence, word_bounds)
from nanorlhf.data.mixture import split_held_out
from nanorlhf.data.rules import has_word
from nanorlhf.data.sources import load_sources, make_source, wiki_document

PLACES = ["garden", "harbour", "village", "mountain", "library", "station", "market", "valley"]


def made_up_sources():
    wiki = [wiki_document(f"Town {i}", f"Small town number {i}",
                          f"The {PLACES[i % 8]} of town {i} is old. Many people see the {PLACES[(i + 3) % 8]} every year.")
            for i in range(400)]
    stubs = [f'def read_{i}(path):\n    """Read the item number {i} of the path.\n\n    More."""' for i in range(200)]
    return [make_source("wiki", "encyclopaedia", "package", "none", "1", wiki),
            make_source("docstrings", "code", "python", "none", "1", stubs)]


FILMS = split_films([Film(f"Film {i}", "", (f"A good film about thing {i}.",), (f"A poor film about thing {i}.",))
                     for i in range(60)], 0)
TRAIN, HELD = instruct_pairs(made_up_sources(), FILMS, 0)


def test_every_family_is_there_on_both_sides():
    assert {example.family for example in TRAIN} == {example.family for example in HELD} == set(FAMILIES)


def test_no_held_out_response_is_trained_on():
    assert not {e.response for e in TRAIN} & {e.response for e in HELD}


def test_held_out_examples_come_from_what_pretraining_holds_out_and_from_test_films():
    parts = split_held_out(made_up_sources())
    held_text, test_titles = "\n".join(parts["wiki"][1] + parts["docstrings"][1]), {f.title for f in FILMS.test}
    for example in HELD:
        if example.meta["source"] == "films":
            assert example.meta["title"] in test_titles
        else:
            assert example.response in held_text


def test_the_word_asked_for_is_in_the_response_and_frequent():
    asked = [e for e in TRAIN + HELD if e.family == "word"]
    assert all(has_word(e.response, e.meta["word"]) and has_word(e.prompt, e.meta["word"]) for e in asked)
    assert {e.meta["word"] for e in asked} >= set(PLACES) and not {e.meta["word"] for e in asked} & {"many", "every"}


def test_no_word_is_asked_for_both_in_training_and_in_held_out_prompts():
    sides = [{e.meta["word"] for e in part if e.family == "word"} for part in (TRAIN, HELD)]
    assert all(sides) and not sides[0] & sides[1]
    assert not {e.prompt for e in TRAIN if e.family == "word"} & {e.prompt for e in HELD}


def test_a_sentence_to_repeat_stands_in_its_prompt():
    asked = [e for e in TRAIN if e.family == "repeat"]
    assert asked and all(e.prompt.endswith("\n" + e.response) for e in asked)


def test_film_questions_are_distinct_and_ask_for_every_film_in_every_phrasing():
    found = film_questions(FILMS.test, "favourable", (5, 25))
    assert len({e.prompt for e in found}) == len(found) == 4 * len(FILMS.test)
    assert {e.meta["title"] for e in found} == {f.title for f in FILMS.test} and found[0].meta["bounds"] == (5, 25)
    assert film_questions(FILMS.test, "favourable", (5, 25), 3, seed=1) == film_questions(FILMS.test, "favourable", (5, 25), 3, seed=1)
    assert film_prompt("favourable", "Heat", "a key") == film_prompt("favourable", "Heat", "a key")


def test_a_blend_gives_each_family_its_share_however_small_the_family():
    """Shares of 100 examples: 0.25 + 0.05 + 0.28 + 0.24 + 0.10 + 0.08 = 1, so the counts are the shares in per cent."""
    count = {family: sum(e.family == family for e in blend(TRAIN, 100)) for family in FAMILY_SHARES}
    assert count == {family: round(100 * share) for family, share in FAMILY_SHARES.items()}
    only = [e for e in TRAIN if e.family == "docstring"][:2]
    assert blend(only, 5) == [only[0], only[1], only[0], only[1], only[0]]
    with pytest.raises(ValueError, match="blend: expected examples of"):
        blend([], 5)


def test_films_get_lines_of_the_asked_kind():
    for example in TRAIN + HELD:
        if example.family in ("favourable", "unfavourable"):
            assert ("good" in example.response) is (example.family == "favourable")
            assert example.meta["title"] in example.prompt


def test_a_docstring_is_the_first_sentence_for_its_signature():
    example = next(e for e in TRAIN if e.family == "docstring")
    number = re.search(r"read_(\d+)\(path\)", example.prompt)[1]
    assert example.response == f"Read the item number {number} of the path."


def test_phrasings_vary_within_a_family():
    openings = {e.prompt.split(e.meta["word"])[0] for e in TRAIN if e.family == "word"}
    assert len(openings) >= 3


def test_responses_are_one_line_of_at_most_thirty_words():
    assert all("\n" not in e.response and len(e.response.split()) <= 30 for e in TRAIN + HELD)


def test_the_pairs_are_the_same_for_the_same_seed_and_families_need_their_source():
    assert instruct_pairs(made_up_sources(), FILMS, 0)[0] == TRAIN
    only = instruct_pairs(made_up_sources()[1:], None, 0)[0]
    assert {e.family for e in only} <= {"docstring", "word", "repeat"} and only


@pytest.mark.parametrize("sentence", ["too small a start of it.", "Four words are few.", "No mark at the end", "A b [c] d e f.",
                                      "IT IS ALL IN CAPITALS HERE.", "Bad byte \udcff is in this one."])
def test_sentences_that_cannot_stand_alone_are_refused(sentence):
    assert not usable_sentence(sentence)


def test_bounds_are_percentiles_of_the_human_responses():
    """Lengths 1 to 100: index int(0.05 · 99) = 4 and int(0.95 · 99) = 94 of the sorted list."""
    examples = [Example("word", "", "w " * n) for n in range(1, 101)]
    assert word_bounds(examples) == {"word": (5, 95)}


def test_prompts_are_distinct_and_shared_over_the_families():
    chosen = prompts(HELD, n=25, seed=1)
    assert len({e.prompt for e in chosen}) == 25
    assert {e.family for e in chosen} == set(FAMILIES)
    assert prompts(HELD, n=25, seed=1) == chosen != prompts(HELD, n=25, seed=2)
    assert len(prompts(HELD, ["word"])) == len({e.prompt for e in HELD if e.family == "word"})
    with pytest.raises(ValueError, match="expected examples of poem, got none"):
        prompts(HELD, ["poem"])


def test_few_shot_shows_other_examples_of_the_family_and_stops_at_the_response():
    example = next(e for e in HELD if e.family == "describe")
    text = few_shot(example, TRAIN, 3, 0)
    assert text.endswith(f"Instruction: {example.prompt}\nResponse:") and text.count("Instruction: ") == 4
    assert example.response not in text and text == few_shot(example, TRAIN, 3, 0)
    with pytest.raises(ValueError, match="at least 9999 other examples"):
        few_shot(example, TRAIN, 9999)


def test_this_pythons_docstrings_alone_give_thousands_of_pairs():
    sources, _ = load_sources(["docstrings", "topics"], offline=True)
    train, held = instruct_pairs(sources, None, 0)
    assert len(train) > 2000 and len(held) > 20
