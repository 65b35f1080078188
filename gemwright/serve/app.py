"""The application: routes over a service, errors in OpenAI's shape, the gate around it all."""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from torch.nn.functional import normalize

from gemwright import __version__
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request
from gemwright.lm import LM
from gemwright.serve.chat import Chat, turns
from gemwright.serve.completions import Completions
from gemwright.serve.errors import ApiError, ErrorBody, from_validation, internal
from gemwright.serve.gate import Gate, attended
from gemwright.serve.logs import request_id
from gemwright.serve.metrics import Meters
from gemwright.serve.responses import Responses, ResponsesBody
from gemwright.serve.schema import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from gemwright.serve.service import Service
from gemwright.serve.settings import Settings
from gemwright.serve.stream import Asked, EventStream
from gemwright.serve.tgi import Generate, GenerateBody, info
from gemwright.serve.tracing import Tracer, no_tracer
from gemwright.serve.vertex import PredictBody, predict
from gemwright.serve.worker import Worker

log = logging.getLogger(__name__)

PAGE: Final = Path(__file__).with_name("page")
"""The chat page's files."""
PAGE_TYPES: Final = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""Said here, since a system's own table may call scripts text/plain, which browsers then refuse."""
PAGE_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""The page runs its own files and talks with its own server; whatever a model writes can do neither more nor else."""
ERRORS: Final[dict[int | str, dict[str, Any]]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(load: Callable[[], tuple[LM, Engine]], settings: Settings, *, tracer: Tracer = no_tracer) -> FastAPI:
    """The server as an ASGI application; `load` runs in the engine's thread when the application starts.

    `app.state.worker` is the Worker, for whoever runs the application and must drain it.
    """
    meters = Meters()
    worker = Worker(load, settings, meters)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(
        title="Gemwright", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS
    )
    app.state.worker = worker
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    service = Service(worker, settings)
    app.include_router(api(service))
    app.include_router(tgi(service))
    app.include_router(health(worker, meters, settings))
    if settings.predict_route is not None:
        app.include_router(vertex(service, settings.predict_route))
    pages = page()
    app.include_router(pages)
    public = {
        "/health",
        "/ready",
        settings.health_route or "/ready",
        *(route.path for route in pages.routes if isinstance(route, APIRoute)),
    }
    public |= set() if settings.metrics_key else {"/metrics"}
    app.add_middleware(Gate, settings=settings, meters=meters, tracer=tracer, open_paths=public)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def api(service: Service) -> APIRouter:
    """OpenAI's routes, and the tokenizer's."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        return await _generate(Chat(service, body, _ident()), http)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        return await _generate(Completions(service, body, _ident()), http)

    @router.post("/v1/responses")
    async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
        return await _generate(Responses(service, body, _ident()), http)

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, http: HttpRequest) -> Response:
        return JSONResponse(await attended(http.receive, _embed(service, body)))

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card(name) for name in service.names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.adapter(name)
        return service.card(name)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service.adapter(body.model)
        if body.messages is not None:
            ids = await turns(service, body.messages)
        else:
            bos = None if body.add_special_tokens else False
            (ids,) = await service.ids([body.prompt or ""], bos=bos, field="prompt")
        return {"tokens": ids, "count": len(ids), "max_model_len": service.lm.config.max_position_embeddings}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        service.adapter(body.model)
        try:
            return {"prompt": service.lm.tokenizer.decode(body.tokens, skip_special=False)}
        except ValueError as error:
            raise ApiError(400, f"tokens: {error}", param="tokens", code="invalid_value") from error

    return router


def tgi(service: Service) -> APIRouter:
    """Text Generation Inference's routes."""
    router = APIRouter()

    @router.post("/generate")
    async def generate(body: GenerateBody, http: HttpRequest) -> Response:
        return await _generate(Generate(service, body, stream=False), http)

    @router.post("/generate_stream")
    async def generate_stream(body: GenerateBody, http: HttpRequest) -> Response:
        return await _generate(Generate(service, body, stream=True), http)

    @router.get("/info")
    async def about() -> dict[str, Any]:
        return info(service)

    return router


def vertex(service: Service, route: str) -> APIRouter:
    """Vertex AI's prediction route."""
    router = APIRouter()

    @router.post(route)
    async def predictions(body: PredictBody, http: HttpRequest) -> Response:
        return JSONResponse(await attended(http.receive, predict(service, body, _ident())))

    return router


def health(worker: Worker, meters: Meters, settings: Settings) -> APIRouter:
    """Alive, ready, and what is measured."""
    router = APIRouter()
    meters.watch(lambda: worker.stats)

    @router.get("/health")
    async def alive() -> Response:
        return JSONResponse({"status": worker.state}, 503 if worker.state == "stopped" else 200)

    @router.get("/ready")
    async def ready() -> Response:
        headers = None if worker.state == "ready" else {"Retry-After": "5"}
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503, headers)

    if settings.health_route not in (None, "/health", "/ready"):
        router.add_api_route(settings.health_route, ready, methods=["GET"])

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def page() -> APIRouter:
    """The chat page: a route for each of its files, and no other path."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        async def static() -> Response:
            return FileResponse(file, headers=PAGE_HEADERS, media_type=PAGE_TYPES[file.suffix])

        router.add_api_route(path, static, methods=["GET", "HEAD"])

    for file in sorted(file for file in PAGE.rglob("*") if file.is_file()):
        name = file.relative_to(PAGE).as_posix()
        add(f"/{name}", file)
        if name == "index.html":
            add("/", file)
    return router


async def _generate(asked: Asked, http: HttpRequest) -> Response:
    """Run a request for text: as a stream of events, or whole."""
    worker, body = asked.service.worker, asked.body
    requests = await asked.prepare()
    job = await worker.open(requests, streaming=body.stream, field=asked.field)
    report = partial(asked.service.report, http.scope, body, job, asked.samples)
    if body.stream:
        return EventStream(asked, job, report)
    try:
        return JSONResponse(await attended(http.receive, asked.whole(job)))
    finally:
        worker.close(job)
        report()


async def _embed(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    one = isinstance(body.input, str) or isinstance(body.input[0], int)
    inputs: list[Any] = [body.input] if one else list(body.input)
    rows = await service.ids(inputs, field="input")
    adapter = service.adapter(body.model)
    found: dict[int, Any] = {}
    async with service.worker.job([Request(tokens=ids, adapter=adapter, embed=body.pooling) for ids in rows]) as job:
        while batch := await job.read():
            for number, event in batch:
                if event.embedding_D is None:
                    raise internal(_ident())
                vector_D = normalize(event.embedding_D.float(), dim=-1).cpu().numpy().astype("<f4")
                if body.encoding_format == "base64":
                    found[number] = base64.b64encode(vector_D.tobytes()).decode()
                else:
                    found[number] = vector_D.tolist()
    count = sum(map(len, rows))
    return {
        "object": "list",
        "model": body.model or service.settings.name,
        "data": [{"object": "embedding", "index": n, "embedding": found[n]} for n in range(len(rows))],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _ident() -> str:
    ident = request_id.get()
    assert ident is not None, "outside the gate"
    return ident


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    return error.response()


async def _invalid(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), error
    return from_validation(error.errors(), error.body).response()


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException), error
    status = error.status_code
    said = {404: f"no such path: {http.url.path:.200}", 405: f"{http.method} is not allowed here"}
    code = None if status in said else "bad_json"
    message = said.get(status, "body: not JSON that can be read")
    return ApiError(status, message, code=code, headers=error.headers).response()
