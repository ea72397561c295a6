// One character at a time: what the scalar splitter of pretokenize.cpp and the block splitter of scan.inc both need.
//
// Everything is in an unnamed namespace, so that a copy compiled for one instruction set never serves another.
#pragma once
#include <cstddef>
#include <cstdint>

#include "pretokenize.h"

namespace pretokenize {
namespace {

constexpr uint8_t kLetter = 1, kNumber = 2, kSpace = 4;
constexpr uint8_t kUpper = 8;     // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
constexpr uint8_t kLower = 16;    // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
constexpr uint8_t kNewline = 32;  // [\r\n]
constexpr uint32_t kCodePoints = 0x110000;

struct Char {
    uint8_t bits;
    uint8_t size;  // bytes
};

inline bool is_tail(uint8_t b) { return (b & 0xC0) == 0x80; }

// Text with the class of every code point, so that one thing is passed around.
struct Text {
    const uint8_t* s;
    size_t n;
    const uint8_t* classes;

    Char at(size_t i) const {
        uint8_t b = s[i];
        if (b < 0x80) return {classes[b], 1};
        return wide_at(i);
    }

    // A character of two to four bytes; overlong forms, surrogates and truncated tails are one byte of no class.
    Char wide_at(size_t i) const {
        const uint8_t* p = s + i;
        size_t left = n - i;
        uint8_t b = p[0];
        if (b >= 0xC2 && b <= 0xDF && left >= 2 && is_tail(p[1]))
            return {classes[(b & 0x1Fu) << 6 | (p[1] & 0x3Fu)], 2};
        if ((b & 0xF0) == 0xE0 && left >= 3 && is_tail(p[1]) && is_tail(p[2])) {
            uint32_t c = (b & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
            if (c >= 0x800 && (c < 0xD800 || c > 0xDFFF)) return {classes[c], 3};
        }
        if (b >= 0xF0 && b <= 0xF4 && left >= 4 && is_tail(p[1]) && is_tail(p[2]) && is_tail(p[3])) {
            uint32_t c = (b & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
            if (c >= 0x10000 && c < kCodePoints) return {classes[c], 4};
        }
        return {0, 1};
    }

    // The end of the run of characters from i that have any of these bits.
    size_t run(size_t i, uint8_t bits) const {
        while (i < n) {
            Char c = at(i);
            if (!(c.bits & bits)) break;
            i += c.size;
        }
        return i;
    }

    // The end of the run from i of [^\s\p{L}\p{N}].
    size_t other_run(size_t i) const {
        while (i < n) {
            Char c = at(i);
            if (c.bits & (kSpace | kLetter | kNumber)) break;
            i += c.size;
        }
        return i;
    }

    bool has(size_t i, uint8_t bits) const { return i < n && (at(i).bits & bits); }
};

// The end of 's 't 'd 'm 'll 've 're at i, or i. With any_case, letters match as under (?i): U+017F is an s too.
inline size_t contraction_end(const Text& t, size_t i, bool any_case) {
    if (i + 1 >= t.n || t.s[i] != '\'') return i;
    auto letter = [&](size_t k) -> uint8_t {
        if (k >= t.n) return 0;
        uint8_t b = t.s[k];
        return any_case && b >= 'A' && b <= 'Z' ? b + 32 : b;
    };
    uint8_t a = letter(i + 1), b = letter(i + 2);
    if (a == 's' || a == 't' || a == 'd' || a == 'm') return i + 2;
    if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return i + 3;
    if (any_case && a == 0xC5 && b == 0xBF) return i + 3;
    return i;
}

}  // namespace

// The class bits of every code point, kCodePoints bytes.
const uint8_t* class_table();

// The end of the piece that starts at text[start], one character at a time.
size_t piece_end(Pattern pattern, const uint8_t* text, size_t n, size_t start);

// Writes the ends of the pieces that follow one another from `start` on, at most `room` (64 or more) of them, and
// returns how many; 0 only when start is the end of the text.
using ScanFunction = size_t (*)(Pattern pattern, const uint8_t* text, size_t n, size_t start, size_t* ends,
                                size_t room);

size_t scan_portable(Pattern pattern, const uint8_t* text, size_t n, size_t start, size_t* ends, size_t room);
#if defined(__x86_64__)
size_t scan_avx2(Pattern pattern, const uint8_t* text, size_t n, size_t start, size_t* ends, size_t room);
size_t scan_avx512(Pattern pattern, const uint8_t* text, size_t n, size_t start, size_t* ends, size_t room);
#endif

}  // namespace pretokenize
