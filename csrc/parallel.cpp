#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace vgpo {
namespace {

// A job on the threads of an OpenMP runtime. torch's spin for milliseconds after each of its operations, on the cores that
// threads of our own would need; a job that runs on them begins at once instead.
struct TeamJob {
    const Team& team;
    const int64_t tasks;
    void (*const body)(void*, int64_t, int64_t);
    void* const context;
    std::atomic<int64_t> next{0};

    // A body throws nothing: others would work on with what it leaves behind.
    void draw() noexcept {
        const int64_t worker = team.thread_number();
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, worker);
    }
};

// Workers sleep between jobs. A job is counted in `generation`, its tasks are drawn from `next`.
class Pool {
public:
    void run(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
        grow(threads - 1);
        const int64_t helpers = threads - 1 < started_ ? threads - 1 : started_;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = body, context_ = context, tasks_ = tasks, helpers_ = helpers, working_ = helpers;
            next_.store(0, std::memory_order_relaxed);
            ++generation_;
        }
        wake_.notify_all();
        draw(0);
        std::lock_guard<std::mutex> lock(mutex_);
        while (working_ > 0) sleep(done_);
    }

    std::atomic<bool> busy{false};

private:
    // A system that gives no more threads leaves the work to those there are.
    void grow(int64_t helpers) {
        try {
            for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this, started_ + 1, generation_).detach();
        } catch (const std::exception&) {
        }
    }

    void serve(int64_t worker, uint64_t seen) {
        for (;;) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                while (generation_ == seen) sleep(wake_);
                seen = generation_;
                if (worker > helpers_) continue;
            }
            draw(worker);
            std::lock_guard<std::mutex> lock(mutex_);
            if (--working_ == 0) done_.notify_one();
        }
    }

    void draw(int64_t worker) noexcept {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) body_(context_, task, worker);
    }

    // std::condition_variable::wait, compiled today, asks for a libstdc++ newer than those that torch's wheels run with.
    void sleep(std::condition_variable& until) { pthread_cond_wait(until.native_handle(), mutex_.native_handle()); }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<int64_t> next_{0};
    void (*body_)(void*, int64_t, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t tasks_ = 0, helpers_ = 0, working_ = 0, started_ = 0;
    uint64_t generation_ = 0;
};

// Never destroyed: threads that sleep at exit must find it. After a fork the child has none of the threads, and
// begins with a pool of its own.
Pool* pool = nullptr;
Team team;

void renew() { pool = new Pool, team = Team(); }

// When the module is loaded: a lock around the first use could be held while another thread forks.
const int made = (renew(), pthread_atfork(nullptr, nullptr, renew));

}  // namespace

void set_team(Team runtime) { team = runtime; }

void run_parallel(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
    if (threads > tasks) threads = tasks;
    Pool* const shared = pool;
    if (threads > 1 && !shared->busy.exchange(true, std::memory_order_acquire)) {
        if (team.parallel != nullptr) {
            TeamJob job{team, tasks, body, context};
            team.parallel([](void* data) { static_cast<TeamJob*>(data)->draw(); }, &job, static_cast<unsigned>(threads), 0);
        } else {
            shared->run(tasks, threads, body, context);
        }
        shared->busy.store(false, std::memory_order_release);
        return;
    }
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

}  // namespace vgpo
