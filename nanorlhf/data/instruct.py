"""Instruction and response pairs: the responses are what people wrote, the prompts are derived from them.

Families: word (a sentence that holds a given word), repeat (a given sentence as it is), favourable and unfavourable (a critic's line about a film),
describe (an encyclopaedia title in one line), docstring (the first sentence of a function's docstring).
"""

import random
import re
from collections import Counter
from dataclasses import dataclass, field

from .films import FAVOURABLE, UNFAVOURABLE
from .mixture import split_held_out
from .sources import wiki_fields
from .text import STOP_WORDS, sentences, stable_hash, words

PHRASINGS = {
    "word": (
        # No quotation marks: behind a space the word is the same token here as in the sentence that it asks for.
        "Write a sentence with the word {word}.",
        "Use the word {word} in a sentence.",
        "Give me one sentence that contains the word {word}.",
        "Please write one sentence using the word {word}.",
    ),
    FAVOURABLE: (
        "Write a favourable line about the film “{title}”.",
        "Say something good about the film “{title}”.",
        "Give me one positive sentence about the movie “{title}”.",
        "Recommend the film “{title}” in one sentence.",
    ),
    UNFAVOURABLE: (
        "Write an unfavourable line about the film “{title}”.",
        "Say something bad about the film “{title}”.",
        "Give me one negative sentence about the movie “{title}”.",
        "Warn against the film “{title}” in one sentence.",
    ),
    # Copying is what a small model finds hardest, and every other family leans on it: here each token teaches it.
    "repeat": (
        "Repeat this sentence:\n{sentence}",
        "Copy this line word for word:\n{sentence}",
        "Say exactly this:\n{sentence}",
    ),
    "describe": (
        "Describe “{title}” in one line.",
        "What is “{title}”? Answer in a few words.",
        "Give a short description of “{title}”.",
    ),
    "docstring": (
        "Write the docstring of this function: {signature}",
        "What does {signature} do? Answer with its docstring.",
        "Document this function in one sentence: {signature}",
    ),
}
FAMILIES = tuple(PHRASINGS)
# Of the demonstrations that SFT sees. Films weigh more than their number: what they teach is to heed the prompt.
FAMILY_SHARES = {"word": 0.25, "repeat": 0.05, FAVOURABLE: 0.28, UNFAVOURABLE: 0.24, "describe": 0.1, "docstring": 0.08}
MIN_WORDS, MAX_WORDS = 5, 25  # of a sentence in the word family
MAX_RESPONSE_WORDS = 30
WORD_COUNT = 20  # times a word must occur in the training sentences before a prompt asks for it
WORD_SOURCES = ("wiki", "plays", "bible", "films", "docstrings", "dialogue", "topics")
WORD_PAIRS = 9_000  # cap per source, so that no source gives most of the pairs
HELD_WORDS = 8  # one word in so many is asked for in held-out prompts only
REPEAT_EVERY = 5  # one in so many word sentences, if short, is also one to repeat …
REPEAT_WORDS = 14  # … of at most so many words
SIGNATURE_CHARACTERS = 80
# Markup, code, quotations that may be cut open, and bytes that were no UTF-8.
_NOT_PLAIN = re.compile(r"[`=<>{}\[\]|\\_*#/()\"“”\udc80-\udcff]|\.\.|--|http")


@dataclass(frozen=True)
class Example:
    """One prompt and its human response.

    meta: source; what the prompt asks (word, title, signature, extract …); bounds, the 5th and 95th percentile of
    the word count of the family's training responses.
    """

    family: str
    prompt: str
    response: str
    meta: dict = field(default_factory=dict, hash=False)


def _phrase(family, key, **fields):
    """The family's prompt for these fields, in a phrasing that depends on the key alone."""
    choices = PHRASINGS[family]
    return choices[stable_hash(key, family) % len(choices)].format(**fields)


def film_prompt(kind, title, key):
    """The prompt for a favourable or an unfavourable line about a film; ``key`` decides its phrasing.

    >>> "Heat" in film_prompt("favourable", "Heat", "any")
    True
    """
    return _phrase(kind, key, title=title)


def film_questions(films, kind, bounds, n=None, seed=0):
    """At most n distinct prompts for a line about these films, in every phrasing, shuffled; no response is known.

    bounds: the family's (fewest, most) words, as the rules and the judge read them from ``meta``.
    """
    found = [Example(kind, phrasing.format(title=film.title), "", {"source": "films", "title": film.title, "bounds": bounds})
             for film in films for phrasing in PHRASINGS[kind]]
    return random.Random(f"questions {seed}").sample(found, len(found) if n is None else min(n, len(found)))


def _capitalised(text):
    return text[:1].upper() + text[1:]


# --- sentences and their words -------------------------------------------------------------------------------------

def _paragraphs(source, document):
    """The running text of a document, without its headings and speakers' names."""
    if source == "wiki":
        return [wiki_fields(document)[2]]
    if source == "docstrings":
        return [text.partition("\n\n")[0] for text in re.findall(r'"""(.*?)"""', document, re.S)]
    if source == "films":
        return document.split("\n\n")[1:]
    found = []
    for paragraph in document.split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        found.append(rest if first.isupper() and rest else paragraph)
    return found


def usable_sentence(sentence):
    """Whether a sentence can stand alone as a response: a capital first, a closing mark last, 5 to 25 words, plain.

    >>> usable_sentence("The rain it raineth every day."), usable_sentence("And x = f(y[0]) goes there now.")
    (True, False)
    """
    return (MIN_WORDS <= sentence.count(" ") + 1 <= MAX_WORDS and sentence[:1].isupper() and sentence[-1:] in ".!?"
            and not _NOT_PLAIN.search(sentence) and not sentence.isupper() and len(words(sentence)) >= MIN_WORDS)


def _sentences_of(source, documents, limit=None):
    """Distinct usable sentences of the documents, in order, until there are limit of them."""
    distinct = {}
    for document in documents:
        if limit is not None and len(distinct) >= limit:
            break
        for paragraph in _paragraphs(source, document):
            for sentence in sentences(paragraph):
                if usable_sentence(sentence):
                    distinct.setdefault(sentence)
    return list(distinct)[:limit]


def _content_words(all_sentences):
    """Words that a prompt may ask for: frequent enough, no stop words, mostly written lower-case."""
    count, lower = Counter(), Counter()
    for sentence in all_sentences:
        found = set(words(sentence))
        count.update(found)
        lower.update(found & set(re.findall(r"[a-z]+", sentence)))
    return {word for word, n in count.items()
            if n >= WORD_COUNT and len(word) >= 4 and word.isascii() and word.isalpha()
            and word not in STOP_WORDS and lower[word] >= 0.7 * n}


def _word_examples(source, found, vocabulary, rng):
    examples = []
    for sentence in found:
        choices = sorted(set(words(sentence)) & vocabulary)
        if choices:
            word = rng.choice(choices)
            examples.append(Example("word", _phrase("word", sentence, word=word), sentence,
                                    {"source": source, "word": word}))
    return examples


def _word_family(parts, split, rng):
    # Documents in random order up to the cap: splitting all of them into sentences would take four times as long.
    train = {name: _sentences_of(name, rng.sample(parts[name][0], len(parts[name][0])), WORD_PAIRS)
             for name in WORD_SOURCES if name in parts}
    held = {name: _sentences_of(name, parts[name][1]) for name in WORD_SOURCES if name in parts and name != "films"}
    if split is not None and "films" in parts:
        held["films"] = _sentences_of("films", ["\n\n" + "\n\n".join(f.fresh + f.rotten) for f in split.test])
    vocabulary = _content_words([sentence for found in train.values() for sentence in found])
    ordered = sorted(vocabulary, key=lambda word: stable_hash(word, "held out"))
    reserved = set(ordered[:-(-len(ordered) // HELD_WORDS)])
    return ([e for name, found in train.items() for e in _word_examples(name, found, vocabulary - reserved, rng)],
            [e for name, found in held.items() for e in _word_examples(name, found, reserved, rng)])


def _repeat_family(word_examples):
    """Some of the word family's sentences, to be repeated as they are."""
    chosen = [e for e in word_examples if stable_hash(e.response, "repeat") % REPEAT_EVERY == 0]
    return [Example("repeat", _phrase("repeat", e.response, sentence=e.response), e.response,
                    {"source": e.meta["source"]}) for e in chosen if len(e.response.split()) <= REPEAT_WORDS]


# --- films, titles, functions --------------------------------------------------------------------------------------

def _film_family(films):
    examples = []
    for film in films:
        for kind, reviews in ((FAVOURABLE, film.fresh), (UNFAVOURABLE, film.rotten)):
            for text in reviews:
                if 3 <= len(text.split()) <= MAX_RESPONSE_WORDS:
                    examples.append(Example(kind, _phrase(kind, text, title=film.title), _capitalised(text),
                                            {"source": "films", "title": film.title}))
    return examples


def _describe_family(documents):
    examples = []
    for document in documents:
        title, description, extract = wiki_fields(document)
        if description and 2 <= len(description.split()) <= MAX_RESPONSE_WORDS:
            examples.append(Example("describe", _phrase("describe", title, title=title), _capitalised(description),
                                    {"source": "wiki", "title": title, "extract": extract}))
    return examples


_STUB = re.compile(r'^def (\w+)(\([^\n]*\)):\n    """(.*?)"""$', re.S | re.M)


def _docstring_family(documents):
    distinct = {}
    for document in documents:
        for name, arguments, doc in _STUB.findall(document):
            first = sentences(doc.partition("\n\n")[0])[:1]
            signature = f"{name}{arguments}"
            if (first and first[0][0].isupper() and first[0].endswith(".") and 3 <= len(first[0].split()) <= 20
                    and len(signature) <= SIGNATURE_CHARACTERS and ">>>" not in first[0]):
                distinct.setdefault((signature, first[0]))
    return [Example("docstring", _phrase("docstring", signature, signature=signature), response,
                    {"source": "docstrings", "signature": signature}) for signature, response in distinct]


# --- all of them ---------------------------------------------------------------------------------------------------

def word_bounds(examples):
    """{family: (5th, 95th percentile of the word count of its responses)}."""
    bounds = {}
    for family in FAMILIES:
        counts = sorted(len(e.response.split()) for e in examples if e.family == family)
        if counts:
            bounds[family] = (counts[int(0.05 * (len(counts) - 1))], counts[int(0.95 * (len(counts) - 1))])
    return bounds


def instruct_pairs(sources, film_split=None, seed=0):
    """(train, held_out) lists of Example, shuffled; the families that the sources allow.

    Held-out responses come from documents that pretraining holds out too (split_held_out) and from test films, and
    none of them is a training response.
    """
    parts, rng = split_held_out(sources), random.Random(f"instruct {seed}")
    train, held = _word_family(parts, film_split, rng)
    train, held = train + _repeat_family(train), held + _repeat_family(held)
    if film_split is not None:
        train += _film_family(film_split.train)
        held += _film_family(film_split.test)
    for name, family in (("wiki", _describe_family), ("docstrings", _docstring_family)):
        if name in parts:
            train += family(parts[name][0])
            held += family(parts[name][1])
    bounds, seen = word_bounds(train), {example.response for example in train}
    held = [example for example in held if example.response not in seen]
    for example in train + held:
        example.meta["bounds"] = bounds.get(example.family, (3, MAX_RESPONSE_WORDS))
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def blend(examples, n, shares=None):
    """At most n examples (rounding may cost one or two), each family's share of them as FAMILY_SHARES says, renormalised
    over the families that are there. A family that is too small for its share comes round again. The families are
    interleaved evenly, each in the examples' order.
    """
    shares = FAMILY_SHARES if shares is None else shares
    piles = {family: [e for e in examples if e.family == family] for family in shares}
    piles = {family: pile for family, pile in piles.items() if pile}
    if not piles:
        raise ValueError(f"blend: expected examples of {', '.join(shares)}, got none")
    total = sum(shares[family] for family in piles)
    chosen = []
    for family, pile in piles.items():
        count = max(1, round(n * shares[family] / total))
        chosen += [((i + 0.5) / count, family, pile[i % len(pile)]) for i in range(count)]
    return [example for _, _, example in sorted(chosen, key=lambda item: item[:2])][:n]


def prompts(examples, families=None, n=None, seed=0):
    """At most n examples with distinct prompts, shared as evenly as they allow over the families, shuffled."""
    rng = random.Random(f"prompts {seed}")
    families = FAMILIES if families is None else tuple(families)
    piles = {family: {} for family in families}
    for example in examples:
        if example.family in piles:
            piles[example.family].setdefault(example.prompt, example)
    piles = [rng.sample(list(pile.values()), len(pile)) for pile in piles.values() if pile]
    if not piles:
        raise ValueError(f"prompts: expected examples of {', '.join(families)}, got none")
    total = sum(map(len, piles))
    chosen = []
    while piles and len(chosen) < (total if n is None else n):
        for pile in piles:
            chosen.append(pile.pop())
        piles = [pile for pile in piles if pile]
    chosen = chosen[:n]
    rng.shuffle(chosen)
    return chosen


def few_shot(example, train, k=4, seed=0):
    """The document that a base model is asked to continue: k examples of the same family, then this prompt.

    train: examples to show; those of other families are passed over.

    >>> e = Example("word", "Say rain.", "It rains."); print(few_shot(Example("word", "Say sun.", ""), [e], 1))
    Instruction: Say rain.
    Response: It rains.
    <BLANKLINE>
    Instruction: Say sun.
    Response:
    """
    pool = [other for other in train if other.family == example.family and other.prompt != example.prompt]
    if len(pool) < k:
        raise ValueError(f"few_shot: expected at least {k} other examples of {example.family}, got {len(pool)}")
    rng = random.Random(stable_hash(example.prompt, f"few-shot {seed}"))
    shown = [f"Instruction: {other.prompt}\nResponse: {other.response}\n\n" for other in rng.sample(pool, k)]
    return "".join(shown) + f"Instruction: {example.prompt}\nResponse:"
