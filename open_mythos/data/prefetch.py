"""Batches ahead of time, in threads, with the state of what was consumed.

- `Prefetch` keeps the next few batches of a loader ready. Each waits with the loader's state right after it,
  and the state handed out is that of the last batch taken: what lies ready but unread is made again on
  resume.
- `InTurn` deals batches from several loaders one by one, so that each, in its own `Prefetch`, is a worker.

Tokenizers, parquet and numpy release Python's lock while they work, so threads are enough.
"""

import queue
import threading
from collections.abc import Sequence

from open_mythos.data.batch import Batch, Loader


class Prefetch:
    """A loader whose next `ahead` batches are made in a thread.

    An error in the thread is raised by `next`.
    """

    def __init__(self, loader: Loader, ahead: int = 4):
        if ahead < 1:
            raise ValueError(f"Prefetch needs at least 1 batch ahead, got {ahead}")
        self.loader, self.ahead = loader, ahead
        self._state = loader.state_dict()
        self._worker: _Worker | None = None

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Batch:
        self._worker = self._worker or _Worker(self.loader, self.ahead)
        made = self._worker.ready.get()
        if isinstance(made, BaseException):
            self._worker.ready.put(made)  # asked again, fail again rather than wait for ever
            raise made
        batch, self._state = made
        return batch

    def state_dict(self) -> dict[str, object]:
        return self._state

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.close()
        self.loader.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """End the thread. The loader itself is then ahead of the state; `load_state_dict` puts it right."""
        if self._worker:
            self._worker.stop()
            self._worker = None


class _Worker:
    """The thread and its queue."""

    def __init__(self, loader: Loader, ahead: int):
        self.ready: queue.Queue[tuple[Batch, dict[str, object]] | BaseException] = queue.Queue(ahead)
        self._loader = loader
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                batch = next(self._loader)
                self._put((batch, self._loader.state_dict()))
        except BaseException as error:
            self._put(error)

    def _put(self, made: tuple[Batch, dict[str, object]] | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self.ready.put(made, timeout=0.05)
            except queue.Full:
                continue
            return


class InTurn:
    """One batch from each loader in turn; the state is theirs and whose turn it is."""

    def __init__(self, loaders: Sequence[Loader]):
        if not loaders:
            raise ValueError("InTurn needs at least one loader")
        self.loaders = list(loaders)
        self.turn = 0

    def __iter__(self) -> "InTurn":
        return self

    def __next__(self) -> Batch:
        batch = next(self.loaders[self.turn])
        self.turn = (self.turn + 1) % len(self.loaders)
        return batch

    def state_dict(self) -> dict[str, object]:
        return {"turn": self.turn, "loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Raises `ValueError` if the state is of another number of loaders."""
        states = state.get("loaders")
        if not isinstance(states, list) or len(states) != len(self.loaders):
            raise ValueError(
                f"the saved data state is not of {len(self.loaders)} workers; resume with as many as before"
            )
        for loader, saved in zip(self.loaders, states, strict=True):
            loader.load_state_dict(saved)
        self.turn = int(str(state["turn"]))
