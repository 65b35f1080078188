"""gemwright bench serve: a load generator for any server that speaks OpenAI's API, and what it measures.

Two kinds of load. Closed: `--concurrency` requests are always in flight, which tells throughput. Open: requests arrive
at random at `--rate` a second (a Poisson process), however many are in flight, which tells the latency that visitors of
a service see; a closed load hides waiting, because a slow server is asked less.

Times are the client's. The first token is timed from the moment the request was due, so that a client that falls
behind is not flattered; "between tokens" is the gap between two pieces of a stream, which may hold several tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from tyro.conf import arg

from gemwright.cli.options import File, Flag, Text

if TYPE_CHECKING:
    import httpx2

WORDS: Final = (
    "the a this river house old small garden walks reads writes and but over under with from city letter stone music "
    "morning winter never always seven green quiet answer road light carries finds water bread window paper"
).split()
PERCENTILES: Final = (50, 90, 99)
Amount = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]


@dataclass(frozen=True)
class Options:
    """Put a load on an OpenAI-compatible server and measure it.

    Prompts come from a file: a text a line, or JSON or JSON lines with "prompt", "text", "messages" or ShareGPT's
    "conversations" in each record (and "max_tokens", if a record has it). Without a file they are made of random words.

    Exit code: 0 if every request was answered, 1 if some failed, 2 for input.

    For example:

      gemwright bench serve --requests 200 --concurrency 16

      gemwright bench serve --url http://host:8000/v1 --rate 4 --prompts chats.jsonl --plot latency.png

      gemwright bench serve --words 32 512 --new 128 --extra '{"min_tokens": 128}' --json
    """

    url: Annotated[str, arg(metavar="URL")] = "http://localhost:8000/v1"
    """The API's base, as OpenAI's clients take it."""
    model: Text = None
    """Model to ask for; default: the first that the server lists."""
    api_key: Text = None
    """API key; default: OPENAI_API_KEY of the environment, if there is one."""
    requests: int = 64
    """Requests in all; the prompts are taken in turns."""
    concurrency: int = 8
    """Requests in flight at a time."""
    rate: Amount = None
    """Requests a second that arrive at random, however many are in flight; instead of --concurrency."""
    prompts: File = None
    """File with prompts."""
    words: tuple[int, ...] = (128,)
    """Lengths of made-up prompts in words, taken in turns."""
    new: int = 64
    """max_tokens of each request."""
    chat: Flag = False
    """Ask /chat/completions; prompts that are conversations always do."""
    whole: Flag = False
    """Ask for whole answers instead of streams: no times of tokens."""
    extra: Text = None
    """JSON object with more fields for each body; null takes a field out, such as {"stream_options": null}."""
    seed: int = 0
    """Of arrivals and made-up prompts."""
    timeout: float = 600.0
    """Seconds that a server may be silent."""
    json: Flag = False
    """Print one JSON object."""
    out: File = None
    """Write the JSON object, and every request's times with it, to a file."""
    plot: File = None
    """Write a picture of latency over time and of its distribution (PNG, SVG or PDF)."""

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}, allowed is 1 or more")
        if not self.words or min(self.words) < 1:
            raise ValueError(f"--words: got {self.words}, allowed are lengths of 1 or more")
        for name in ("rate", "timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name}: got {getattr(self, name)}, allowed is more than 0")

    def fields(self) -> dict[str, Any]:
        """`extra` as an object. ValueError where it is none."""
        try:
            found = json.loads(self.extra or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"--extra: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"--extra: got {self.extra}, allowed is a JSON object")
        return found


@dataclass
class Record:
    """What became of one request; times in seconds since the run began."""

    due: float
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each piece of the answer came."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    """As the server counts; pieces, where it does not."""
    error: str | None = None
    """The kind of failure."""


def run(options: Options) -> int:
    """Measure and print."""
    try:
        import httpx2  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing; pip install 'gemwright[serve]'") from error
    if options.plot is not None:
        _pyplot()  # refused before an hour of load, not after it
    records = asyncio.run(drive(options))
    result = summary(records)
    if options.out is not None:
        rows = [vars(record) for record in records]
        Path(options.out).write_text(json.dumps(result | {"records": rows}) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(records, options.plot)
    print(json.dumps(result) if options.json else told(result))
    return int(result["failed"] > 0)


# --- prompts ---------------------------------------------------------------------------------------------------------


def bodies(options: Options) -> list[dict[str, Any]]:
    """The distinct bodies' own parts: a prompt or messages, and max_tokens where a record says it."""
    if options.prompts is not None:
        found = [_record(value, options.prompts, n) for n, value in enumerate(_values(Path(options.prompts)), 1)]
        if not found:
            raise ValueError(f"{options.prompts}: no prompt in it")
    else:
        draw = random.Random(options.seed)
        lengths = itertools.islice(itertools.cycle(options.words), options.requests)
        found = [{"prompt": " ".join(draw.choices(WORDS, k=length))} for length in lengths]
    if options.chat:
        found = [
            {"messages": [{"role": "user", "content": one.pop("prompt")}], **one} if "prompt" in one else one
            for one in found
        ]
    return found


def _values(path: Path) -> list[Any]:
    """The records of a file: an array of JSON, an object a line, or a text a line."""
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        lines = [line for line in text.splitlines() if line.strip()]
        return [json.loads(line) for line in lines] if text.lstrip().startswith("{") else lines
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _record(value: Any, path: str, number: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        limit = {"max_tokens": value["max_tokens"]} if isinstance(value.get("max_tokens"), int) else {}
        for key in ("prompt", "text"):
            if isinstance(value.get(key), str):
                return {"prompt": value[key], **limit}
        if isinstance(value.get("messages"), list):
            turns = value["messages"]
            while turns and turns[-1].get("role") == "assistant":  # a record of training: the answer is asked for
                turns = turns[:-1]
            if turns:
                return {"messages": turns, **limit}
        for turn in value.get("conversations") or ():
            if turn.get("from") in ("human", "user"):
                return {"prompt": turn["value"], **limit}
    raise ValueError(f"{path}: record {number} has no prompt, text, messages or conversations")


# --- load ------------------------------------------------------------------------------------------------------------


async def drive(options: Options) -> list[Record]:
    """Put the load on; a record for each request, in the order they were due. ValueError: the server is not there."""
    import httpx2
    from tqdm import tqdm

    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(headers=headers, timeout=options.timeout, limits=limits) as http:
        base = options.url.rstrip("/")
        model = options.model or await _first_model(http, base)
        common: dict[str, Any] = {"model": model, "max_tokens": options.new}
        if not options.whole:
            common |= {"stream": True, "stream_options": {"include_usage": True}}
        asked = itertools.islice(itertools.cycle(bodies(options)), options.requests)
        sent = [_body(common | own, options.fields()) for own in asked]
        with tqdm(total=len(sent), unit="request", leave=False, disable=None) as bar:
            begun = time.perf_counter()

            async def one(body: dict[str, Any], due: float) -> Record:
                record = await ask(http, base, body, begun, due)
                bar.update()
                return record

            if options.rate is None:
                return await _closed(one, sent, options.concurrency, begun)
            return await _open(one, sent, arrivals(options.rate, options.seed), begun)


async def _closed(one: Any, sent: Sequence[dict[str, Any]], workers: int, begun: float) -> list[Record]:
    left = iter(enumerate(sent))
    found: dict[int, Record] = {}

    async def work() -> None:
        for number, body in left:
            found[number] = await one(body, time.perf_counter() - begun)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(workers, len(sent))):
            group.create_task(work())
    return [found[number] for number in range(len(sent))]


async def _open(one: Any, sent: Sequence[dict[str, Any]], dues: Iterator[float], begun: float) -> list[Record]:
    tasks: list[asyncio.Task[Record]] = []
    async with asyncio.TaskGroup() as group:
        for body, due in zip(sent, dues, strict=False):
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - begun)))
            tasks.append(group.create_task(one(body, due)))
    return [task.result() for task in tasks]


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which requests arrive: a Poisson process."""
    draw, due = random.Random(seed), 0.0
    while True:
        due += draw.expovariate(rate)
        yield due


def _body(own: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**own, **extra}.items() if value is not None}


async def _first_model(http: httpx2.AsyncClient, base: str) -> str:
    import httpx2

    try:
        answer = await http.get(f"{base}/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx2.HTTPError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{base}/models names no model ({type(error).__name__}: {error}); give --model") from error


async def ask(http: httpx2.AsyncClient, base: str, body: dict[str, Any], begun: float, due: float) -> Record:
    """Send one request and time its answer."""
    import httpx2

    record = Record(due)
    url = f"{base}/{'chat/completions' if 'messages' in body else 'completions'}"
    try:
        async with http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                record.error = f"HTTP {answer.status_code}"
            elif body.get("stream"):
                await _follow(answer, record, begun)
            else:
                _count(json.loads(await answer.aread()), record)
    except httpx2.TimeoutException:
        record.error = "timeout"
    except httpx2.TransportError as error:
        record.error = type(error).__name__
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        record.error = f"unreadable answer: {type(error).__name__}"
    record.end = time.perf_counter() - begun
    return record


async def _follow(answer: httpx2.Response, record: Record, begun: float) -> None:
    ended = False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        event = line[5:].strip()
        if event == "[DONE]":
            return
        value = json.loads(event)
        if "error" in value:
            record.error = "error in the stream"
            return
        _count(value, record)
        choices = value.get("choices") or ()
        ended |= any(choice.get("finish_reason") for choice in choices)
        if any(_piece(choice) for choice in choices):
            record.times.append(time.perf_counter() - begun)
            record.new_tokens = max(record.new_tokens, len(record.times))
    if not ended:  # some servers do not say [DONE]
        record.error = "stream cut off"


def _piece(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("tool_calls"))


def _count(value: Mapping[str, Any], record: Record) -> None:
    if usage := value.get("usage"):
        record.prompt_tokens, record.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]


# --- report ----------------------------------------------------------------------------------------------------------


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum in milliseconds; None of nothing."""
    import numpy as np

    if not seconds:
        return None
    values = 1e3 * np.asarray(seconds)
    cuts = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {name: round(x, 3) for name, x in {"mean": float(values.mean()), **cuts, "max": float(values.max())}.items()}


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """All that is measured; rates count the answered requests over the whole run."""
    good = [record for record in records if record.error is None]
    seconds = max(record.end for record in records)
    gaps = [b - a for record in good for a, b in itertools.pairwise(record.times)]
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "seconds": round(seconds, 3),
        "requests_per_s": len(good) / seconds,
        "prompt_tokens_per_s": sum(record.prompt_tokens for record in good) / seconds,
        "new_tokens_per_s": sum(record.new_tokens for record in good) / seconds,
        "first_token_ms": spread([record.times[0] - record.due for record in good if record.times]),
        "between_tokens_ms": spread(gaps),
        "request_ms": spread([record.end - record.due for record in good]),
    }


def told(result: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{result['requests']} requests in {result['seconds']:.1f} s, {result['failed']} failed",
        *(f"  {count} x {kind}" for kind, count in result["errors"].items()),
        f"{result['requests_per_s']:.2f} requests/s, {result['prompt_tokens_per_s']:.1f} prompt tokens/s, "
        f"{result['new_tokens_per_s']:.1f} new tokens/s",
        f"{'milliseconds':<16}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p99", "max")),
    ]
    for name in ("first_token_ms", "between_tokens_ms", "request_ms"):
        if (row := result[name]) is not None:
            label = name.removesuffix("_ms").replace("_", " ")
            lines.append(f"{label:<16}" + "".join(f"{x:10.1f}" for x in row.values()))
    return "\n".join(lines)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError(f"--plot: {error.name} is missing; pip install 'gemwright[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(records: Sequence[Record], path: str) -> None:
    """Latency over the run, with failures marked, and its distribution."""
    import numpy as np

    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    good = [record for record in records if record.error is None]
    columns = {
        "first token": [(r.due, r.times[0] - r.due) for r in good if r.times],
        "request": [(r.due, r.end - r.due) for r in good],
    }
    for label, points in columns.items():
        if points:
            left.plot(*zip(*points, strict=True), "o", markersize=3, alpha=0.7, label=label)
            values = np.sort([seconds for _, seconds in points])
            right.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=label)
    if failed := [r.due for r in records if r.error is not None]:
        left.plot(failed, [0.0] * len(failed), "x", color="tab:red", label="failed")
    left.set(xlabel="due, seconds into the run", ylabel="seconds")
    right.set(xlabel="seconds", ylabel="share of requests", xscale="log", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    try:
        figure.savefig(path, dpi=150)
    finally:
        _pyplot().close(figure)
