// Each scanner tries the alternatives of its regular expression in their order; where the expression would backtrack,
// the comment says what the backtracking comes to.
#include "pretokenize.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "split.h"
#include "unicode_tables.h"

namespace pretokenize {

const uint8_t* class_table() {
    static const std::vector<uint8_t> table = [] {
        std::vector<uint8_t> bits(kCodePoints);
        constexpr size_t runs = sizeof(kClassRuns) / sizeof(kClassRuns[0]);
        for (size_t r = 0; r < runs; r++) {
            uint32_t end = r + 1 < runs ? kClassRuns[r + 1].first : kCodePoints;
            std::memset(bits.data() + kClassRuns[r].first, kClassRuns[r].bits, end - kClassRuns[r].first);
        }
        return bits;
    }();
    return table.data();
}

namespace {

// How the whitespace alternatives at the end of a pattern treat a run of \s.
enum class Blank {
    plain,           // \s++$ | \s+(?!\S) | \s
    end_first,       // \s++$ | \s*[\r\n] | \s+(?!\S) | \s
    newline_first,   // \s*[\r\n]+ | \s+(?!\S) | \s+
};

// A run that no alternative before the whitespace ones has taken. Its last character is left to the text that follows,
// unless the run has but one; the newline alternative, by backtracking, ends after the last newline of the run.
size_t blank_end(const Text& t, size_t start, Blank blank) {
    size_t i = start, last = start, after_newline = start;
    while (i < t.n) {
        Char c = t.at(i);
        if (!(c.bits & kSpace)) break;
        last = i;
        i += c.size;
        if (c.bits & kNewline) after_newline = i;
    }
    bool at_end = i == t.n;
    if (at_end && blank != Blank::newline_first) return i;
    if (after_newline > start && blank != Blank::plain) return after_newline;
    if (at_end || last == start) return i;
    return last;
}

size_t gpt2_end(const Text& t, size_t start) {
    size_t end = contraction_end(t, start, false);
    if (end > start) return end;
    size_t i = start + (t.s[start] == ' ');
    if (i < t.n) {
        Char c = t.at(i);
        if (c.bits & kLetter) return t.run(i + c.size, kLetter);
        if (c.bits & kNumber) return t.run(i + c.size, kNumber);
        if (!(c.bits & kSpace)) return t.other_run(i + c.size);
    }
    return blank_end(t, start, Blank::plain);
}

size_t number_end(const Text& t, size_t i, int most) {
    for (; most > 0 && t.has(i, kNumber); most--) i += t.at(i).size;
    return i;
}

// cl100k, llama3 and qwen2: they differ in how many digits go together and in the whitespace alternatives.
size_t word_end(const Text& t, size_t start, int digits, Blank blank) {
    size_t end = contraction_end(t, start, true);
    if (end > start) return end;
    Char c = t.at(start);
    if (c.bits & kLetter) return t.run(start + c.size, kLetter);
    if (c.bits & kNumber) return number_end(t, start, digits);
    if (!(c.bits & kNewline) && t.has(start + c.size, kLetter)) return t.run(start + c.size, kLetter);
    size_t i = start + (t.s[start] == ' ');
    end = t.other_run(i);
    if (end > i) return t.run(end, kNewline);
    return blank_end(t, start, blank);
}

// [Upper]*[Lower]+ from i, or i if it does not match. Characters that are both (Lm, Lo, M) go to the greedy first
// class; if no lower-case one follows, backtracking gives the last of them to the second, and the match ends after it.
size_t lower_word_end(const Text& t, size_t i) {
    size_t k = i, after_both = i;
    while (k < t.n) {
        Char c = t.at(k);
        if (!(c.bits & kUpper)) break;
        k += c.size;
        if (c.bits & kLower) after_both = k;
    }
    size_t end = t.run(k, kLower);
    return end > k ? end : after_both;
}

// [Upper]+[Lower]* from i, or i if it does not match.
size_t upper_word_end(const Text& t, size_t i) {
    size_t k = t.run(i, kUpper);
    return k > i ? t.run(k, kLower) : i;
}

size_t o200k_end(const Text& t, size_t start) {
    Char c = t.at(start);
    // The optional first character of a word; a combining mark may be either it or part of the word.
    bool prefix = !(c.bits & (kNewline | kLetter | kNumber));
    size_t after = start + c.size;
    for (auto word : {lower_word_end, upper_word_end}) {
        size_t end = prefix ? word(t, after) : start;
        if (end > after && prefix) return contraction_end(t, end, true);
        end = word(t, start);
        if (end > start) return contraction_end(t, end, true);
    }
    if (c.bits & kNumber) return number_end(t, start, 3);
    size_t i = start + (t.s[start] == ' ');
    size_t end = t.other_run(i);
    if (end > i) {
        while (end < t.n && (t.s[end] == '\r' || t.s[end] == '\n' || t.s[end] == '/')) end++;
        return end;
    }
    return blank_end(t, start, Blank::newline_first);
}

bool is_ascii_letter(uint8_t b) { return static_cast<uint8_t>((b | 32) - 'a') < 26; }

// The lead byte of U+4000 to U+9FFF: letters and a few symbols, no whitespace.
bool is_cjk_lead(uint8_t b) { return b >= 0xE4 && b <= 0xE9; }

}  // namespace

Pattern pattern_of(const char* name) {
    const char* names[] = {"gpt2", "cl100k", "o200k", "llama3", "qwen2"};
    for (int i = 0; i < 5; i++)
        if (!std::strcmp(name, names[i])) return static_cast<Pattern>(i);
    throw std::invalid_argument(std::string("pretokenize: expected gpt2, cl100k, o200k, llama3 or qwen2, got ") + name);
}

size_t piece_end(Pattern pattern, const uint8_t* text, size_t n, size_t start) {
    static const uint8_t* const classes = class_table();
    const Text t{text, n, classes};
    switch (pattern) {
        case Pattern::gpt2: return gpt2_end(t, start);
        case Pattern::cl100k: return word_end(t, start, 3, Blank::end_first);
        case Pattern::llama3: return word_end(t, start, 3, Blank::newline_first);
        case Pattern::qwen2: return word_end(t, start, 1, Blank::newline_first);
        case Pattern::o200k: return o200k_end(t, start);
    }
    return n;
}

size_t scan_portable(Pattern pattern, const uint8_t* text, size_t n, size_t start, size_t* ends, size_t room) {
    size_t count = 0;
    while (start < n && count < room) ends[count++] = start = piece_end(pattern, text, n, start);
    return count;
}

static ScanFunction scanner(std::string_view name) {
#if defined(__x86_64__)
    if (name.substr(0, 6) == "avx512") return scan_avx512;
    if (name == "avx2") return scan_avx2;
#endif
    return scan_portable;
}

Splitter::Splitter(Pattern pattern, std::string_view text, std::string_view name) : pattern_(pattern), text_(text) {
    static const ScanFunction best = scanner(isa());
    scan_ = name.empty() ? best : scanner(name);
}

size_t Splitter::next(size_t* ends, size_t room) {
    size_t count = scan_(pattern_, reinterpret_cast<const uint8_t*>(text_.data()), text_.size(), at_, ends, room);
    if (count) at_ = ends[count - 1];
    return count;
}

// Two cuts are safe under all patterns: before a space between two ASCII letters (a word ends there, and a new one
// begins with the space), and after a newline between two characters that are not whitespace when the second is a
// letter (the newline closes a piece, or is one).
static bool is_safe_cut(const uint8_t* text, size_t n, size_t i) {
    if (i + 1 >= n) return false;
    if (text[i] == ' ' && is_ascii_letter(text[i - 1]) && is_ascii_letter(text[i + 1])) return true;
    if (text[i - 1] != '\n' || i < 2 || !(is_ascii_letter(text[i]) || is_cjk_lead(text[i]))) return false;
    bool visible = text[i - 2] > ' ' && text[i - 2] < 0x7F;
    return visible || (i >= 4 && is_cjk_lead(text[i - 4]) && is_tail(text[i - 3]) && is_tail(text[i - 2]));
}

size_t safe_cut(const uint8_t* text, size_t n, size_t from) {
    for (size_t i = from > 0 ? from : 1; i + 1 < n; i++)
        if (is_safe_cut(text, n, i)) return i;
    return n;
}

size_t last_safe_cut(const uint8_t* text, size_t n) {
    for (size_t i = n; i > 1; i--)
        if (is_safe_cut(text, n, i - 1)) return i - 1;
    return 0;
}

std::vector<Span> cut_texts(const std::vector<std::string_view>& texts, size_t target) {
    std::vector<Span> spans;
    for (size_t t = 0; t < texts.size(); t++) {
        std::string_view rest = texts[t];
        while (!rest.empty()) {
            auto* s = reinterpret_cast<const uint8_t*>(rest.data());
            size_t n = rest.size() > 2 * target ? safe_cut(s, rest.size(), target) : rest.size();
            spans.push_back({rest.substr(0, n), t});
            rest.remove_prefix(n);
        }
    }
    return spans;
}

uint8_t class_of(uint32_t code_point) { return class_table()[code_point]; }

}  // namespace pretokenize
