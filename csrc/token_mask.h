// Which tokens of a vocabulary may come next in a text of a language: one bit a token.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "automaton.h"

namespace token_mask {

// A vocabulary as trees of bytes. Tokens of free text (whole printable characters, neither " nor \) stand apart from the
// others, by length: where an automaton takes any such text, as inside a JSON string, they are allowed without a look at each.
// Immutable and thread-safe.
class Vocabulary {
public:
    explicit Vocabulary(const std::vector<std::string_view>& tokens);  // an empty one stands for no text

    int32_t size() const { return static_cast<int32_t>(same_.size()); }
    size_t words() const { return (same_.size() + 31) / 32; }
    // Bit j % 32 of word j / 32: whether token j may come at the node. All `words()` are written.
    void mask(automaton::Automaton& automaton, int32_t node, uint32_t* bits) const;

private:
    struct Place {
        int32_t token, first;  // the token that ends here, or kNone; the first of the children, which lie side by side
        uint16_t children;
        uint8_t byte;
    };
    struct Tree {
        std::vector<Place> places;  // the root's children come first, then the children of the first of them, and so on
        int32_t roots = 0;
        size_t depth = 0;
    };
    struct Group {
        int32_t characters;  // of the longest token; 0: not free text
        std::vector<uint32_t> bits;
        Tree tree;
    };
    std::vector<Group> groups_;
    std::vector<int32_t> same_;  // the next token that stands for the same bytes, or kNone

    void walk(const Tree& tree, automaton::Automaton& automaton, int32_t node, uint32_t* bits) const;
};

}  // namespace token_mask
