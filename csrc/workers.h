// Runs one call on several threads, the caller's among them.
#pragma once
#include <cstddef>
#include <exception>
#include <functional>
#include <future>
#include <thread>
#include <vector>

// work(w) for w in [0, count), each on a thread of its own, or on the caller's where the system gives no more threads. Once
// all are done, the first error of any is thrown here.
template <class Work>
void run_workers(size_t count, Work&& work) {
    std::vector<std::packaged_task<void()>> tasks;  // which keep what their work throws
    tasks.reserve(count);
    for (size_t w = 0; w < count; w++) tasks.emplace_back([&work, w] { work(w); });
    std::vector<std::thread> threads;
    threads.reserve(count);
    size_t started = 1;
    try {
        for (; started < count; started++) threads.emplace_back(std::ref(tasks[started]));
    } catch (const std::exception&) {
        // The system gives no more threads, or no memory for one: the tasks that are left over run below, on this thread.
    }
    if (count) tasks[0]();
    for (size_t w = started; w < count; w++) tasks[w]();
    for (auto& t : threads) t.join();
    for (auto& task : tasks) task.get_future().get();
}
