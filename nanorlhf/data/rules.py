"""What can be checked about a response without judging its meaning. Every check is a bool; none needs a model."""

import re

from .text import STOP_WORDS, sentences, stem, words

DEFAULT_BOUNDS = (3, 30)  # words, for an example that carries no bounds of its family
SENTENCE_FAMILIES = frozenset(("word", "repeat", "favourable", "unfavourable", "docstring"))  # describe asks for a phrase
# Verbs that docstrings begin with, in the bare form; the form in -s counts as well.
_VERBS = frozenset(
    """accept acquire add adjust advance allocate allow append apply assert assign attach bind block break build call
    cancel cast change check clean clear clone close collect combine compare compile compute configure connect
    construct consume convert copy count create decode decompress decorate decrement define delete describe destroy
    detach determine disable discard dispatch display do draw dump edit emit enable encode end ensure enter enumerate
    escape evaluate examine execute exit expand extend extract feed fetch fill filter find finish flush force fork
    format forward free generate get give grab handle hide if implement import increment indicate initialize
    initiate insert inspect install instantiate interpret invoke issue iterate join keep kill leave let limit list
    listen load locate lock log look lookup make map mark match merge modify move normalize notify obtain open
    override pack parse patch perform pick poll pop post prepare print process produce provide pull push put query
    quit quote raise read rebuild receive record redirect register release reload remove rename render reopen
    repeat replace report represent request reset resize resolve restore resume retrieve return reverse rotate run
    save scan schedule search seek select send set show shut shutdown signal sleep sort split start stop store strip
    submit subtract swap take tell terminate test toggle transfer transform translate truncate try turn undo unlock
    unpack unregister update use validate verify visit wait walk warn wrap write yield""".split())


def has_word(text, word):
    """Whether the word stands in the text as a whole word, in any case.

    >>> has_word("The King's speech.", "king"), has_word("Kingdom.", "king")
    (True, False)
    """
    return re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", text, re.IGNORECASE) is not None


def is_one_line(text):
    """Whether the text is one line that is not blank."""
    return bool(text.strip()) and "\n" not in text.strip() and "\r" not in text


def is_one_sentence(text):
    """Whether the text is one line holding one sentence that begins with no small letter and ends in . ! or ?

    >>> is_one_sentence("It rains."), is_one_sentence("It rains. It pours."), is_one_sentence("It rains")
    (True, False, False)
    """
    text = text.strip()
    return (is_one_line(text) and not text[0].islower() and re.search(r"[.!?][\"'”’)]?$", text) is not None
            and len(sentences(text)) == 1 and not re.search(r"[.!?]{4}|[a-z]{4}[.!?]+ +[a-z]", text))


def repeats(text, n=3):
    """The share of the text's word n-grams that occurred before in it; 0 for fewer than n words.

    >>> repeats("a b c a b c"), repeats("one two three four")
    (0.25, 0.0)
    """
    found = words(text)
    grams = [tuple(found[i:i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_within(text, bounds):
    """Whether the number of words (split at white space) lies within bounds, ends included."""
    return bounds[0] <= len(text.split()) <= bounds[1]


def starts_with_verb(text):
    """Whether the first word is a capitalised verb of the kind that docstrings begin with.

    >>> starts_with_verb("Returns the size."), starts_with_verb("return it."), starts_with_verb("Size of it.")
    (True, False, False)
    """
    match = re.match(r"[A-Z][a-z]+", text.strip())
    if not match:
        return False
    word = match[0].lower()
    return any(form in _VERBS for form in (word, word.removesuffix("s"), word.removesuffix("es"),
                                           word.removesuffix("ies") + "y"))


def identifier_stems(signature):
    """The stems of the words that a signature's names are made of, without self and the like.

    >>> sorted(identifier_stems("readLines(self, max_size=None)"))
    ['lin', 'max', 'read', 'siz']
    """
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", signature)
    skipped = STOP_WORDS | {"self", "cls", "args", "kwargs", "kw", "none", "true", "false", "init"}
    return {stem(part) for part in parts if len(part) >= 3 and part.lower() not in skipped}


def shares_stem(text, signature):
    """Whether a word of the text has the stem of a part of the signature's names."""
    return bool({stem(word) for word in words(text)} & identifier_stems(signature))


def stem_share(text, reference):
    """The share of the text's content words whose stem occurs in the reference; 0 for a text without any.

    >>> stem_share("A moon of Jupiter", "The moons of Saturn.")
    0.5
    """
    known = {stem(word) for word in words(reference)}
    content = [stem(word) for word in words(text) if word not in STOP_WORDS]
    return sum(one in known for one in content) / len(content) if content else 0.0


def check(example, response):
    """The checks that apply to an example's family: {name: bool}.

    Always one_line, length (within the family's human bounds) and no_repeat (no three words twice); one_sentence
    where a sentence is asked for; word for the family word; exact for repeat; article (at least half of the content words occur in
    the article's text) for describe; period, verb and names for docstring.
    """
    meta = example.meta
    found = {
        "one_line": is_one_line(response),
        "length": is_within(response, meta.get("bounds", DEFAULT_BOUNDS)),
        "no_repeat": bool(response.strip()) and repeats(response) == 0,
    }
    if example.family in SENTENCE_FAMILIES:
        found["one_sentence"] = is_one_sentence(response)
    if example.family == "word":
        found["word"] = has_word(response, meta["word"])
    if example.family == "repeat":
        found["exact"] = response.strip() == example.response
    if example.family == "describe":
        found["article"] = stem_share(response, meta.get("extract", "")) >= 0.5
    if example.family == "docstring":
        found["period"] = response.rstrip().endswith(".")
        found["verb"] = starts_with_verb(response)
        found["names"] = shares_stem(response, meta["signature"])
    return found
