#include "parallel.h"

#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>

namespace {

using Pause = int (*)(int);
Pause pause_threads;
thread_local bool ended;  // the forking thread's team, before the fork that is under way

void before_fork() { ended = pause_threads && pause_threads(2 /* omp_pause_hard */) == 0; }
void after_fork_in_child() {
    if (!ended) omp_set_num_threads(1);  // the one number that torch.get_num_threads() reads, so that torch is serial too
}

}  // namespace

void survive_forks() {
    // By name: a libgomp from before OpenMP 5 has none.
    pause_threads = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    pthread_atfork(before_fork, nullptr, after_fork_in_child);
}
