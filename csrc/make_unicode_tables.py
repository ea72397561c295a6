"""Write csrc/unicode_tables.h: the class of every code point, as tiktoken's regular expressions see it.

Python's `regex` and `unicodedata` follow other Unicode versions than tiktoken and Hugging Face tokenizers do, and a
split that differs in one letter gives other ids. So tiktoken itself is asked, class by class: an encoding whose only
tokens are single bytes keeps exactly the text its pattern matches.

    python csrc/make_unicode_tables.py
"""

from pathlib import Path

import tiktoken

# Bits of a class, as csrc/pretokenize.cpp reads them.
CLASSES = {
    r"\p{L}": 1,
    r"\p{N}": 2,
    r"\s": 4,
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]": 8,
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]": 16,
    r"[\r\n]": 32,
}
SURROGATES = range(0xD800, 0xE000)


def matched(pattern: str, text: str) -> str:
    """The characters of text that the one-character pattern matches."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    return encoding.decode_bytes(encoding.encode_ordinary(text)).decode()


def code_point_classes() -> bytearray:
    """One byte of class bits for each code point; surrogates have none."""
    text = "".join(chr(c) for c in range(0x110000) if c not in SURROGATES)
    classes = bytearray(0x110000)
    for pattern, bit in CLASSES.items():
        for c in matched(pattern, text):
            classes[ord(c)] |= bit
    return classes


def main() -> None:
    classes = code_point_classes()
    starts = [c for c in range(0x110000) if c == 0 or classes[c] != classes[c - 1]]
    lines, line = [], ""
    for c in starts:
        item = f"{{{c:#x},{classes[c]}}},"
        if len(line) + len(item) > 118:
            lines.append(line)
            line = ""
        line += item
    lines.append(line)
    header = [
        f"// Written by csrc/make_unicode_tables.py from tiktoken {tiktoken.__version__}; not to be edited by hand.",
        "// Each entry starts a run of code points of one class, which lasts until the next entry. The bits:",
        *(f"//   {bit:2d}  {pattern}" for pattern, bit in CLASSES.items()),
        "#pragma once",
        "#include <cstdint>",
        "",
        "struct ClassRun {",
        "    uint32_t first;",
        "    uint8_t bits;",
        "};",
        "",
        "inline constexpr ClassRun kClassRuns[] = {",
    ]
    Path(__file__).with_name("unicode_tables.h").write_text("\n".join([*header, *lines, "};", ""]))


if __name__ == "__main__":
    main()
