"""gemwright serve: OpenAI's HTTP API and a chat page over one model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from gemwright.cli.options import Count, File, Flag, Loading, Model, Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fastapi import FastAPI

    from gemwright.engine.engine import Engine
    from gemwright.engine.speculative import Proposer
    from gemwright.lm import LM
    from gemwright.parallel import TensorParallel
    from gemwright.serve.settings import Settings

LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
Texts = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint="")]
Whole = Annotated[int, arg(metavar="INT")]
Seconds = Annotated[float, arg(metavar="SECONDS")]


@dataclass(frozen=True)
class Options:
    """Serve a model over OpenAI's HTTP API, with a chat page at /.

    API keys come from --api-key-file or from the environment, GEMWRIGHT_API_KEYS (separated by commas); without keys
    everybody who reaches the port is served. The first SIGTERM drains: new requests get 503, those in flight end; a
    second one stops.

    Exit code: 0 after a drain that answered everything, 1 if requests were cut off or the engine failed, 2 for input.

    For example:

      gemwright serve

      gemwright serve google/gemma-2-9b-it --host 0.0.0.0 --api-key-file keys.txt

      gemwright serve FOLDER --adapter poet=lora-folder --rows 64 --otlp http://localhost:4318/v1/traces

      torchrun --standalone --nproc-per-node 2 -m gemwright serve google/gemma-2-27b-it
    """

    model: Model = None
    """Folder or hub name."""
    name: Text = None
    """The model's name in the API; default: the folder's or the hub name."""
    host: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """Address to listen on, 0.0.0.0 for all of them; default: 127.0.0.1, in a container of Vertex AI 0.0.0.0."""
    port: Count = None
    """Port; 0 takes a free one; default: AIP_HTTP_PORT of the environment (Vertex AI sets it), else 8000."""
    adapter: Texts = ()
    """NAME=FOLDER: serve a PEFT adapter under a model name of its own; may be given several times."""
    rows: Whole = 32
    """Samples in the batch at a time."""
    budget: Whole = 512
    """Tokens that go through the model in a step; more than --rows."""
    cache_tokens: Count = None
    """Positions that the key and value cache holds; default: a share of the free memory."""
    lookup: Flag = False
    """Guess tokens from what was said before and verify them: the same answers, sooner where they quote."""
    draft: Text = None
    """Folder or hub name of a smaller model of the same vocabulary whose guesses are verified; not under torchrun."""
    api_key_file: File = None
    """File with API keys, one a line."""
    metrics_key: Flag = False
    """/metrics needs a key, too."""
    origin: Texts = ()
    """Web origin whose pages may call the server (CORS), * for all; may be given several times."""
    allowed_host: Texts = ()
    """Host name to answer to; may be given several times; default: on loopback without keys its names, else any."""
    max_requests: Whole = 256
    """Samples accepted at a time, running and waiting; above it 429."""
    max_waiting_tokens: Whole = 131_072
    """Prompt tokens that may wait; above it 429."""
    max_body: Whole = 4 * 2**20
    """Bytes of a request's body; above it 413."""
    drain_seconds: Seconds = 30.0
    """Time for requests in flight after the first SIGTERM."""
    certificate: File = None
    """PEM file of a TLS certificate; with --private-key."""
    private_key: File = None
    """PEM file of its key."""
    otlp: Text = None
    """OTLP endpoint for traces, such as http://localhost:4318/v1/traces."""
    json_logs: Flag = False
    """Log as JSON, one object a line."""
    ray: Flag = False
    """Serve through Ray: replicas on the cluster of RAY_ADDRESS or of this machine, else on a local one."""
    replicas: Count = None
    """Replicas, each with the whole model; with --ray; default: 1."""
    replica_cpus: Count = None
    """Cores, and threads, of each; with --ray; default: 1."""
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)


def run(options: Options) -> int:
    """Serve until a signal."""
    try:
        from gemwright.serve import logs, ranks, tracing
        from gemwright.serve.app import create_app
        from gemwright.serve.server import run as run_server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gemwright"):
            raise
        raise ValueError(f"{error.name} is missing; pip install 'gemwright[serve]'") from error
    if (options.certificate is None) != (options.private_key is None):
        raise ValueError("--certificate and --private-key: both or neither")
    if options.lookup and options.draft is not None:
        raise ValueError("--lookup and --draft: got both, allowed is one")
    host, port = address(options, os.environ)
    settings = configure(options, os.environ)
    if options.ray:
        return run_replicas(options, settings, host, port)
    if options.replicas is not None or options.replica_cpus is not None:
        raise ValueError("--replicas and --replica-cpus: allowed with --ray")
    logs.configure(as_json=options.json_logs)
    with options.loading.ranks() as parallel:
        load = loader(options, parallel)
        if parallel is not None and parallel.rank:
            return ranks.follow(load()[1])
        tracer, shutdown = (tracing.no_tracer, None) if options.otlp is None else tracing.otlp(options.otlp)
        app = create_app(load, settings, tracer=tracer)
        try:
            code = run_server(
                app,
                host=host,
                port=port,
                announce=lambda port: banner(options, settings, host, port),
                certificate=options.certificate,
                private_key=options.private_key,
            )
            ranks.close(app.state.worker.engine)
            return code
        finally:
            if shutdown is not None:
                shutdown()


def run_replicas(options: Options, settings: Settings, host: str, port: int) -> int:
    """Serve through Ray until a signal."""
    from gemwright.serve import logs, replicas

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--ray: not under torchrun, which holds one model together; a replica is a whole one")
    device = options.loading.device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: got {device!r}, allowed with --ray are auto, cpu and cuda")
    if port == 0:
        raise ValueError("--port: got 0, allowed with --ray is the number of a port")
    wanted = replicas.Replicas(
        count=1 if options.replicas is None else options.replicas,
        cpus=1 if options.replica_cpus is None else options.replica_cpus,
        gpus=int(device == "cuda"),
    )
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray: {error.name} is missing; pip install 'gemwright[ray]'") from error
    if options.model is not None and Path(options.model).is_dir():  # replicas run in other folders
        options = replace(options, model=str(Path(options.model).resolve()))
    logs.configure(as_json=options.json_logs)
    return replicas.run(
        partial(build, options, settings),
        settings,
        wanted,
        host=host,
        port=port,
        announce=lambda port: banner(options, settings, host, port),
        certificate=options.certificate,
        private_key=options.private_key,
    )


def build(options: Options, settings: Settings) -> FastAPI:
    """The application of a replica, made where the replica runs."""
    from gemwright.serve import logs, tracing
    from gemwright.serve.app import create_app

    logs.configure(as_json=options.json_logs)
    tracer = tracing.no_tracer if options.otlp is None else tracing.otlp(options.otlp)[0]
    return create_app(loader(options), settings, tracer=tracer)


def address(options: Options, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where to listen: as the options say, else as Vertex AI does. ValueError for a port that is none."""
    given = environment.get("AIP_HTTP_PORT")
    if given is not None and not given.isdecimal():
        raise ValueError(f"AIP_HTTP_PORT: got {given!r}, allowed is a port")
    port = options.port if options.port is not None else int(given or 8000)
    return options.host or ("127.0.0.1" if given is None else "0.0.0.0"), port


def configure(options: Options, environment: Mapping[str, str]) -> Settings:
    """The server's settings. Raises ValueError for what does not fit together."""
    from gemwright.serve.settings import ENVIRONMENT, Settings, read_keys

    keys = read_keys(options.api_key_file, environment.get(ENVIRONMENT))
    local = address(options, environment)[0] in ("127.0.0.1", "::1", "localhost")
    return Settings(
        name=options.name or served_name(options.model),
        keys=keys,
        metrics_key=options.metrics_key,
        origins=options.origin,
        hosts=tuple(name.lower() for name in options.allowed_host) or (LOOPBACK if local and not keys else ()),
        max_requests=options.max_requests,
        max_waiting_tokens=options.max_waiting_tokens,
        max_body=options.max_body,
        drain_seconds=options.drain_seconds,
        predict_route=environment.get("AIP_PREDICT_ROUTE"),
        health_route=environment.get("AIP_HEALTH_ROUTE"),
    )


def served_name(model: str | None) -> str:
    """A hub name as it is, a folder's last part, and what the bundled model is called."""
    if model is None:
        return "gemwright-mini"
    return Path(model).resolve().name if Path(model).is_dir() else model


def loader(options: Options, parallel: TensorParallel | None = None) -> Callable[[], tuple[LM, Engine]]:
    """What loads the model and makes its engine; it runs once the server answers, or on another rank at once."""
    adapters = dict(split_adapter(text) for text in options.adapter)
    if options.draft is not None and parallel is not None:
        raise ValueError("--draft: not under torchrun; --lookup is allowed")

    def load() -> tuple[LM, Engine]:
        from gemwright.engine.engine import Engine
        from gemwright.serve.ranks import Ranked

        lm = options.loading.load(options.model, parallel)
        made: dict[str, Any] = {"rows": options.rows, "budget": options.budget, "cache_tokens": options.cache_tokens}
        made["proposer"] = proposer(options, lm)
        engine = Engine(lm, **made) if parallel is None else Ranked(lm, parallel=parallel, **made)
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
        if parallel is None or parallel.rank == 0:
            print(f"Ready: {lm.folder}, {lm.dtype}, on {lm.device}", file=sys.stderr)
        return lm, engine

    return load


def proposer(options: Options, lm: LM) -> Proposer | None:
    """What guesses tokens, if anything does. ValueError for a draft model of another vocabulary."""
    from gemwright.engine.speculative import DraftModel, PromptLookup

    if options.draft is None:
        return PromptLookup() if options.lookup else None
    draft = options.loading.load(options.draft)
    probe = "The 2 models read l'été 中文 🙂 alike.\n"
    if draft.config.vocab_size != lm.config.vocab_size or draft.encode(probe) != lm.encode(probe):
        raise ValueError(f"--draft: {options.draft} has another vocabulary than the model")
    return DraftModel(draft.model, rows=options.rows)


def split_adapter(text: str) -> tuple[str, str]:
    """("poet", "folder") of "poet=folder"."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--adapter: got {text!r}, allowed is NAME=FOLDER")
    return name, folder


def banner(options: Options, settings: Settings, host: str, port: int) -> None:
    """Where the server listens and who may ask, to stderr."""
    scheme = "http" if options.certificate is None else "https"
    shown = "localhost" if host in ("127.0.0.1", "::1") else f"[{host}]" if ":" in host else host
    url = f"{scheme}://{shown}:{port}"
    keys = (
        f"{len(settings.keys)} API keys" if settings.keys else "no API keys: everybody who reaches the port is served"
    )
    lines = (
        f"Chat page: {url}/",
        f"API: {url}/v1, model {settings.name!r}",
        f"Access: {keys}",
        *(() if options.ray else ("Loading the model ...",)),
    )
    print("\n".join(lines), file=sys.stderr, flush=True)
