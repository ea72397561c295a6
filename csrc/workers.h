// Runs one call on several threads, the caller's among them.
#pragma once
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

// work(w) for w in [0, count), each on a thread of its own, or on the caller's where the system gives no more threads. Once
// all are done, the first error of any is thrown here.
template <class Work>
void run_workers(size_t count, Work&& work) {
    std::vector<std::exception_ptr> errors(count);
    auto guarded = [&](size_t w) {
        try {
            work(w);
        } catch (...) {
            errors[w] = std::current_exception();  // thrown again below, on the caller's thread
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(count);
    size_t started = 1;
    try {
        for (; started < count; started++) threads.emplace_back(guarded, started);
    } catch (const std::exception&) {
        // The system gives no more threads, or no memory for one: the calls that are left over run below, on this thread.
    }
    if (count) guarded(0);
    for (size_t w = started; w < count; w++) guarded(w);
    for (auto& t : threads) t.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
}
