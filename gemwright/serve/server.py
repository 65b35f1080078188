"""Running the application: uvicorn, and signals that drain it.

The first SIGTERM or SIGINT takes /ready away and refuses new work with 503, while the port stays open and what is in
flight goes on, for `drain_seconds` at most; the second one stops at once. A worker that ends by itself ends the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gemwright.serve.worker import Worker

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server, whose first signal drains."""

    def __init__(self, config: uvicorn.Config, worker: Worker, announce: Callable[[int], None]) -> None:
        super().__init__(config)
        self._worker, self._announce = worker, announce
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.cut = False
        """Whether requests were ended before they were done."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._announce(self.servers[0].sockets[0].getsockname()[1])
            self._watching = asyncio.ensure_future(self._watch())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In the signal handler: no work here, and none of uvicorn's re-raising of the signal after the end."""
        self._signals += 1
        if self._loop is None:
            raise KeyboardInterrupt
        if self._signals > 1:
            self.cut = True
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        seconds = self._worker.settings.drain_seconds
        log.info("draining for at most %g s; a second signal stops", seconds)
        self._draining = asyncio.ensure_future(self._finish(seconds))

    async def _finish(self, seconds: float) -> None:
        self.cut = not await self._worker.drain(seconds)
        self.should_exit = True

    async def _watch(self) -> None:
        await self._worker.ended.wait()
        self.should_exit = True


def run(
    app: FastAPI,
    *,
    host: str,
    port: int,
    announce: Callable[[int], None],
    certificate: str | None = None,
    private_key: str | None = None,
) -> int:
    """Serve until a signal; 0 if every accepted request was answered, else 1. Raises what ended the worker.

    `announce` is called with the port once the server listens; port 0 takes a free one. With `certificate` and
    `private_key` (PEM files) the server speaks TLS.
    """
    worker: Worker = app.state.worker
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
    )
    server = Server(config, worker, announce)
    server.run()
    if worker.error is not None:
        raise worker.error
    if server.force_exit:  # the engine's thread may be inside a long step, and an exit would wait for its kernels
        logging.shutdown()
        os._exit(1)
    return int(server.cut)
