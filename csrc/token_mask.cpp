#include "token_mask.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace token_mask {

namespace {

constexpr int32_t kNone = -1;
// The longest tokens of the groups of free text, in characters; longer ones are with the others. Where at least so many may
// follow, a group is allowed as a whole. Most tokens are short, and most places where text is bounded are far from the bound.
constexpr int32_t kLengths[] = {8, 16, 32};

// The characters of a token of free text, or 0 for another.
int32_t characters(std::string_view token) {
    int32_t count = 0;
    for (size_t i = 0; i < token.size(); count++) {
        const auto lead = static_cast<uint8_t>(token[i]);
        const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
        if (length == 0 || i + length > token.size() || lead < ' ' || lead == '"' || lead == '\\' || lead == 0x7F) return 0;
        for (size_t k = 1; k < length; k++) {
            const auto byte = static_cast<uint8_t>(token[i + k]);
            const int low = k > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
            const int high = k > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
            if (byte < low || byte > high) return 0;
        }
        i += length;
    }
    return count;
}

}  // namespace

Vocabulary::Vocabulary(const std::vector<std::string_view>& tokens) : same_(tokens.size(), kNone), ends_{0} {
    for (std::string_view token : tokens) text_ += token, ends_.push_back(text_.size());
    std::vector<int32_t> order;  // of the tokens that stand for text, by their bytes; of equal ones the first alone
    for (size_t j = 0; j < tokens.size(); j++)
        if (!tokens[j].empty()) order.push_back(static_cast<int32_t>(j));
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return tokens[a] < tokens[b]; });
    for (size_t i = order.size(); i-- > 1;)
        if (tokens[order[i]] == tokens[order[i - 1]]) same_[order[i - 1]] = order[i], order[i] = kNone;
    order.erase(std::remove(order.begin(), order.end(), kNone), order.end());

    std::vector<std::vector<int32_t>> members(std::size(kLengths) + 1);
    for (int32_t j : order) {
        const int32_t n = characters(tokens[j]);
        const auto* length = std::find_if(std::begin(kLengths), std::end(kLengths), [&](int32_t most) { return n <= most; });
        members[n == 0 || length == std::end(kLengths) ? 0 : 1 + (length - std::begin(kLengths))].push_back(j);
    }
    for (size_t g = 0; g < members.size(); g++) {
        Group group{g ? kLengths[g - 1] : 0, std::vector<uint32_t>(words(), 0), {}};
        Tree& tree = group.tree;
        struct Range { size_t begin, end, depth; int32_t place; };  // members that share their first `depth` bytes, which end at a place
        std::vector<Range> waiting{{0, members[g].size(), 0, kNone}};
        while (!waiting.empty()) {
            auto [at, end, depth, place] = waiting.back();
            waiting.pop_back();
            if (at < end && tokens[members[g][at]].size() == depth) tree.places[place].token = members[g][at++];
            const size_t first = tree.places.size(), waited = waiting.size();
            while (at < end) {
                const size_t begin = at;
                const char byte = tokens[members[g][at]][depth];
                while (at < end && tokens[members[g][at]][depth] == byte) at++;
                waiting.push_back({begin, at, depth + 1, static_cast<int32_t>(tree.places.size())});
                tree.places.push_back({kNone, 0, 0, static_cast<uint8_t>(byte)});
            }
            std::reverse(waiting.begin() + waited, waiting.end());  // the first child's children come next, where the walk goes next
            const auto children = static_cast<int32_t>(tree.places.size() - first);
            if (place == kNone) tree.roots = children;
            else tree.places[place].first = static_cast<int32_t>(first), tree.places[place].children = static_cast<uint16_t>(children);
            tree.depth = std::max(tree.depth, depth);
        }
        for (int32_t j : members[g])
            for (; j != kNone; j = same_[j]) group.bits[j / 32] |= 1u << j % 32;
        groups_.push_back(std::move(group));
    }
}

void Vocabulary::mask(automaton::Automaton& automaton, int32_t node, uint32_t* bits) const {
    std::fill_n(bits, words(), 0u);
    const int32_t free = automaton.free_text(node, kLengths[std::size(kLengths) - 1]);
    for (const Group& group : groups_) {
        if (group.characters && group.characters <= free) {
            for (size_t w = 0; w < group.bits.size(); w++) bits[w] |= group.bits[w];
        } else {
            walk(group.tree, automaton, node, bits);
        }
    }
}

void Vocabulary::walk(const Tree& tree, automaton::Automaton& automaton, int32_t node, uint32_t* bits) const {
    struct Level { const Place *at, *end; const int32_t* row; };
    std::vector<Level> levels(tree.depth + 1);
    Level* level = levels.data();
    const Place* places = tree.places.data();
    const uint8_t* class_of = automaton.classes().data();
    *level = {places, places + tree.roots, automaton.row(node)};
    while (true) {
        if (level->at == level->end) {
            if (level == levels.data()) return;
            level--;
            continue;
        }
        const Place& place = *level->at++;
        const int32_t to = level->row[class_of[place.byte]];
        if (to == automaton::kDead) continue;
        for (int32_t j = place.token; j != kNone; j = same_[j]) bits[j / 32] |= 1u << j % 32;
        if (place.children) *++level = {places + place.first, places + place.first + place.children, automaton.row(to)};
    }
}

Masks::Masks(const Vocabulary& vocabulary, automaton::Automaton& automaton, const std::vector<int32_t>& ends, size_t bytes)
    : vocabulary_(vocabulary), automaton_(automaton), end_bits_(vocabulary.words(), 0),
      most_(std::max<size_t>(1, bytes / (4 * std::max<size_t>(1, vocabulary.words())))) {
    for (int32_t j : ends) {
        if (j < 0 || j >= vocabulary.size()) throw std::out_of_range("Masks: expected end tokens of the vocabulary, got " + std::to_string(j));
        end_bits_[j / 32] |= 1u << j % 32;
    }
}

const uint32_t* Masks::row(int32_t node) {
    const auto found = rows_.find(node);
    if (found != rows_.end()) return found->second.empty() ? nullptr : found->second.data();
    std::vector<uint32_t> bits = end_bits_;
    if (node >= 0) {
        vocabulary_.mask(automaton_, node, bits.data());
        for (size_t w = 0; automaton_.complete(node) && w < bits.size(); w++) bits[w] |= end_bits_[w];
    }
    if (std::all_of(bits.begin(), bits.end(), [](uint32_t word) { return !word; })) bits.clear();
    if (order_.size() >= most_) rows_.erase(order_.front()), order_.pop_front();
    order_.push_back(node);
    const std::vector<uint32_t>& kept = rows_[node] = std::move(bits);
    return kept.empty() ? nullptr : kept.data();
}

int32_t Masks::advance(int32_t node, int32_t token) const {
    const std::string_view text = vocabulary_.text(token);
    if (node < 0 || text.empty()) return kNone;  // an end token
    int32_t after = node;
    for (size_t i = 0; i < text.size() && after != automaton::kDead; i++) after = automaton_.next(after, static_cast<uint8_t>(text[i]));
    return after;  // where an end token stands for text that cannot follow, kDead is kNone
}

}  // namespace token_mask
