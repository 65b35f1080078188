"""Replicas: the application as a Ray Serve deployment, one engine in each, on as many machines as the cluster has.

Ray's proxy takes the connections and passes each request to a replica with room; a replica that ends is started
again. What is bounded in one server is bounded in each replica. The proxy's routes are those of the application, so
/ready and /metrics are answered by one replica, whichever it is: a cluster's numbers are Ray's own, or each node's.

The first SIGTERM or SIGINT takes the application away from the proxy (new requests get 404) and lets each replica end
what it has, for `drain_seconds` at most; the second one stops at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI

from gemwright.serve.settings import Settings
from gemwright.serve.worker import Worker

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)

NAME: Final = "gemwright"
"""The application's name in the cluster."""
POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many, and what each of them takes of its node."""

    count: int = 1
    cpus: int = 1
    """Cores, and threads, of each."""
    gpus: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("cpus", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed is >= {least}")


def application(build: Callable[[], FastAPI], settings: Settings, replicas: Replicas) -> Application:
    """A Ray Serve application of `replicas`, each of which runs what `build` makes there."""
    from ray import serve

    def make() -> FastAPI:  # Ray takes a plain function
        return build()

    class Replica:
        async def check_health(self) -> None:
            """Called before a replica takes requests, and then now and again; whatever it raises ends the replica."""
            worker: Worker = self.app.state.worker  # type: ignore[attr-defined]  # Ray's own
            while worker.state == "loading":
                await asyncio.sleep(POLL_SECONDS)
            if worker.state == "stopped":
                raise RuntimeError(f"the engine has stopped: {worker.error}")

    made: Any = serve.deployment(
        name=NAME,
        num_replicas=replicas.count,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # more than the application accepts, so that it is the one that says 429
        max_ongoing_requests=2 * settings.max_requests,
        max_queued_requests=settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=min(1.0, max(POLL_SECONDS, settings.drain_seconds)),
        max_constructor_retry_count=1,
    )
    bound: Application = made(serve.ingress(make)(Replica)).bind()
    return bound


def run(
    build: Callable[[], FastAPI],
    settings: Settings,
    replicas: Replicas,
    *,
    host: str,
    port: int,
    announce: Callable[[int], None],
    certificate: str | None = None,
    private_key: str | None = None,
) -> int:
    """Serve until a signal; 0 if every accepted request was answered, else 1. RuntimeError: no replica can start.

    Ray runs on the cluster of RAY_ADDRESS or of this machine (`ray start`), else on this machine alone for as long as
    this process lives. `announce` is called with the port once the replicas are ready.
    """
    import ray
    from ray import serve

    stopping = Stopping()
    connect()
    try:
        # the proxies' options hold for the cluster: where Serve runs already, its own stay
        options = {"host": host, "port": port, "ssl_certfile": certificate, "ssl_keyfile": private_key}
        serve.start(proxy_location="EveryNode", http_options=options)
        deploy(application(build, settings, replicas))
        stopping.listen()  # after Ray, which sets handlers of its own
        announce(port)
        stopping.wait()
        log.info("draining for at most %g s; a second signal stops", settings.drain_seconds)
        begun = time.monotonic()
        serve.delete(NAME)
        return int(time.monotonic() - begun > settings.drain_seconds)
    finally:
        ray.shutdown()


def deploy(application: Application) -> None:
    """Until every replica is ready. RuntimeError, with the reason that the cluster gives, where one cannot start."""
    from ray import serve

    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        told = [one.message for one in serve.status().applications[NAME].deployments.values()]
        serve.delete(NAME)
        raise RuntimeError(f"the replicas cannot start: {' '.join(told).strip() or error}") from error


def connect() -> None:
    """Join a cluster, or start one on this machine that lives as long as this process."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here tells nobody of it
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        ray.init(include_dashboard=False, log_to_driver=False)


class Stopping:
    """The signals that end a server: the first is waited for, the second ends the process."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if self._asked.is_set():
            logging.shutdown()
            os._exit(1)
        self._asked.set()

    def wait(self) -> None:
        self._asked.wait()
