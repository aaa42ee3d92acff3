// run_parallel: many jobs, two callers at once, and, built without ThreadSanitizer, forks in between (it does not follow
// threads that begin after one); built with OpenMP, the same on its threads. Exits 0, or says what is wrong.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/parallel.h"

#if defined(_OPENMP)
#include <omp.h>
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#endif

namespace {

constexpr int64_t most_tasks = 61, most_workers = 16;

// Used again for job after job: nothing is allocated between two of them.
struct Job {
    std::vector<int64_t> done = std::vector<int64_t>(most_tasks);  // plain, so that an unordered access is a race
    std::vector<int64_t> by_worker = std::vector<int64_t>(most_workers);
    std::atomic<int64_t> workers_out_of_range{0};
};

#if defined(_OPENMP)
std::atomic<bool> ran_in_a_team{false};
#endif

void body(void* context, int64_t task, int64_t worker) {
#if defined(_OPENMP)
    if (omp_get_num_threads() > 1) ran_in_a_team = true;
#endif
    Job& job = *static_cast<Job*>(context);
    job.done[task] += task + 1;
    if (worker < 0 || worker >= static_cast<int64_t>(job.by_worker.size()))
        ++job.workers_out_of_range;
    else
        ++job.by_worker[worker];  // plain too: no two threads may be the same worker
}

void require(bool truth, const char* what, int64_t tasks, int64_t threads) {
    if (truth) return;
    std::fprintf(stderr, "threads: %s, at %lld tasks, %lld threads\n", what, static_cast<long long>(tasks),
                 static_cast<long long>(threads));
    std::_Exit(1);
}

void run_job(Job& job, int64_t tasks, int64_t threads) {
    job.done.assign(tasks, 0), job.by_worker.assign(threads, 0);
    vgpo::run_parallel(tasks, threads, body, &job);
    int64_t counted = 0;
    for (int64_t count : job.by_worker) counted += count;
    require(job.workers_out_of_range == 0, "a worker's number is out of range", tasks, threads);
    require(counted == tasks, "tasks were lost or done twice", tasks, threads);
    for (int64_t task = 0; task < tasks; ++task)
        require(job.done[task] == task + 1, "a task was not done once", tasks, threads);
}

void run_jobs(int count, int64_t most_threads) {
    Job job;
    for (int i = 0; i < count; ++i) run_job(job, i * 7 % most_tasks, 1 + i % most_threads);
}

#if !defined(__SANITIZE_THREAD__)
void fork_and_run(int64_t threads) {
    const pid_t child = fork();
    require(child >= 0, "fork failed", 0, threads);
    if (child == 0) {
        alarm(60);  // a child that waits for threads it does not have
        run_jobs(50, threads);
        std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of a fork failed or hung", 0, threads);
}

void run_forks() {
    fork_and_run(4);
    // A fork in the middle of another thread's job: the pool that the child must not touch is busy. That thread has
    // allocated all it needs: older AddressSanitizers, GCC 12's among them, leave a lock of their allocator, held by
    // another thread at the fork, held for ever in the child.
    std::atomic<bool> begun{false}, stop{false};
    std::thread busy([&] {
        Job job;
        for (int i = 0; !stop; ++i, begun = true) run_job(job, i % most_tasks, 1 + i % 4);
    });
    while (!begun) std::this_thread::yield();
    for (int i = 0; i < 20; ++i) fork_and_run(3);
    stop = true;
    busy.join();
}
#endif

void run_all() {
    run_jobs(5000, 8);
    std::thread other([] { run_jobs(5000, 5); });
    run_jobs(5000, 3);
    other.join();
#if !defined(__SANITIZE_THREAD__)
    run_forks();
#endif
    run_jobs(100, 16);
}

}  // namespace

int main() {
    run_all();
#if defined(_OPENMP)
    require(!ran_in_a_team, "threads of OpenMP ran before they were given", 0, 0);
    vgpo::set_team({GOMP_parallel, omp_get_thread_num});
    run_all();
    require(ran_in_a_team, "threads of OpenMP did not run", 0, 0);
#endif
    std::puts("threads: all jobs whole");
}
