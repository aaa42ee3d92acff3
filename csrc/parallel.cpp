#include "parallel.h"

#include <atomic>

namespace vgpo {

ParallelFor parallel_for = nullptr;

void run_parallel(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
    struct Job {
        const int64_t tasks;
        void (*const body)(void*, int64_t, int64_t);
        void* const context;
        std::atomic<int64_t> next{0};
    } job{tasks, body, context};
    // A worker a range, which takes one task after the other until none is left.
    auto work = [](int64_t worker, int64_t, void* data) noexcept {
        Job& shared = *static_cast<Job*>(data);
        for (int64_t task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;)
            shared.body(shared.context, task, worker);
    };
    if (threads > tasks) threads = tasks;
    if (threads > 1 && parallel_for) parallel_for(0, threads, 1, work, &job);
    work(0, 1, &job);  // the tasks left: all of them on one thread
}

}  // namespace vgpo
