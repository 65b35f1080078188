"""Traces over OTLP, off unless an endpoint is configured: one span a request, under the caller's `traceparent`.

Attributes follow OpenTelemetry's conventions for HTTP servers and, for tokens, for generative models (gen_ai.*).
OpenTelemetry is imported only here, and only when traces are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Span(Protocol):
    """As much of a span as is used here."""

    def set_attribute(self, key: str, value: str | int | float) -> None: ...


Tracer = Callable[[str, Mapping[str, str]], AbstractContextManager[Span | None]]
"""(name, the request's headers) -> a span around the request."""


def no_tracer(name: str, headers: Mapping[str, str]) -> AbstractContextManager[None]:
    return nullcontext()


def otlp(endpoint: str) -> tuple[Tracer, Callable[[], None]]:
    """A tracer that sends to a collector (such as http://localhost:4318/v1/traces), and its shutdown.

    Raises ValueError where OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise ValueError(f"otlp: {error.name} is missing; pip install 'gemwright[otel]'") from error
    return tracer(OTLPSpanExporter(endpoint=endpoint))


def tracer(exporter: SpanExporter) -> tuple[Tracer, Callable[[], None]]:
    """As `otlp`, over any exporter."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    provider = TracerProvider(resource=Resource.create({"service.name": "gemwright"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    made, propagator = provider.get_tracer("gemwright"), TraceContextTextMapPropagator()

    def span(name: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        return made.start_as_current_span(name, context=propagator.extract(dict(headers)), kind=SpanKind.SERVER)

    return span, provider.shutdown
