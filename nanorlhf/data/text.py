"""Words, sentences and hashes of plain text: the few rules that the other data modules share."""

import hashlib
import re

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
# A sentence ends at . ! or ? (with closing quotes or brackets) before white space and a capital or an opening quote.
_BREAK = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z])")
# After these a full stop ends no sentence.
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|etc|cf|Prof|Gen|Col|No|vol|ca|approx|U\.S|U\.K|e\.g|i\.e|a\.m|p\.m|B\.C|A\.D)"
    r"|\b[A-Z])\.$")

STOP_WORDS = frozenset(
    """a about above after again against all almost also although always am among an and another any are around as at
    away back be became because become been before being below between both but by came can cannot come could did do
    does doing done down during each either else even ever every few first for from further get give go goes gone got
    had has have having he hence her here hers herself him himself his how however i if in indeed into is it its
    itself just know known last least less let like made make many may me might mine more most much must my myself
    near neither never no none nor not nothing now of off often on once one only onto or other others our ours
    ourselves out over own per perhaps put quite rather really said same say says see seen self several shall she
    should since so some something still such take than that the thee their theirs them themselves then there
    therefore these they thine thing things this those thou though through thus thy till to too took toward towards
    two under until unto up upon us used uses using very was way we well went were what whatever when where whether
    which while who whom whose why will with within without would ye yet you your yours yourself""".split()
)


def stable_hash(text, salt=""):
    """A 64-bit integer that depends on nothing but the text and the salt (Python's own hash changes by process).

    >>> stable_hash("a") == stable_hash("a"), stable_hash("a") == stable_hash("a", "x")
    (True, False)
    """
    data = f"{salt}\0{text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def words(text):
    """The words of a text, lower-case; digits and punctuation are not words.

    >>> words("It's 3 o'clock, Horatio!")
    ["it's", "o'clock", 'horatio']
    """
    return [word.replace("’", "'") for word in WORD.findall(text.lower())]


def sentences(text):
    """The sentences of a paragraph, white space made single, in order.

    >>> sentences("Mr. Smith left.  Why? He was late (as ever).")
    ['Mr. Smith left.', 'Why?', 'He was late (as ever).']
    """
    text = " ".join(text.split())
    found, start = [], 0
    for match in _BREAK.finditer(text):
        piece = text[start:match.end()].rstrip()
        if not _ABBREVIATION.search(piece):
            found.append(piece)
            start = match.end()
    if text[start:]:
        found.append(text[start:])
    return found


def stem(word):
    """A crude stem: the word without the commonest English endings, at most six letters.

    >>> stem("Returns") == stem("returning") == stem("return")
    True
    """
    word = word.lower()
    for ending in ("ingly", "edly", "ing", "ies", "ed", "es", "ly", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:6]
