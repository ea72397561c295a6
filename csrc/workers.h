// Runs one call on several threads, the caller's among them.
#pragma once
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

// work(w) for w in [0, count), each on a thread of its own. Once all are done, the first error of any is thrown here.
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
    for (size_t w = 1; w < count; w++) threads.emplace_back(guarded, w);
    if (count) guarded(0);
    for (auto& t : threads) t.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
}
