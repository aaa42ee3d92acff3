// Threads that outlive a call: one task after the other, taken by whichever thread is free.
#pragma once
#include <cstdint>

namespace vgpo {

// Runs body(context, task, worker) for every task in [0, tasks), on at most `threads` threads, the caller's included;
// worker is in [0, threads). What a task computes must depend on its number alone: results are then the same whatever
// the number of threads. While another call runs, or after a fork, the caller works alone.
void run_parallel(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace vgpo
