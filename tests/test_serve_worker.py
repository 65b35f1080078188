"""The engine's thread: what is accepted, what comes back, and what happens when an engine or a reader fails."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from serve_fixtures import FakeEngine

from gemwright.engine.request import Request, TokenEvent
from gemwright.sampling import SamplingParams
from gemwright.serve.errors import ApiError
from gemwright.serve.metrics import Meters
from gemwright.serve.settings import Settings
from gemwright.serve.worker import Job, Lagging, Worker


def request(tokens: int = 3, *, new: int = 4, n: int = 1) -> Request:
    return Request(tokens=[7] * tokens, params=SamplingParams(max_new_tokens=new, n=n))


@asynccontextmanager
async def working(engine: FakeEngine, **settings: Any) -> AsyncIterator[Worker]:
    worker = Worker(lambda: cast(Any, (None, engine)), Settings(**settings), Meters())
    worker.start()
    while worker.state == "loading":
        await asyncio.sleep(0)
    yield worker
    engine.go = None
    await worker.stop()


async def everything(job: Job) -> list[tuple[int, TokenEvent]]:
    found = []
    while batch := await job.read():
        found += batch
    return found


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_job_gets_every_token_of_every_sample_in_order() -> None:
    async def scenario() -> None:
        async with working(FakeEngine()) as worker, worker.job([request(new=5, n=2), request(new=3)]) as job:
            events = await everything(job)
        tokens: dict[tuple[int, int], list[int | None]] = {}
        for number, event in events:
            tokens.setdefault((number, event.index), []).append(event.token)
        assert tokens == {(0, 0): [0, 1, 2, 3, 4], (0, 1): [0, 1, 2, 3, 4], (1, 0): [0, 1, 2]}
        assert worker._samples == worker._waiting_tokens == 0 and not worker._routes

    run(scenario)


def test_leaving_a_job_cancels_what_runs_and_frees_its_place() -> None:
    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(1))
        async with working(engine, max_requests=2) as worker:
            async with worker.job([request(new=10**6, n=2)]) as job:
                assert await job.read()
            assert worker._samples == 0
            engine.go = None
            await until(lambda: engine.cancelled == ["fake-0"])
            assert not engine.running and not worker._routes

    run(scenario)


def test_too_many_samples_are_refused_and_accepted_again_later() -> None:
    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(0))
        async with working(engine, max_requests=3) as worker:
            async with worker.job([request(n=2)]):
                with pytest.raises(ApiError) as refused:
                    await worker.open([request(n=2)], streaming=False)
                assert refused.value.status_code == 429 and refused.value.headers == {"Retry-After": "1"}
                async with worker.job([request()]):
                    pass
            async with worker.job([request(n=3)]):
                pass
            with pytest.raises(ApiError) as never:
                await worker.open([request(n=4)], streaming=False)
            assert never.value.status_code == 400  # waiting would not help

    run(scenario)


def test_prompt_tokens_count_until_their_first_token() -> None:
    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(0))
        async with working(engine, max_waiting_tokens=10) as worker, worker.job([request(8, new=100)]) as job:
            with pytest.raises(ApiError) as refused:
                await worker.open([request(3)], streaming=False)
            assert refused.value.status_code == 429
            engine.go = None
            assert await job.read()
            async with worker.job([request(30)]) as large:  # alone it may be larger than the bound
                assert len(await everything(large)) == 4

    run(scenario)


def test_a_refused_request_takes_its_companions_along() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with working(engine) as worker:
            with pytest.raises(ApiError) as refused:
                await worker.open([request(new=10**6), request(0)], streaming=False)
            assert refused.value.status_code == 400 and refused.value.param == "prompt"
            await until(lambda: not engine.running)
            assert worker._samples == worker._waiting_tokens == 0

    run(scenario)


def test_a_failed_step_ends_what_was_in_flight_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(1))
        async with working(engine) as worker:
            async with worker.job([request(new=10**6, n=2)]) as job:
                await job.read()
                engine.broken = True
                engine.go = None
                ends = await everything(job)
            assert {(event.index, event.finish) for _, event in ends if event.finish} == {(0, "error"), (1, "error")}
            engine.broken = False
            async with worker.job([request()]) as job:
                assert [event.token for _, event in await everything(job)] == [0, 1, 2, 3]
            assert worker.state == "ready"

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert "secret detail of the device" in caplog.text  # the trace is in the log


def test_steps_that_fail_one_after_another_end_the_worker() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.broken = True
        async with working(engine, max_failures=2) as worker:
            for _ in range(2):
                async with worker.job([request()]) as job:
                    assert [event.finish for _, event in await everything(job)] == ["error"]
            await worker.ended.wait()
            assert isinstance(worker.error, RuntimeError) and worker.state == "stopped"
            with pytest.raises(ApiError) as refused:
                await worker.open([request()], streaming=False)
            assert refused.value.status_code == 503

    run(scenario)


def test_a_reader_that_lags_loses_its_job_and_holds_nobody_up() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        async with working(engine, backlog=16) as worker:
            slow = await worker.open([request(new=10**6)], streaming=True)
            async with worker.job([request(new=200)]) as other:  # whole answers are read as they come
                assert len(await everything(other)) == 200
            with pytest.raises(Lagging):
                await slow.read()
            worker.close(slow)
            await until(lambda: not engine.running)

    run(scenario)


def test_draining_refuses_new_work_and_lets_the_rest_end() -> None:
    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(0))
        async with working(engine) as worker:
            job = await worker.open([request()], streaming=False)
            draining = asyncio.ensure_future(worker.drain(10))
            await until(lambda: worker.state == "draining")
            with pytest.raises(ApiError) as refused:
                await worker.open([request()], streaming=False)
            assert refused.value.status_code == 503 and refused.value.headers == {"Retry-After": "5"}
            engine.go = None
            assert [event.finish for _, event in await everything(job)][-1] == "length"
            worker.close(job)
            assert await draining

    run(scenario)


def test_what_is_left_at_the_deadline_is_cancelled() -> None:
    async def scenario() -> None:
        async with working(FakeEngine()) as worker:
            job = await worker.open([request(new=10**6)], streaming=False)
            assert not await worker.drain(0.02)
            assert (await everything(job))[-1][1].finish == "cancelled"
            worker.close(job)

    run(scenario)


def test_a_request_that_comes_while_the_engine_ends_is_told() -> None:
    """It waited for ever: its command stayed in the queue of a thread that had gone."""

    async def scenario() -> None:
        engine = FakeEngine(go=threading.Semaphore(0))
        async with working(engine, max_failures=1) as worker:
            await worker.open([request()], streaming=False)
            late = asyncio.ensure_future(worker.open([request()], streaming=False))
            await asyncio.sleep(0.05)
            engine.broken, engine.go = True, None
            job = await asyncio.wait_for(late, 5)
            assert [event.finish for _, event in await everything(job)] == ["error"]

    run(scenario)


def test_a_request_that_breaks_the_engines_submit_ends_alone() -> None:
    class Picky(FakeEngine):
        def submit(self, request: Request) -> str:
            if len(request.tokens) == 13:
                raise KeyError("a defect")
            return super().submit(request)

    async def scenario() -> None:
        async with working(Picky()) as worker:
            with pytest.raises(KeyError):
                await worker.open([request(3), request(13)], streaming=False)
            async with worker.job([request()]) as job:
                assert len(await everything(job)) == 4
            assert not worker._jobs and not worker._routes

    run(scenario)


def test_a_model_that_cannot_be_loaded_ends_the_worker() -> None:
    def load() -> Any:
        raise FileNotFoundError("no such folder")

    async def scenario() -> None:
        worker = Worker(load, Settings(), Meters())
        with pytest.raises(ApiError) as loading:
            _ = worker.loaded
        assert loading.value.status_code == 503 and loading.value.code == "loading"
        worker.start()
        await worker.ended.wait()
        assert isinstance(worker.error, FileNotFoundError) and worker.state == "stopped"

    run(scenario)
