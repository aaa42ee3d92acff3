"""Runs rewards in processes of their own, each call under a time limit that holds whatever the call does."""

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, TimeoutError, wait
from ctypes import c_float, c_int
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

from vgpo_train.data import Sample
from vgpo_train.rewards.processes import WorkerContext, describe_end, isolate, kill_group, share_of_cores
from vgpo_train.rewards.registered import Reward

_IN_A_ROW = 16  # time-outs after which the rest of a call's completions do not wait for theirs
_SHOWN = 300  # characters of an error
_WAKE = 1.0  # seconds between checks that the parent and the pool of a manager are alive
_SPARE = 60.0  # seconds beyond the limit after which a call is lost

# Of a manager and its workers:
_rewards: Mapping[str, Reward]
_late: dict[str, Any]  # time-outs in a row, in memory that the processes share


class Outcome(NamedTuple):
    """What one reward gave for one completion."""

    value: float  # finite in float32; 0 for a failure
    error: str | None  # kind and text; None for a success


class RewardPool:
    """Worker processes that call rewards.

    The constructor forks a manager, in which a pool of pebble's forks the workers. A fork has every reward that is
    registered, closures and those of a script included, and the manager, being forked early, is a small process to fork
    from. All of them end with `close`, with the pool's last reference and with the process that made it, however that
    ends.

    Args:
        rewards: the rewards by name.
        timeout: seconds that one call of a reward may take.
        workers: number of worker processes; None takes this rank's share of the cores, at most 8.
    """

    def __init__(self, rewards: Mapping[str, Reward], *, timeout: float, workers: int | None = None) -> None:
        self._rewards = dict(rewards)
        self._limits = timeout, workers or share_of_cores()
        self._lock = threading.Lock()
        self._start()

    def run(self, completions: Sequence[str], samples: Sequence[Sample]) -> dict[str, list[Outcome]]:
        """Calls each reward on each completion with its sample; returns the outcomes by reward, in that order.

        The seeds of random, numpy and torch are set before each call from torch's own seed and the completion's place,
        so that a reward that draws is repeatable.

        Raises:
            RuntimeError: the pool is closed.
        """
        pickled = {key: pickle.dumps(sample) for key, sample in {id(sample): sample for sample in samples}.items()}
        rows = [(completion, pickled[id(sample)]) for completion, sample in zip(completions, samples, strict=True)]
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("a closed RewardPool cannot run; make another")
            try:
                self._connection.send((torch.initial_seed(), rows))
                return self._connection.recv()
            except (EOFError, OSError):
                self._restart()
                error = "ChildProcessError: the processes that run rewards were killed; they are started anew"
                return {name: [Outcome(0.0, error)] * len(rows) for name in self._rewards}
            except BaseException:  # such as Ctrl-C: an answer that comes late must not be taken for the next call's
                self._restart()
                raise

    def close(self) -> None:
        """Ends the processes."""
        self._end()

    def _restart(self) -> None:
        self._end()
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        parent = os.getpid()
        sys.stdout.flush()  # what is buffered would be written twice
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python warns of locks that other threads may hold; the manager and its workers take none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                self._connection.close()
                _manage(theirs, parent, self._rewards, *self._limits)
        theirs.close()
        self._end = weakref.finalize(self, _end_manager, self._connection, pid, parent)


def _end_manager(connection: Connection, pid: int, parent: int) -> None:
    if os.getpid() != parent:
        return  # a fork of the process that made the pool
    connection.close()
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _manage(connection: Connection, parent: int, rewards: dict[str, Reward], timeout: float, workers: int) -> NoReturn:
    """Answers calls until the parent closes its end or dies; runs in a process of its own."""
    global _rewards, _late
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        multiprocessing.current_process().daemon = False  # a daemon, as the parent may be, cannot have workers
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, and there are several workers
        _seed(0)  # what the first call imports, each worker would import within its time limit
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        _rewards, _late = rewards, {name: multiprocessing.RawValue(c_int) for name in rewards}
        new_pool = functools.partial(
            ProcessPool, workers, initializer=isolate, initargs=[os.getpid()], context=WorkerContext()
        )
        pool = new_pool()
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                call = connection.recv()
                try:
                    outcomes = _run(pool, timeout, *call)
                except RuntimeError:  # a worker that had no call has ended, and pebble's pool with it
                    pool.stop()
                    pool.join()
                    pool = new_pool()
                    outcomes = _run(pool, timeout, *call)
                connection.send(outcomes)
    except BaseException:  # printed, and the process ends: the trainer then raises, since no answer comes
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)  # without what the parent registered for its own end


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WAKE)
    os._exit(1)


def _run(pool: ProcessPool, timeout: float, seed: int, rows: list[tuple[str, bytes]]) -> dict[str, list[Outcome]]:
    futures: dict[str, list[Future]] = {name: [] for name in _rewards}
    for name, late in _late.items():
        late.value = 0
        for place, row in enumerate(rows):
            future = pool.schedule(_call, (name, seed + place, *row), timeout=timeout)
            future.add_done_callback(functools.partial(_count, late))
            futures[name].append(future)
    return {name: [_outcome(pool, future, timeout) for future in those] for name, those in futures.items()}


def _count(late: Any, future: Future) -> None:
    if late.value < _IN_A_ROW:
        late.value = late.value + 1 if isinstance(future.exception(), TimeoutError) else 0


def _outcome(pool: ProcessPool, future: Future, timeout: float) -> Outcome:
    # Calls begin in order: those before this one have ended, so a worker is free for it.
    deadline = time.monotonic() + timeout + _SPARE
    while not wait([future], _WAKE).done:
        if not pool.active:  # pebble does not fail a call that came while its pool broke
            raise RuntimeError("a call of a reward was lost: the pool of workers has ended")
        if time.monotonic() > deadline:
            raise ChildProcessError("a call of a reward was lost: its worker died while it held a lock of the pool")
    try:
        return future.result()
    except TimeoutError:
        return Outcome(0.0, f"TimeoutError: no result within {timeout:g} s (rewards.timeout)")
    except ProcessExpired as error:
        kill_group(error.pid)  # what the worker started
        return Outcome(0.0, f"ChildProcessError: {describe_end(error.exitcode)}")


def _call(name: str, seed: int, completion: str, sample: bytes) -> Outcome:
    """Calls a reward in a worker."""
    if _late[name].value >= _IN_A_ROW:
        # Other ranks wait in the next collective: a reward that always hangs must not take the limit for every row.
        return Outcome(0.0, f"TimeoutError: not called, since {_IN_A_ROW} calls in a row had no result in time")
    _seed(seed)
    try:
        return Outcome(_checked(_rewards[name](completion, pickle.loads(sample))), None)
    except BaseException as error:  # a user's function may raise anything, SystemExit too; the run goes on
        try:
            text = str(error)[:_SHOWN]
        except BaseException:  # an exception's own __str__ may raise; the failure is reported all the same
            text = "(its text cannot be shown)"
        return Outcome(0.0, f"{type(error).__name__}: {text}")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()  # the process may be killed at any time


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


def _checked(value: Any) -> float:
    """Returns a reward as a float32 number."""
    if isinstance(value, (str, bytes)):  # float() would read them
        raise TypeError(f"expected a number, got {type(value).__name__} {value[:40]!r}")
    number = float(value)
    if not math.isfinite(rounded := c_float(number).value):
        raise ValueError(f"expected a number that is finite in float32, got {number!r}")
    return rounded
