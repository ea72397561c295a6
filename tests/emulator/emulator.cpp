// The scheduler. See emulator.h.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Thread* here = nullptr;
Index thread, block, block_size, grid_size;

namespace {

constexpr size_t STACK = 256 << 10, CANARY = 4096;
constexpr unsigned char CANARY_BYTE = 0xa5;
alignas(1024) unsigned char memory[SHARED_LIMIT + CANARY];

struct Meeting {  // of a collective
    uint32_t mask;
    const char* what;
    uint64_t arrived = 0;
    void* operands[32] = {};
    bool over = false;
};
struct Warp {
    uint32_t alive = 0;
    bool asleep = false;
    std::vector<std::shared_ptr<Meeting>> meetings;
};
struct GroupMeeting {
    int arrived = 0;
    const char* what = "";
    void* operands[128] = {};
    bool over = false;
};
struct Barrier {
    int arrived = 0, expected = 0;
    uint64_t generation = 0;
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<std::shared_ptr<GroupMeeting>> groups;
Barrier barriers[16];
std::vector<Action> engine;  // loads under way
std::mt19937_64 random_source(1);
int live;
size_t shared_bytes;
std::string error;
const Action* kernel;
unsigned char* stacks = nullptr;
size_t stack_count = 0;

#if defined(__x86_64__)
void* scheduler_stack;
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch,.-emulator_switch
)");
void to_scheduler() { emulator_switch(&here->stack_pointer, scheduler_stack); }
void to_thread() { emulator_switch(&scheduler_stack, here->stack_pointer); }
void prepare(Thread& t, unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(entry);  // what `ret` goes to, with the stack aligned as after a call
    t.stack_pointer = top - 6;
}
#else
ucontext_t scheduler_context;
std::vector<ucontext_t> contexts;
void to_scheduler() { swapcontext(&contexts[here->number], &scheduler_context); }
void to_thread() { swapcontext(&scheduler_context, &contexts[here->number]); }
void prepare(Thread& t, unsigned char* stack, void (*entry)()) {
    contexts.resize(threads.size());
    ucontext_t& c = contexts[t.number];
    getcontext(&c);
    c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = STACK, c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#endif

std::string place() {
    const auto of = [](Index i) { return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")"; };
    return "block " + of(block) + (here ? ", thread " + of(here->thread) : "");
}

void close_if_complete(Warp& warp, const std::shared_ptr<Meeting>& m, void (*compute)(void**)) {
    const uint32_t needed = m->mask & warp.alive;
    if ((m->arrived & needed) != needed || m->over) return;
    compute(m->operands);
    m->over = true;
    warp.meetings.erase(std::find(warp.meetings.begin(), warp.meetings.end(), m));
}

void release(Barrier& b) {
    b.arrived = 0, b.expected = 0;
    ++b.generation;
}

void end_thread() {
    Thread& t = *here;
    if (!t.products.open.empty() || !t.products.committed.empty()) fail("a thread ended with wgmma under way");
    if (!t.bulk.open.empty()) fail("a thread ended with bulk copies that it did not commit");
    for (auto& group : t.bulk.committed)
        for (auto& action : group) action();
    t.bulk.committed.clear();
    t.done = true;
    --live;
    Warp& warp = warps[t.number / 32];
    warp.alive &= ~(1u << t.number % 32);
    if (warp.alive)
        for (const auto& m : warp.meetings)
            if ((m->arrived & m->mask & warp.alive) == (m->mask & warp.alive))
                fail(std::string("lanes ended while others wait for them at ") + m->what);
    if (barriers[0].expected < 0 && barriers[0].arrived == live && live) release(barriers[0]);
}

void entry() {
    (*kernel)();
    end_thread();
    to_scheduler();
    std::abort();
}

void resume(Thread& t) {
    here = &t;
    thread = t.thread;
    to_thread();
    here = nullptr;
}

void run_block(size_t thread_count) {
    threads.assign(thread_count, Thread{});
    warps.assign((thread_count + 31) / 32, Warp{});
    groups.assign((thread_count + 127) / 128, nullptr);
    for (Barrier& b : barriers) b = Barrier{};
    engine.clear();
    std::memset(memory, 0xff, shared_bytes);
    std::memset(memory + shared_bytes, CANARY_BYTE, CANARY);
    live = static_cast<int>(thread_count);
    std::vector<int> order(thread_count);
    for (size_t i = 0; i < thread_count; ++i) {
        Thread& t = threads[i];
        t.number = static_cast<int>(i), order[i] = t.number;
        t.thread = {static_cast<unsigned>(i % block_size.x), static_cast<unsigned>(i / block_size.x % block_size.y),
                    static_cast<unsigned>(i / block_size.x / block_size.y)};
        warps[i / 32].alive |= 1u << i % 32;
        prepare(t, stacks + i * STACK, entry);
    }
    bool moved = true;
    for (int round = 0; live && error.empty(); ++round) {
        std::shuffle(order.begin(), order.end(), random_source);
        // A quarter of the warps sleeps for a while, so that the others get as far ahead as barriers let them.
        if (round % 64 == 0)
            for (Warp& warp : warps) warp.asleep = random_source() % 4 == 0;
        const bool all = !moved;
        moved = false;
        for (int i : order) {
            Thread& t = threads[i];
            if (warps[i / 32].asleep && !all) continue;
            if (t.done || (t.ready && !t.ready(t.ready_object, t.ready_value))) continue;
            t.ready = nullptr;
            moved = true;
            resume(t);
            if (!error.empty()) return;
        }
        if (moved || !live || !all) continue;
        if (!engine.empty()) {  // one load arrives, whichever
            const size_t at = random_source() % engine.size();
            Action action = engine[at];
            engine.erase(engine.begin() + at);
            action();
            continue;
        }
        for (Thread& t : threads)
            if (!t.done) {
                here = &t;
                error = place() + " and all others wait for each other; it waits at " + t.waits_for;
                here = nullptr;
                return;
            }
    }
    if (error.empty() && !engine.empty()) error = place() + ": the block ended before all it loaded had come";
    for (size_t i = 0; i < CANARY; ++i)
        if (memory[shared_bytes + i] != CANARY_BYTE && error.empty()) error = place() + ": a store past the end of shared memory";
}

}  // namespace

unsigned char* shared_memory() { return memory; }

uint32_t shared_offset(const void* pointer) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    if (p < memory || p >= memory + shared_bytes) fail("an address outside the dynamic shared memory");
    return static_cast<uint32_t>(p - memory);
}

void fail(const std::string& message) {
    if (error.empty()) error = place() + ": " + message;
    if (!here) throw std::runtime_error(error);
    to_scheduler();  // which does not come back
    std::abort();
}

void wait(const char* what, bool (*ready)(const void*, uint64_t), const void* object, uint64_t value) {
    here->waits_for = what;
    here->ready = ready, here->ready_object = object, here->ready_value = value;
    to_scheduler();
}

bool coin() { return random_source() & 1; }

void collective(uint32_t mask, const char* what, void* operand, void (*compute)(void**)) {
    Warp& warp = warps[here->number / 32];
    const int lane = here->number % 32;
    if (!(mask >> lane & 1)) fail(std::string(what) + " by a lane that its mask does not name");
    std::shared_ptr<Meeting> meeting;
    for (auto& m : warp.meetings) {
        if (m->arrived >> lane & 1) continue;
        if ((m->mask & mask) && (m->mask != mask || std::strcmp(m->what, what)))
            fail(std::string("lanes of one warp at different instructions: ") + m->what + " and " + what);
        if (m->mask == mask) meeting = m;
    }
    if (!meeting) {
        meeting = std::make_shared<Meeting>();
        meeting->mask = mask, meeting->what = what;
        warp.meetings.push_back(meeting);
    }
    meeting->arrived |= 1ull << lane;
    meeting->operands[lane] = operand;
    close_if_complete(warp, meeting, compute);
    if (!meeting->over) wait(what, [](const void* m, uint64_t) { return static_cast<const Meeting*>(m)->over; }, meeting.get());
}

void warpgroup(const char* what, void* operand, void (*compute)(void**)) {
    auto& slot = groups[here->number / 128];
    if (!slot) slot = std::make_shared<GroupMeeting>(), slot->what = what;
    const std::shared_ptr<GroupMeeting> meeting = slot;
    if (std::strcmp(meeting->what, what)) fail(std::string("a warpgroup at different instructions: ") + meeting->what + ", " + what);
    meeting->operands[here->number % 128] = operand;
    if (++meeting->arrived == 128) {
        compute(meeting->operands);
        meeting->over = true;
        slot = nullptr;
        return;
    }
    wait(what, [](const void* m, uint64_t) { return static_cast<const GroupMeeting*>(m)->over; }, meeting.get());
}

void barrier(int id, int count, bool waits) {
    if (id < 0 || id > 15) fail("a barrier beyond 15");
    if (count >= 0 && (count % 32 || count == 0)) fail("a barrier of no whole warps");
    Barrier& b = barriers[id];
    const uint64_t generation = b.generation;
    if (b.arrived && b.expected != (count < 0 ? -1 : count)) fail("threads expect different numbers at one barrier");
    b.expected = count < 0 ? -1 : count;
    ++b.arrived;
    if (b.arrived == (count < 0 ? live : count)) {
        release(b);
        return;
    }
    if (waits) wait(id ? "a named barrier" : "__syncthreads", [](const void* at, uint64_t before) {
        return static_cast<const Barrier*>(at)->generation != before;
    }, &b, generation);
}

void in_background(Action action) { coin() ? action() : engine.push_back(std::move(action)); }

void seed(uint64_t value) { random_source.seed(value); }

std::string run(Index grid, Index size, size_t shared, const Action& body) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
    if (!count || count > 1024) return "a block has 1 to 1024 threads, not " + std::to_string(count);
    if (grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) return "a grid too large";
    if (shared > SHARED_LIMIT) return "a block has at most " + std::to_string(SHARED_LIMIT) + " bytes of shared memory";
    if (stack_count < count) {
        if (stacks) munmap(stacks, stack_count * STACK);
        stack_count = count;
        stacks = static_cast<unsigned char*>(mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (stacks == MAP_FAILED) return "no memory for stacks";
    }
    shared_bytes = shared, grid_size = grid, block_size = size, kernel = &body, error.clear();
    std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random_source);
    for (uint64_t i : blocks) {
        block = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / grid.x / grid.y)};
        run_block(count);
        if (!error.empty()) break;
    }
    return error;
}

}  // namespace emulator
