// A language of bytes, given as a network of states that may call one another's rules, made deterministic as it is walked.
//
// A configuration is a state of the network and the stacks of states to come back to, of which there may be many: they are kept
// as a graph without duplicates, a set of tops each with the set of what is below it (Tomita 1987), so that the readings of
// an ambiguous text share what they have in common. A node is a set of configurations, one a state; equal sets are one node. Without
// calls this is the subset construction, with calls it is a pushdown automaton all of whose runs are followed at once. Every state
// is expected to reach acceptance (the caller prunes the others), so that a node exists only where a text of the language goes on,
// and no rule to begin with itself. Not thread-safe: nodes are made by walking.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace automaton {

struct Edge { int32_t from, low, high, to; };  // bytes low to high, both included
struct Jump { int32_t from, to; };             // without a byte
struct Call { int32_t from, rule, back; };     // the text of the rule that starts at state `rule`, then on from `back`

struct Network {
    int32_t states, start;
    std::vector<Edge> edges;
    std::vector<Jump> jumps;
    std::vector<Call> calls;
    std::vector<int32_t> ends;  // where rules end, the whole text's among them
};

constexpr int32_t kDead = -1;

class Automaton {
public:
    // std::invalid_argument for a state that there is not.
    explicit Automaton(const Network& network);

    int32_t start() const { return start_; }
    size_t size() const { return sets_.size(); }
    bool complete(int32_t node) const { return complete_[node]; }
    // Bytes of one class lead to the same node everywhere; classes are intervals, in the bytes' order.
    const std::array<uint8_t, 256>& classes() const { return class_of_; }
    int32_t class_count() const { return class_count_; }
    const int32_t* row(int32_t node) { return rows_[node] ? rows_[node] : fill(node); }  // the next node of each class, or kDead
    int32_t next(int32_t node, uint8_t byte) { return row(node)[class_of_[byte]]; }
    // For how many characters, up to `most`, any text at all of printable characters but " and \ may follow.
    int32_t free_text(int32_t node, int32_t most);

private:
    using Set = std::vector<uint64_t>;  // sorted, of states in the upper half with stacks in the lower
    struct Hash { size_t operator()(const Set& set) const; };

    std::vector<Edge> edges_;
    std::vector<Jump> jumps_;
    std::vector<Call> calls_;
    std::vector<int32_t> first_edge_, first_jump_, first_call_;  // of each state; one more at the end
    std::vector<char> is_end_, only_ends_;
    std::array<uint8_t, 256> class_of_{};
    int32_t class_count_ = 0, start_ = 0;

    std::unordered_map<Set, int32_t, Hash> nodes_;
    std::vector<const Set*> sets_;
    std::vector<char> complete_;
    std::vector<const int32_t*> rows_;  // null until a step leaves the node
    std::vector<std::unique_ptr<int32_t[]>> blocks_;  // where rows lie
    size_t block_used_ = 0;
    std::vector<std::unique_ptr<std::vector<int32_t>>> after_character_;  // empty where some character cannot follow
    std::vector<const Set*> stacks_;  // the tops, each with the stack below it; the first is that of the whole text, with no state
    std::unordered_map<Set, uint32_t, Hash> stack_of_;
    std::unordered_map<uint64_t, uint32_t> pushed_, merged_;

    // Kept from one step to the next, so that they are not allocated anew.
    struct Arc { int32_t low, high; uint64_t target; };
    struct Made { size_t begin, end; int32_t node; };
    std::vector<Arc> arcs_;
    std::vector<Made> made_;
    struct Reached { int32_t state; uint32_t stack; bool waits; };
    Set targets_, set_;
    std::vector<Reached> reached_;
    std::vector<int32_t> waiting_, place_;  // indices into reached_: of what is to be followed, and of each state, -1 for none

    const int32_t* fill(int32_t node);
    int32_t node_of(const uint64_t* targets, size_t count);
    void reach(int32_t state, uint32_t stack);
    uint32_t stack_of(const Set& tops);
    int32_t* new_row();
    uint32_t pushed(int32_t back, uint32_t stack);
    uint32_t merged(uint32_t one, uint32_t other);
    bool leads_only_to_ends(int32_t state, std::vector<char>& known, int32_t depth);
    const std::vector<int32_t>& after_character(int32_t node);
    bool all_follow(int32_t node, int low, int high, int more, std::vector<int32_t>& reached);
};

}  // namespace automaton
