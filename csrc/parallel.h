// Threads that outlive a call: one task after the other, taken by whichever thread is free. They are torch's own where
// its OpenMP runtime is known, else a pool's.
#pragma once
#include <cstdint>

namespace vgpo {

// Runs body(context, task, worker) for every task in [0, tasks), on at most `threads` threads, the caller's included;
// worker is in [0, threads). What a task computes must depend on its number alone: results are then the same whatever
// the number of threads. While another call runs, the caller works alone.
void run_parallel(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context);

// An OpenMP runtime by two entry points of GNU's: GOMP_parallel and omp_get_thread_num; null for none.
struct Team {
    void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
    int (*thread_number)() = nullptr;
};

// Has jobs run on the threads of that runtime from here on. A child of a fork has none of them and goes back to a pool.
void set_team(Team team);

}  // namespace vgpo
