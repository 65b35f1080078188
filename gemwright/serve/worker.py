"""Worker: the one thread that owns the engine, and jobs, through which the event loop meets it.

    async with worker.job(requests) as job:      # ApiError where it is refused, nothing has run then
        while batch := await job.read():         # what has come since the last look, at least one event
            ...

Commands go to the thread through a queue, and run between steps; each step's events come back in one call on the loop.
Leaving the block, however that happens, cancels what still runs and frees its place.

Nothing waits for a reader. A job's events pile up in its own mailbox; a streaming reader that falls `backlog` tokens
behind loses its job. What is accepted is bounded on the loop's side, before the thread sees it: by samples in flight,
and by prompt tokens that wait for their first new token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from gemwright.engine.engine import Engine
from gemwright.engine.request import Request, Stats, TokenEvent
from gemwright.lm import LM
from gemwright.serve.errors import ApiError, busy, invalid, unavailable
from gemwright.serve.metrics import Meters
from gemwright.serve.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["loading", "ready", "draining", "stopped"]
Batch = list[tuple[int, TokenEvent]]
"""Events, each with the number of the job's request that it belongs to."""


class Lagging(Exception):
    """The reader of a stream is too far behind; its job has been cancelled."""


class Job:
    """Requests accepted together and what has come of them. All methods but `__init__` run on the event loop."""

    def __init__(
        self,
        requests: Sequence[Request],
        meters: Meters,
        backlog: int | None,
        *,
        accepted: asyncio.Future[None],
        cancel: Callable[[Job, int, int], None],
    ) -> None:
        self.requests, self.accepted = requests, accepted
        self.idents: list[str] = []
        """The engine's names of the requests; written by the worker's thread."""
        self.open = {(number, i) for number, request in enumerate(requests) for i in range(request.params.n)}
        """Samples that have not ended: (number of the request, index)."""
        self.started = time.monotonic()
        self.first_token: float | None = None
        """Seconds from the start to the first event."""
        self.unread_prompt = sum(len(request.tokens) for request in requests)
        self._waiting = dict(enumerate(requests))
        self._last: dict[tuple[int, int], float] = {}
        self._meters, self._backlog, self._cancel = meters, backlog, cancel
        self._mail: Batch = []
        self._arrived = asyncio.Event()
        self._lagging = False

    async def read(self) -> Batch:
        """The events since the last read; empty once every sample has ended. Lagging: the reader was too slow."""
        if not self._mail and self.open:
            self._arrived.clear()
            await self._arrived.wait()
        if self._lagging:
            raise Lagging(f"the reader is more than {self._backlog} tokens behind")
        batch, self._mail = self._mail, []
        return batch

    def stop(self, key: tuple[int, int]) -> None:
        """End one sample of which nothing more is wanted."""
        self._cancel(self, *key)

    def deliver(self, batch: Batch, now: float) -> int:
        """Take a step's events in; how many prompt tokens wait no longer."""
        begun = 0
        for number, event in batch:
            key = number, event.index
            if key not in self.open:
                continue
            if number in self._waiting:
                begun += len(self._waiting.pop(number).tokens)
            if event.token is not None:
                if self.first_token is None:
                    self.first_token = now - self.started
                    self._meters.first_token.observe(self.first_token)
                elif key in self._last:
                    self._meters.between_tokens.observe(now - self._last[key])
                self._last[key] = now
            if event.finish is not None:
                self.open.remove(key)
            self._mail.append((number, event))
        self.unread_prompt -= begun
        self._lagging |= self._backlog is not None and len(self._mail) > self._backlog
        self._arrived.set()
        return begun

    def end(self, finish: Literal["cancelled", "error"], reason: str) -> int:
        """End what is open, for an engine that no longer answers or may not be waited for; returns as `deliver`."""
        _settle(self.accepted, None)
        rest = [(number, TokenEvent(id="", index=i, finish=finish, error=reason)) for number, i in sorted(self.open)]
        return self.deliver(rest, time.monotonic())


@dataclass
class _Route:
    """Where the events of one engine request go."""

    job: Job
    number: int
    open: int
    """Samples that have not ended."""


class Worker:
    """Loads the engine in its own thread and steps it as long as there is work."""

    def __init__(self, load: Callable[[], tuple[LM, Engine]], settings: Settings, meters: Meters) -> None:
        """`load` runs in the thread, while the server already answers that it is loading."""
        self.settings, self.meters = settings, meters
        self.state: State = "loading"
        self.error: Exception | None = None
        """What ended the worker, if it did not end by `stop`."""
        self.ended = asyncio.Event()
        self._load = load
        self._loaded: tuple[LM, Engine] | None = None
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._routes: dict[str, _Route] = {}  # of the thread
        self._failures = 0
        self._jobs: set[Job] = set()
        self._samples = self._waiting_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # --- on the event loop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def loaded(self) -> tuple[LM, Engine]:
        """The model's text side, and the engine for reading names and counters. ApiError unless new work is taken."""
        if self.state != "ready":
            raise unavailable(self.state)
        assert self._loaded is not None, "ready without an engine"
        return self._loaded

    @property
    def engine(self) -> Engine | None:
        """The engine, whatever the state; None before there is one."""
        return self._loaded[1] if self._loaded is not None else None

    @property
    def stats(self) -> Stats | None:
        """The engine's counters and gauges; None before there is one."""
        return self.engine.stats if self.engine is not None else None

    @contextlib.asynccontextmanager
    async def job(self, requests: Sequence[Request], *, streaming: bool = False) -> AsyncIterator[Job]:
        """Run requests together. ApiError: 503 (loading, draining), 429 (full), 400 (the engine refuses one)."""
        job = await self.open(requests, streaming=streaming)
        try:
            yield job
        finally:
            self.close(job)

    async def open(self, requests: Sequence[Request], *, streaming: bool, field: str = "prompt") -> Job:
        """As `job`; whoever opens must `close`. `field` names the input in errors."""
        accepted: asyncio.Future[None] = self._loop.create_future()
        backlog = self.settings.backlog if streaming else None
        job = Job(requests, self.meters, backlog, accepted=accepted, cancel=self._stop)
        self._admit(job)
        self._commands.put(partial(self._submit, job))
        try:
            await accepted
        except ValueError as error:
            self.close(job)
            raise invalid(error, prompt=field) from error
        except BaseException:
            self.close(job)
            raise
        return job

    def close(self, job: Job) -> None:
        """Cancel what still runs of a job and free its place. Closing twice does nothing."""
        if job not in self._jobs:
            return
        self._jobs.remove(job)
        self._samples -= sum(request.params.n for request in job.requests)
        self._waiting_tokens -= job.unread_prompt
        if job.open:
            self._commands.put(partial(self._cancel, job))
        if not self._jobs:
            self._idle.set()

    def _stop(self, job: Job, number: int, index: int) -> None:
        self._commands.put(lambda engine: engine.cancel(job.idents[number], index))

    def _admit(self, job: Job) -> None:
        _ = self.loaded
        samples, limits = len(job.open), self.settings
        if samples > limits.max_requests:
            raise ApiError(
                400, f"n: got {samples} samples in one request, allowed are {limits.max_requests}", param="n"
            )
        if self._samples + samples > limits.max_requests:
            raise busy(f"{self._samples} samples are in flight, {limits.max_requests} is the most")
        if self._waiting_tokens and self._waiting_tokens + job.unread_prompt > limits.max_waiting_tokens:
            raise busy(f"{self._waiting_tokens} prompt tokens wait, {limits.max_waiting_tokens} is the most")
        self._jobs.add(job)
        self._samples += samples
        self._waiting_tokens += job.unread_prompt
        self._idle.clear()

    def _deliver(self, batches: list[tuple[Job, Batch]], now: float) -> None:
        for job, batch in batches:
            if job in self._jobs:
                self._waiting_tokens -= job.deliver(batch, now)

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait for what is in flight; what is left after `seconds` ends. Whether all was done."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        left = list(self._jobs)
        self._end(left, "cancelled", "the server is stopping")
        return not left

    def _end(self, jobs: Sequence[Job], finish: Literal["cancelled", "error"], reason: str) -> None:
        for job in jobs:
            self._waiting_tokens -= job.end(finish, reason)

    async def stop(self, seconds: float = 5.0) -> None:
        """End the thread after its current step."""
        self._commands.put(None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.ended.wait()

    def _over(self, error: Exception | None) -> None:
        self.state, self.error = "stopped", error
        self._end(list(self._jobs), "error", "the engine has stopped")
        self.ended.set()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        error: Exception | None = None
        try:
            self._loaded = _, engine = self._load()
            self._tell(self._ready)
            while self._serve(engine):
                pass
        except Exception as caught:  # the thread's last frame: whoever runs the server is told
            error = caught
        self._tell(self._over, error)

    def _ready(self) -> None:
        if self.state == "loading":
            self.state = "ready"

    def _tell(self, call: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)

    def _serve(self, engine: Engine) -> bool:
        """Run the commands that wait, then a step; False to end."""
        while not engine.busy or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command(engine)
        self._step(engine)
        return True

    def _submit(self, job: Job, engine: Engine) -> None:
        try:
            for number, request in enumerate(job.requests):
                ident = engine.submit(request)
                job.idents.append(ident)
                self._routes[ident] = _Route(job, number, request.params.n)
        except Exception as error:  # a request that the engine cannot even take in ends alone
            self._cancel(job, engine)
            self._tell(_settle, job.accepted, error)
        else:
            self._tell(_settle, job.accepted, None)

    def _cancel(self, job: Job, engine: Engine) -> None:
        for ident in job.idents:
            if self._routes.pop(ident, None) is not None:
                engine.cancel(ident)

    def _step(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except Exception:
            log.exception("a step of the engine failed; %d requests end", len(self._routes))
            events = self._abandon(engine)
        if any(event.finish == "error" for event in events):
            self._failures += 1
        elif any(event.finish != "cancelled" for event in events):
            self._failures = 0
        batches: dict[Job, Batch] = {}
        for event in events:
            if (route := self._routes.get(event.id)) is not None:
                batches.setdefault(route.job, []).append((route.number, event))
                route.open -= event.finish is not None
                if route.open <= 0:
                    del self._routes[event.id]
        self.meters.batch.observe(len({(event.id, event.index) for event in events if event.token is not None}))
        if batches:
            self._tell(self._deliver, list(batches.items()), time.monotonic())
        if self._failures >= self.settings.max_failures:
            raise RuntimeError(f"{self._failures} steps of the engine failed one after another")

    def _abandon(self, engine: Engine) -> list[TokenEvent]:
        """End everything in flight after a step that failed as a whole."""
        events = []
        for ident, route in self._routes.items():
            engine.cancel(ident)
            samples = range(route.job.requests[route.number].params.n)  # the job ignores those that had ended
            events += [TokenEvent(id=ident, index=i, finish="error", error="the step failed") for i in samples]
        return events


def _settle(accepted: asyncio.Future[None], error: Exception | None) -> None:
    if accepted.done():  # the one who asked has gone, or was told that the worker ended
        return
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)
