// Tasks on torch's threads.
#pragma once
#include <cstdint>

namespace vgpo {

// Runs body(context, task, worker) for every task in [0, tasks), on at most `threads` threads, the caller's included;
// worker is in [0, threads). A body must not throw, and what a task computes must depend on its number alone: results
// are then the same whatever the number of threads.
void run_parallel(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context);

// torch_parallel_for of torch's stable C interface, from torch 2.10 on: calls body(first, last, context) on its threads
// for ranges that make up [begin, end). Null runs all tasks on the caller's thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);
extern ParallelFor parallel_for;

}  // namespace vgpo
