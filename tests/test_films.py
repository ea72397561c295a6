"""The film corpus: titles, splits that do not leak, groups and pairs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data import archive
from nanorlhf.data.films import (FAVOURABLE, Film, film_document, load_films, parse_films, pretty_title,
                                 review_groups, same_film_pairs, split_films)

CSV = """category,text,movie_name,has_plot_and_reviews
plot,A man walks.,big_walk_the,True
fresh,"Good,  fun.",big_walk_the,True
rotten,Bad walk.,big_walk_the,True
fresh,Seen twice.,big_walk_the,True
fresh,Seen twice!,other,True
rotten,Only here.,other,True
rotten,Only here.,other,True
fresh,Both ways.,third,True
rotten,Both ways.,third,True
plot,A longer plot of it.,the_big_walk,True
"""


def made_up(n=60, reviews=5):
    return [Film(f"Film {i}", f"Plot {i}.", tuple(f"Good {i} {j}." for j in range(reviews)),
                 tuple(f"Bad {i} {j}." for j in range(reviews - 2))) for i in range(n)]


def test_the_corpus_is_parsed_into_films_without_shared_sentences():
    """The Big Walk has two names in the file; "Seen twice" stands under two films; "Both ways" has both labels."""
    films = parse_films(CSV)
    assert films == [Film("Other", "", (), ("Only here.",)),
                     Film("The Big Walk", "A longer plot of it.", ("Good, fun.",), ("Bad walk.",)),
                     Film("Third", "", (), ())]


@pytest.mark.parametrize("slug, title", [("life_of_david_gale_the", "The Life of David Gale"), ("xxx", "XXX"),
                                         ("d%e9rive_de_latlantic_la", "Dérive de Latlantic la"), ("mr_deeds", "Mr Deeds"),
                                         ("spy_kids_2", "Spy Kids 2"), ("the", "The")])
def test_titles_are_prettified(slug, title):
    assert pretty_title(slug) == title


def test_the_three_parts_share_no_film_and_hold_every_film_with_text():
    films = made_up() + [Film("Empty", "", (), ()), Film("Plot only", "P.", (), ())]
    split = split_films(films, 0)
    titles = [film.title for part in (split.train, split.gold, split.test) for film in part]
    assert len(titles) == len(set(titles)) == 61 and "Empty" not in titles
    assert abs(len(split.train) - 0.62 * 61) < 2 and abs(len(split.gold) - 0.23 * 61) < 2
    assert split_films(films[::-1], 0) == split and split_films(films, 1) != split


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99), st.integers(3, 23))
def test_groups_use_each_review_once_and_rank_by_the_prompt(k, seed, reviews):
    films = made_up(8, reviews)
    groups = review_groups(films, k, seed)
    used = [text for group in groups for text in group.completions]
    assert groups and len(used) == len(set(used))
    for group in groups:
        assert 2 <= len(group.completions) <= k and set(group.ranks) == {0, 1}
        good = [text.startswith("Good") for text in group.completions]
        best = [rank == 0 for rank in group.ranks]
        assert best == (good if group.prompt_kind == FAVOURABLE else [not g for g in good])
        assert len({text.split()[1] for text in group.completions}) == 1  # one film


def test_an_even_stock_is_shared_evenly_and_used_up():
    """8 fresh and 8 rotten with k = 8 make two groups of 4 + 4."""
    film = Film("F", "", tuple(f"g{i}" for i in range(8)), tuple(f"b{i}" for i in range(8)))
    groups = review_groups([film], 8, 0)
    assert [len(group.completions) for group in groups] == [8, 8]
    assert all(sum(group.ranks) == 4 for group in groups)


def test_another_seed_gives_other_groups_and_the_same_seed_the_same():
    films = made_up()
    assert review_groups(films, 4, 1) == review_groups(films, 4, 1) != review_groups(films, 4, 2)


def test_groups_of_one_are_refused():
    with pytest.raises(ValueError, match="expected k of at least 2, got 1"):
        review_groups(made_up(), 1)


def test_pairs_are_of_one_film_and_distinct():
    pairs = same_film_pairs(made_up(5, 4), seed=0, n=20)
    assert len(set(pairs)) == 20
    for title, fresh, rotten in pairs:
        assert fresh.startswith("Good") and rotten.startswith("Bad")
        assert title.split()[1] == fresh.split()[1] == rotten.split()[1]
    assert len(same_film_pairs(made_up(5, 4))) == 5 * 4 * 2


def test_a_film_document_holds_all_its_text():
    document = film_document(Film("T", "P.", ("a.", "b."), ("c.",)))
    assert document.startswith("T\n\nP.\n\n") and sorted(document.split("\n\n")[2].split("\n")) == ["a.", "b.", "c."]


def test_the_real_corpus_splits_without_a_leak():
    try:
        films = load_films(offline=True)
    except archive.Unavailable as reason:
        pytest.skip(str(reason))
    split = split_films(films, 0)
    sets = [{text.lower() for film in part for text in film.fresh + film.rotten}
            for part in (split.train, split.gold, split.test)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert len(sets[0]) > 7000 and len(sets[2]) > 1500
