"""Runs rewards in processes of their own, each call under a time limit that holds whatever the call does."""

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import struct
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from vgpo_train.data import Sample
from vgpo_train.rewards.processes import describe_end, isolate, kill, share_of_cores
from vgpo_train.rewards.registered import Reward

_CHUNK = 16  # most completions handed to a worker at once
_IN_A_ROW = 16  # time-outs after which the rest of a call's completions do not wait for theirs
_SHOWN = 300  # characters of an error
_WAKE = 1.0  # seconds after which an idle manager looks whether its parent is alive


class Outcome(NamedTuple):
    """What one reward gave for one completion."""

    value: float  # finite in float32; 0 for a failure
    error: str | None  # kind and text; None for a success


class _Chunk(NamedTuple):
    start: int  # row of the first completion
    count: int
    pickled: bytes  # completions and samples


class _Job(NamedTuple):
    reward: str
    chunk: _Chunk
    done: int  # completions of the chunk that have their outcome


class RewardPool:
    """Worker processes that call rewards.

    The constructor forks a manager, which forks the workers, kills the one whose call exceeds the limit, and forks
    another. A fork knows every reward that is registered, closures and those of a script included, and the manager,
    being forked early, is a small and single-threaded process to fork from. All of them end with `close`, with the
    pool's last reference and with the process that made it, however that ends.

    Args:
        rewards: the rewards by name.
        timeout: seconds that one call of a reward may take.
        workers: number of worker processes; None takes this rank's share of the cores, at most 8.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, timeout: float, workers: int | None = None) -> None:
        self._rewards = dict(rewards)
        self._timeout = timeout
        self._workers = workers or share_of_cores()
        self._lock = threading.Lock()
        self._start()

    def run(self, completions: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[Outcome]]:
        """Calls each reward on each completion with its sample; returns the outcomes by reward, in that order.

        The seeds of random, numpy and torch are set before each call from torch's own seed and the completion's place,
        so that a reward that draws is repeatable.

        Raises:
            RuntimeError: the pool is closed.
        """
        with self._lock:
            if not self._stop.alive:
                raise RuntimeError("a closed RewardPool cannot run; make another")
            try:
                self._connection.send((torch.initial_seed(), self._chunks(completions, samples)))
                return self._connection.recv()
            except (EOFError, OSError):
                self._restart()
                error = "ChildProcessError: the processes that run rewards were killed; they are started anew"
                return {name: [Outcome(0.0, error)] * len(samples) for name in self._rewards}
            except BaseException:  # such as Ctrl-C: an answer that comes late must not be taken for the next call's
                self._restart()
                raise

    def close(self) -> None:
        """Ends the processes."""
        self._stop()

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        parent = os.getpid()
        pid = _fork()
        if pid == 0:
            self._connection.close()
            _exit_after(lambda: _Manager(theirs, self._rewards, self._timeout, self._workers, parent).serve())
        theirs.close()
        self._stop = weakref.finalize(self, _end_manager, self._connection, pid, parent)

    def _chunks(self, completions: Sequence[str], samples: Sequence[Sample]) -> list[_Chunk]:
        # Several chunks a worker: one that meets slow completions leaves the rest to the others.
        size = min(_CHUNK, -(-len(samples) // (4 * self._workers)) or 1)
        rows = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
        parts = [([completions[row] for row in part], [samples[row] for row in part]) for part in rows]
        return [_Chunk(part[0], len(part), pickle.dumps(one)) for part, one in zip(rows, parts, strict=True)]


def _fork() -> int:
    sys.stdout.flush()  # what is buffered would be written twice
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python warns of locks that other threads may hold; the child takes none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _exit_after(task: Callable[[], Any]) -> NoReturn:
    """Ends a forked process after its task without running what its parent registered for its own end."""
    status = 1
    try:
        task()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


def _end_manager(connection: Connection, pid: int, parent: int) -> None:
    if os.getpid() != parent:
        return  # a fork of the process that made the pool
    connection.close()
    kill(pid)


class _Worker:
    """A worker process as its manager sees it."""

    def __init__(self, rewards: Mapping[str, Reward], inherited: Sequence[Connection]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        manager = os.getpid()
        self.pid = _fork()
        if self.pid == 0:
            for connection in (self.connection, *inherited):
                connection.close()  # its end must be seen by the processes that wait for it
            isolate(manager)
            _exit_after(lambda: _work(theirs, rewards))
        theirs.close()
        self.job: _Job | None = None
        self.deadline = 0.0

    def end(self) -> int:
        """Kills the process and what it started; returns its status as `os.waitpid` gives it."""
        self.connection.close()
        return kill(self.pid, group=True)


class _Manager:
    """Hands jobs to workers and holds them to the time limit; runs in a process of its own."""

    def __init__(
        self, connection: Connection, rewards: Mapping[str, Reward], timeout: float, workers: int, parent: int
    ) -> None:
        self._connection = connection
        self._rewards = rewards
        self._timeout = timeout
        self._most = workers
        self._parent = parent
        self._workers: list[_Worker] = []
        # Of one call:
        self._jobs: deque[_Job] = deque()
        self._outcomes: dict[str, list[Outcome]] = {}
        self._timeouts: dict[str, int] = {}  # in a row, by reward

    def serve(self) -> None:
        """Answers calls until the parent closes its end or dies."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and there are several workers
        _seed(0)  # what the first call imports, each worker would import within its time limit
        with contextlib.suppress(EOFError, OSError):
            while True:
                while not self._connection.poll(_WAKE):
                    self._check_parent()
                seed, chunks = self._connection.recv()
                self._connection.send(self._run(seed, chunks))

    def _check_parent(self) -> None:
        if os.getppid() != self._parent:
            raise EOFError

    def _run(self, seed: int, chunks: list[_Chunk]) -> dict[str, list[Outcome]]:
        self._jobs = deque(_Job(name, chunk, 0) for name in self._rewards for chunk in chunks)
        rows = sum(chunk.count for chunk in chunks)
        self._outcomes = {name: [Outcome(0.0, None)] * rows for name in self._rewards}
        self._timeouts = dict.fromkeys(self._rewards, 0)
        while busy := self._busy(seed):
            pause = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([self._connection, *(worker.connection for worker in busy)], min(max(pause, 0.0), _WAKE))
            if self._connection in ready:
                raise EOFError  # the parent asks nothing while it waits
            self._check_parent()
            for worker in busy:
                if worker.connection in ready:
                    self._take(worker)
                elif time.monotonic() >= worker.deadline:
                    self._lose(worker, f"TimeoutError: no result within {self._timeout:g} s (rewards.timeout)")
        return self._outcomes

    def _busy(self, seed: int) -> list[_Worker]:
        """Gives each idle worker a job, if there is one; returns the workers that have one."""
        for worker in [worker for worker in self._workers if worker.job is None]:
            if self._jobs:
                self._begin(worker, seed)
        while self._jobs and len(self._workers) < self._most:
            worker = _Worker(self._rewards, [self._connection, *(other.connection for other in self._workers)])
            self._workers.append(worker)
            self._begin(worker, seed)
        return [worker for worker in self._workers if worker.job is not None]

    def _begin(self, worker: _Worker, seed: int) -> None:
        job = self._jobs.popleft()
        try:
            worker.connection.send((job, seed))
        except OSError:  # it died idle, by what an earlier reward left behind
            worker.end()
            self._workers.remove(worker)
            self._jobs.appendleft(job)
            return
        worker.job, worker.deadline = job, time.monotonic() + self._timeout

    def _take(self, worker: _Worker) -> None:
        try:
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker)
            return
        self._timeouts[worker.job.reward] = 0
        worker.job = self._record(worker.job, outcome)
        worker.deadline = time.monotonic() + self._timeout

    def _lose(self, worker: _Worker, error: str | None = None) -> None:
        """Ends a worker and puts the rest of its job back; without `error`, the worker has died by itself."""
        status = worker.end()
        self._workers.remove(worker)
        rest = self._record(worker.job, Outcome(0.0, error or f"ChildProcessError: {describe_end(status)}"))
        if rest is not None:
            self._jobs.appendleft(rest)
        if error is not None:
            self._timeouts[worker.job.reward] += 1
            if self._timeouts[worker.job.reward] >= _IN_A_ROW:
                self._give_up(worker.job.reward)

    def _give_up(self, reward: str) -> None:
        # Other ranks wait in the next collective: a reward that always hangs must not take the limit for every row.
        error = f"TimeoutError: not called, since {_IN_A_ROW} calls in a row had no result within {self._timeout:g} s"
        given_up = [job for job in self._jobs if job.reward == reward]
        self._jobs = deque(job for job in self._jobs if job.reward != reward)
        for job in given_up:
            rest: _Job | None = job
            while rest is not None:
                rest = self._record(rest, Outcome(0.0, error))

    def _record(self, job: _Job, outcome: Outcome) -> _Job | None:
        """Stores the outcome of the job's next completion; returns what is left of the job."""
        self._outcomes[job.reward][job.chunk.start + job.done] = outcome
        return job._replace(done=job.done + 1) if job.done + 1 < job.chunk.count else None


def _work(connection: Connection, rewards: Mapping[str, Reward]) -> None:
    """Calls rewards, job by job, and sends one outcome a completion."""
    with contextlib.suppress(EOFError):
        while True:
            job, seed = connection.recv()
            completions, samples = pickle.loads(job.chunk.pickled)
            for place in range(job.done, job.chunk.count):
                _seed(seed + job.chunk.start + place)
                connection.send(_outcome(rewards[job.reward], completions[place], samples[place]))


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def _outcome(reward: Reward, completion: str, sample: Sample) -> Outcome:
    try:
        return Outcome(_checked(reward(completion, sample)), None)
    except BaseException as error:  # a user's function may raise anything, SystemExit too; the run goes on
        try:
            text = str(error)[:_SHOWN]
        except BaseException:
            text = "(its text cannot be shown)"
        return Outcome(0.0, f"{type(error).__name__}: {text}")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # the process may be killed at any time


def _checked(value: Any) -> float:
    """Returns a reward as a float32 number."""
    if isinstance(value, (str, bytes)):  # float() would read them
        raise TypeError(f"expected a number, got {type(value).__name__} {value[:40]!r}")
    number = float(value)
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        rounded = float("inf")
    if rounded != rounded or rounded in (float("inf"), float("-inf")):
        raise ValueError(f"expected a number that is finite in float32, got {number!r}")
    return rounded
