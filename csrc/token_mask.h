// Which tokens of a vocabulary may come next in a text of a language: one bit a token.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>
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
    std::string_view text(int32_t token) const { return {text_.data() + ends_[token], ends_[token + 1] - ends_[token]}; }
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
    std::string text_;           // of all tokens, and where each ends, after a 0
    std::vector<size_t> ends_;

    void walk(const Tree& tree, automaton::Automaton& automaton, int32_t node, uint32_t* bits) const;
};

// The masks of one language, kept by node, with the tokens that end a text where it is whole. At node -1, after one of these, they
// alone are allowed. Not thread-safe, as the automaton is not.
class Masks {
public:
    // bytes: of masks that are kept; beyond that the oldest go. std::out_of_range for ends that the vocabulary does not have.
    Masks(const Vocabulary& vocabulary, automaton::Automaton& automaton, const std::vector<int32_t>& ends, size_t bytes);

    size_t words() const { return end_bits_.size(); }
    size_t count() const { return rows_.size(); }
    bool has(int32_t node) const { return node < static_cast<int32_t>(automaton_.size()); }  // below 0 is after an end token
    bool known(int32_t node) const { return rows_.count(node); }
    // As of Vocabulary::mask, or null where nothing may come. Good until the next call.
    const uint32_t* row(int32_t node);
    // The node after a token; one that the mask does not allow is not expected.
    int32_t advance(int32_t node, int32_t token) const;

private:
    const Vocabulary& vocabulary_;
    automaton::Automaton& automaton_;
    std::vector<uint32_t> end_bits_;
    size_t most_;  // rows
    std::unordered_map<int32_t, std::vector<uint32_t>> rows_;  // an empty one where nothing may come
    std::deque<int32_t> order_;
};

}  // namespace token_mask
