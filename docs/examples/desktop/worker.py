"""The one thread that uses the model. It takes jobs one after the other; whatever they have to tell goes through `emit`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from indexmem_edge import Llama

Emit = Callable[..., None]  # (function, *arguments): to be called by the thread of the window


def _nothing(*_: object) -> None:
    pass


@dataclass(eq=False)
class Job:
    """Something that the model does. `done` and `progress` are called by the thread of the window.

    Attributes:
        work: what, by the thread of the worker; it may look at `stopped`. Its result is for `done`.
        done: is told of the end: (result, error), one of which is None.
        progress: is told how much of a prompt has been read: (tokens, of so many).
    """

    work: Callable[[Llama, Job], Any]
    done: Callable[[Any, Optional[Exception]], None]
    progress: Callable[[int, int], None] = _nothing
    _stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()


class Worker:
    """Loads a model and does jobs with it.

    Args:
        load: makes the `Llama`, in the worker's thread, because that takes seconds.
        emit: hands a function and its arguments over to the thread of the window.
        loaded: is told, over there, of the end of loading: the error, or None.
    """

    def __init__(self, load: Callable[[], Llama], emit: Emit, loaded: Callable[[Optional[Exception]], None]) -> None:
        self._load, self._emit, self._loaded = load, emit, loaded
        self._jobs: queue.SimpleQueue[Optional[Job]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # so that a stop finds the job that it means, and not the next one
        self._current: Optional[Job] = None
        self._llm: Optional[Llama] = None
        self._thread = threading.Thread(target=self._run, name="model")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> Job:
        """Has a job done when those before it are."""
        self._jobs.put(job)
        return job

    def stop(self, job: Job) -> None:
        """Ends a job soon, or before it has begun. Waits for nothing."""
        job._stopped.set()
        with self._lock:
            if self._current is job and self._llm is not None:
                self._llm.cancel()

    def close(self) -> None:
        """Frees the model after the jobs that there are, and ends the thread. Waits for nothing."""
        self._jobs.put(None)

    def _run(self) -> None:
        try:
            llm = self._load()
        except Exception as error:
            self._emit(self._loaded, error)
            while (job := self._jobs.get()) is not None:
                self._emit(job.done, None, error)
            return
        self._emit(self._loaded, None)
        with llm:
            self._llm = llm
            while (job := self._jobs.get()) is not None:
                self._do(llm, job)
            with self._lock:
                self._llm = None

    def _do(self, llm: Llama, job: Job) -> None:
        def batch(done: int, total: int) -> None:
            if job.stopped:  # before the model had begun, when there was nothing to cancel yet
                llm.cancel()
            self._emit(job.progress, done, total)

        with self._lock:
            self._current = job
        result, error = None, None
        try:
            with llm.watch(batch):
                result = job.work(llm, job)
        except Exception as raised:  # whatever it is, a person has to see it, and the thread has to go on
            error = raised
        with self._lock:
            self._current = None
        self._emit(job.done, result, error)
