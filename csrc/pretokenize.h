// Splitting text into pieces, exactly as the regular expressions of the well-known tokenizers do.
//
// Text is UTF-8 bytes. A byte that is not part of valid UTF-8 is one character of no class (it splits like
// punctuation), so that any bytes have a split whose pieces concatenate to the input. All functions are pure and
// thread-safe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace pretokenize {

enum class Pattern : uint8_t { gpt2, cl100k, o200k, llama3, qwen2 };

// The pattern of a name such as "gpt2". Throws std::invalid_argument for an unknown one.
Pattern pattern_of(const char* name);

// The pieces of one text, some at a time.
class Splitter {
public:
    static constexpr size_t kRoom = 192;

    // isa: portable, avx2 or avx512, which this CPU must offer; empty for the best.
    Splitter(Pattern pattern, std::string_view text, std::string_view isa = {});
    // Writes where the next pieces end (they follow one another), at most `room` (64 or more) of them, and returns how
    // many; 0 when none is left.
    size_t next(size_t* ends, size_t room = kRoom);

private:
    Pattern pattern_;
    std::string_view text_;
    size_t (*scan_)(Pattern, const uint8_t*, size_t, size_t, size_t*, size_t);  // see split.h
    size_t at_ = 0;
};

// The first position in [from, n) where text may be cut so that both halves, split on their own, give the pieces of the
// whole under every pattern; n if there is none.
size_t safe_cut(const uint8_t* text, size_t n, size_t from);

// The last position at which text may be cut in that sense, found from the end; 0 if there is none but the beginning.
size_t last_safe_cut(const uint8_t* text, size_t n);

// A stretch of the text number `owner`.
struct Span {
    std::string_view text;
    size_t owner;
};

// The texts, in order, the long ones cut at safe places into stretches of about `target` bytes. Empty texts give none.
std::vector<Span> cut_texts(const std::vector<std::string_view>& texts, size_t target);

// The class bits of a code point below 0x110000, as listed in unicode_tables.h.
uint8_t class_of(uint32_t code_point);

}  // namespace pretokenize
