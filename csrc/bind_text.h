// Making Python's str from UTF-8. Python's own decoder takes a character at a time as soon as one is not ASCII; this one
// goes over eight bytes of ASCII at once wherever they are.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace text {

namespace py = pybind11;

struct Measured {
    size_t characters = 0;
    uint32_t largest = 0;  // a bound from the same width class as the largest code point
    bool valid = true;
};

inline bool eight_ascii(const uint8_t* p) {
    uint64_t w;
    std::memcpy(&w, p, 8);
    return !(w & 0x8080808080808080u);
}

// The code point of a character that is known to be valid, and not ASCII.
inline uint32_t code_point(const uint8_t* p, size_t size) {
    if (size == 2) return (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu);
    if (size == 3) return (p[0] & 0x0Fu) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    return (p[0] & 0x07u) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
}

inline size_t size_of_lead(uint8_t b) { return b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4; }

inline Measured measure(const uint8_t* p, size_t n) {
    Measured m;
    for (size_t i = 0; i < n;) {
        if (i + 8 <= n && eight_ascii(p + i)) {
            m.characters += 8, i += 8;
            continue;
        }
        m.characters++;
        if (p[i] < 0x80) {
            i++;
            continue;
        }
        const size_t size = size_of_lead(p[i]);
        bool good = p[i] >= 0xC2 && p[i] <= 0xF4 && i + size <= n;
        for (size_t k = 1; good && k < size; k++) good = (p[i + k] & 0xC0) == 0x80;
        if (!good) return {0, 0, false};
        const uint32_t c = code_point(p + i, size);
        if ((size == 3 && (c < 0x800 || (c >= 0xD800 && c < 0xE000))) || (size == 4 && (c < 0x10000 || c > 0x10FFFF)))
            return {0, 0, false};
        m.largest = std::max(m.largest, c);
        i += size;
    }
    return m;
}

template <class Unit>
void fill(const uint8_t* p, size_t n, Unit* to) {
    for (size_t i = 0; i < n;) {
        if (i + 8 <= n && eight_ascii(p + i)) {
            for (size_t k = 0; k < 8; k++) to[k] = p[i + k];
            to += 8, i += 8;
        } else if (p[i] < 0x80) {
            *to++ = p[i++];
        } else {
            const size_t size = size_of_lead(p[i]);
            *to++ = static_cast<Unit>(code_point(p + i, size));
            i += size;
        }
    }
}

// The str of UTF-8, with U+FFFD for what is none.
inline py::str make_str(std::string_view utf8) {
    const auto* p = reinterpret_cast<const uint8_t*>(utf8.data());
    const Measured m = measure(p, utf8.size());
    PyObject* made;
    if (!m.valid) {
        made = PyUnicode_DecodeUTF8(utf8.data(), static_cast<Py_ssize_t>(utf8.size()), "replace");
    } else {
        made = PyUnicode_New(static_cast<Py_ssize_t>(m.characters), std::max<uint32_t>(m.largest, 127));
    }
    if (!made) throw py::error_already_set();
    auto text = py::reinterpret_steal<py::str>(made);
    if (!m.valid || !m.characters) return text;
    if (m.largest == 0) std::memcpy(PyUnicode_1BYTE_DATA(made), p, utf8.size());
    else if (PyUnicode_KIND(made) == PyUnicode_1BYTE_KIND) fill(p, utf8.size(), PyUnicode_1BYTE_DATA(made));
    else if (PyUnicode_KIND(made) == PyUnicode_2BYTE_KIND) fill(p, utf8.size(), PyUnicode_2BYTE_DATA(made));
    else fill(p, utf8.size(), PyUnicode_4BYTE_DATA(made));
    return text;
}

}  // namespace text
