#include "automaton.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace automaton {

namespace {

constexpr uint64_t kComplete = ~uint64_t{0};  // in a node's set: the text so far is whole
constexpr uint64_t kBottom = ~uint64_t{0};    // in a stack: nothing to come back to

uint64_t configuration(int32_t state, uint32_t stack) { return static_cast<uint64_t>(state) << 32 | stack; }

// Sorts arcs by the state they leave and returns where each state's begin.
template <class Arc>
std::vector<int32_t> by_state(std::vector<Arc>& arcs, int32_t states) {
    std::stable_sort(arcs.begin(), arcs.end(), [](const Arc& a, const Arc& b) { return a.from < b.from; });
    std::vector<int32_t> first(states + 1, 0);
    for (const Arc& arc : arcs) first[arc.from + 1]++;
    for (int32_t s = 0; s < states; s++) first[s + 1] += first[s];
    return first;
}

}  // namespace

size_t Automaton::Hash::operator()(const Set& set) const {
    uint64_t h = set.size();
    for (uint64_t x : set) h = (h ^ x) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    return h;
}

Automaton::Automaton(const Network& network) : edges_(network.edges), jumps_(network.jumps), calls_(network.calls) {
    const auto check = [&](int32_t state) {
        if (state < 0 || state >= network.states)
            throw std::invalid_argument("automaton: expected states below " + std::to_string(network.states) + ", got " + std::to_string(state));
    };
    check(network.start);
    for (const Edge& e : edges_) {
        check(e.from), check(e.to);
        if (e.low < 0 || e.high > 255 || e.low > e.high) throw std::invalid_argument("automaton: expected edges of bytes from low to high");
    }
    for (const Jump& j : jumps_) check(j.from), check(j.to);
    for (const Call& c : calls_) check(c.from), check(c.rule), check(c.back);
    for (int32_t s : network.ends) check(s);
    first_edge_ = by_state(edges_, network.states);
    first_jump_ = by_state(jumps_, network.states);
    first_call_ = by_state(calls_, network.states);
    is_end_.assign(network.states, 0);
    for (int32_t s : network.ends) is_end_[s] = 1;
    only_ends_.assign(network.states, 0);
    std::vector<char> known(network.states, 0);
    for (int32_t s = 0; s < network.states; s++) only_ends_[s] = leads_only_to_ends(s, known, 0);

    std::array<bool, 257> cut{};
    cut[0] = true;
    for (const Edge& e : edges_) cut[e.low] = cut[e.high + 1] = true;
    for (int b = 0; b < 256; b++) class_of_[b] = static_cast<uint8_t>((class_count_ += cut[b]) - 1);
    place_.assign(network.states, -1);
    const uint64_t start = configuration(network.start, stack_of({kBottom}));
    start_ = node_of(&start, 1);
}

// Coming back to such a state is coming back from its own rule, so that a call there needs no frame: a rule that ends by
// calling itself keeps its stack as it is.
bool Automaton::leads_only_to_ends(int32_t state, std::vector<char>& known, int32_t depth) {
    constexpr int32_t kDeepest = 1000;  // "no" is right everywhere, and takes a frame more
    if (known[state] || depth > kDeepest) return only_ends_[state];
    known[state] = 1;  // while it is worked out, and in a cycle of jumps: no
    const bool leaves = first_edge_[state] < first_edge_[state + 1] || first_call_[state] < first_call_[state + 1];
    bool only = !leaves && (is_end_[state] || first_jump_[state] < first_jump_[state + 1]);
    for (int32_t j = first_jump_[state]; only && j < first_jump_[state + 1]; j++) only = leads_only_to_ends(jumps_[j].to, known, depth + 1);
    only_ends_[state] = only;
    return only;
}

uint32_t Automaton::stack_of(const Set& tops) {
    const auto [at, fresh] = stack_of_.try_emplace(tops, static_cast<uint32_t>(stacks_.size()));
    if (fresh) stacks_.push_back(&at->first);
    return at->second;
}

uint32_t Automaton::pushed(int32_t back, uint32_t stack) {
    const auto [at, fresh] = pushed_.try_emplace(configuration(back, stack), 0);
    if (fresh) at->second = stack_of({configuration(back, stack)});
    return at->second;
}

// The stacks of both, with each state to come back to once.
uint32_t Automaton::merged(uint32_t one, uint32_t other) {
    if (one == other) return one;
    const uint64_t pair = static_cast<uint64_t>(std::min(one, other)) << 32 | std::max(one, other);
    const auto known = merged_.find(pair);
    if (known != merged_.end()) return known->second;
    Set tops;
    const Set &a = *stacks_[one], &b = *stacks_[other];
    for (size_t i = 0, j = 0; i < a.size() || j < b.size();) {
        if (j == b.size() || (i < a.size() && a[i] >> 32 < b[j] >> 32)) tops.push_back(a[i++]);
        else if (i == a.size() || b[j] >> 32 < a[i] >> 32) tops.push_back(b[j++]);
        else {
            const auto top = static_cast<int32_t>(a[i] >> 32);
            tops.push_back(a[i] == b[j] ? a[i] : configuration(top, merged(static_cast<uint32_t>(a[i]), static_cast<uint32_t>(b[j]))));
            i++, j++;
        }
    }
    return merged_[pair] = stack_of(tops);
}

void Automaton::reach(int32_t state, uint32_t stack) {
    int32_t& place = place_[state];
    if (place < 0) {
        place = static_cast<int32_t>(reached_.size());
        reached_.push_back({state, stack, true});
        waiting_.push_back(place);
        return;
    }
    Reached& known = reached_[place];
    const uint32_t both = merged(known.stack, stack);
    if (both == known.stack) return;
    known.stack = both;
    if (!known.waits) known.waits = true, waiting_.push_back(place);
}

// The node of all configurations that these reach without a byte.
int32_t Automaton::node_of(const uint64_t* targets, size_t count) {
    reached_.clear(), waiting_.clear(), set_.clear();
    for (size_t i = 0; i < count; i++) reach(static_cast<int32_t>(targets[i] >> 32), static_cast<uint32_t>(targets[i]));
    bool complete = false;
    while (!waiting_.empty()) {
        const int32_t place = waiting_.back();
        waiting_.pop_back();
        reached_[place].waits = false;
        const auto [state, stack, _] = reached_[place];
        if (is_end_[state]) {
            const Set& tops = *stacks_[stack];
            for (uint64_t top : tops) {
                if (top == kBottom) complete = true;
                else reach(static_cast<int32_t>(top >> 32), static_cast<uint32_t>(top));
            }
        }
        for (int32_t j = first_jump_[state]; j < first_jump_[state + 1]; j++) reach(jumps_[j].to, stack);
        for (int32_t c = first_call_[state]; c < first_call_[state + 1]; c++)
            reach(calls_[c].rule, only_ends_[calls_[c].back] ? stack : pushed(calls_[c].back, stack));
    }
    for (const Reached& reached : reached_) {
        place_[reached.state] = -1;
        if (first_edge_[reached.state] < first_edge_[reached.state + 1]) set_.push_back(configuration(reached.state, reached.stack));
    }
    std::sort(set_.begin(), set_.end());
    if (complete) set_.push_back(kComplete);
    const auto found = nodes_.find(set_);
    if (found != nodes_.end()) return found->second;
    const auto node = static_cast<int32_t>(sets_.size());
    sets_.push_back(&nodes_.emplace(set_, node).first->first);
    complete_.push_back(complete);
    rows_.push_back(nullptr);
    after_character_.emplace_back();
    return node;
}

int32_t* Automaton::new_row() {
    constexpr size_t kBlock = 1 << 14;
    if (blocks_.empty() || block_used_ + class_count_ > kBlock) blocks_.push_back(std::make_unique<int32_t[]>(kBlock)), block_used_ = 0;
    int32_t* row = blocks_.back().get() + block_used_;
    block_used_ += class_count_;
    return row;
}

const int32_t* Automaton::fill(int32_t node) {
    arcs_.clear(), made_.clear(), targets_.clear();
    std::array<bool, 257> cut{};
    for (uint64_t here : *sets_[node]) {
        if (here == kComplete) continue;
        const auto state = static_cast<int32_t>(here >> 32);
        for (int32_t e = first_edge_[state]; e < first_edge_[state + 1]; e++) {
            const Edge& edge = edges_[e];
            arcs_.push_back({class_of_[edge.low], class_of_[edge.high], configuration(edge.to, static_cast<uint32_t>(here))});
            cut[arcs_.back().low] = cut[arcs_.back().high + 1] = true;
        }
    }
    int32_t* row = new_row();
    for (int32_t c = 0; c < class_count_; c++) {
        row[c] = c ? row[c - 1] : kDead;
        if (!cut[c]) continue;
        const size_t begin = targets_.size();
        for (const Arc& arc : arcs_)
            if (arc.low <= c && c <= arc.high) targets_.push_back(arc.target);
        const size_t count = targets_.size() - begin;
        // The intervals of a class of characters share a few ways on.
        const auto same = std::find_if(made_.begin(), made_.end(), [&](const Made& made) {
            return made.end - made.begin == count && std::equal(targets_.begin() + begin, targets_.end(), targets_.begin() + made.begin);
        });
        if (count == 0) row[c] = kDead;
        else if (same != made_.end()) row[c] = same->node;
        else made_.push_back({begin, targets_.size(), row[c] = node_of(targets_.data() + begin, count)});
    }
    return rows_[node] = row;
}

// Whether every byte from low to high may follow, and after it `more` continuation bytes, whichever they are.
bool Automaton::all_follow(int32_t node, int low, int high, int more, std::vector<int32_t>& reached) {
    int32_t last = kDead;
    for (int b = low; b <= high; b++) {
        const int32_t to = next(node, static_cast<uint8_t>(b));
        if (to == kDead) return false;
        if (to == last) continue;
        last = to;
        if (more == 0) reached.push_back(to);
        else if (!all_follow(to, 0x80, 0xBF, more - 1, reached)) return false;
    }
    return true;
}

// Where the characters of free text lead, in UTF-8 (Unicode 16, table 3-7), or nowhere if one of them cannot follow.
const std::vector<int32_t>& Automaton::after_character(int32_t node) {
    if (after_character_[node]) return *after_character_[node];
    auto reached = std::make_unique<std::vector<int32_t>>();
    const auto lead = [&](int low, int high, int second_low, int second_high, int more) {
        for (int b = low; b <= high; b++) {
            if (b > low && class_of_[b] == class_of_[b - 1]) continue;
            const int32_t to = next(node, static_cast<uint8_t>(b));
            if (to == kDead || !all_follow(to, second_low, second_high, more, *reached)) return false;
        }
        return true;
    };
    const bool all = all_follow(node, ' ', '!', 0, *reached) && all_follow(node, '#', '[', 0, *reached) &&
                     all_follow(node, ']', '~', 0, *reached) && lead(0xC2, 0xDF, 0x80, 0xBF, 0) && lead(0xE0, 0xE0, 0xA0, 0xBF, 1) &&
                     lead(0xE1, 0xEC, 0x80, 0xBF, 1) && lead(0xED, 0xED, 0x80, 0x9F, 1) && lead(0xEE, 0xEF, 0x80, 0xBF, 1) &&
                     lead(0xF0, 0xF0, 0x90, 0xBF, 2) && lead(0xF1, 0xF3, 0x80, 0xBF, 2) && lead(0xF4, 0xF4, 0x80, 0x8F, 2);
    if (!all) reached->clear();
    std::sort(reached->begin(), reached->end());
    reached->erase(std::unique(reached->begin(), reached->end()), reached->end());
    after_character_[node] = std::move(reached);
    return *after_character_[node];
}

int32_t Automaton::free_text(int32_t node, int32_t most) {
    constexpr size_t kMostNodes = 64;  // at once: beyond it the walk of the tokens is as good
    std::vector<int32_t> all{node}, frontier{node};
    for (int32_t length = 0; length < most; length++) {
        std::vector<int32_t> next_frontier;
        for (int32_t at : frontier) {
            const std::vector<int32_t>& reached = after_character(at);
            if (reached.empty()) return length;
            for (int32_t to : reached) {
                if (std::find(all.begin(), all.end(), to) != all.end()) continue;
                all.push_back(to), next_frontier.push_back(to);
            }
            if (next_frontier.size() > kMostNodes) return length;
        }
        if (next_frontier.empty()) return most;  // nothing new: it can go on for ever
        frontier = std::move(next_frontier);
    }
    return most;
}

}  // namespace automaton
