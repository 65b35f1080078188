"""Synthetic data: a teacher answers prompts in bulk, and what comes is rows that fine-tuning reads.

The teacher is a model here, answered through the engine (`bulk.py`), or any server that speaks OpenAI's chat
completions. Prompts come as JSON lines with `prompt` or `messages`; answers that a conversation ends with are taken
off, so that chats may be answered anew. Prompts that say the same are asked once: equal texts, and texts that are equal
in lower case with spaces and punctuation evened out. So are answers to one prompt that say the same kept once.

    {"messages": [..., {"role": "assistant", "content": "..."}],
     "provenance": {"model": "...", "sampling": {...}, "date": "2026-11-26"}}

Answers that were cut by the limit of tokens teach a model to stop in the middle: they are left out, and so are empty
ones. Prompts that could not be answered go to OUTPUT.failed.jsonl, which is a file of prompts again. All is counted.

Finished answers are kept in OUTPUT.answers.part until all are there: a run that was killed, or whose server failed,
goes on with the same command.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gemwright.bulk import Part, answer_rows, read_rows, write_rows
from gemwright.engine.engine import Engine
from gemwright.lm import LM

ASSISTANT: Final = ("assistant", "model")
_STRIDE: Final = 1_000_003
EXTRA: Final = "pip install 'gemwright[synthesize]'"


@dataclass
class Report:
    """What a run did."""

    prompts: int = 0
    """Lines of the input."""
    same_prompts: int = 0
    """Of them, those that say what an earlier one says."""
    rows: int = 0
    """Answers that were written."""
    same_answers: int = 0
    empty: int = 0
    cut: int = 0
    """Answers that the limit of tokens ended."""
    failed: int = 0
    """Prompts without an answer."""
    first_error: str | None = None
    found: int = 0
    """Prompts that an earlier run had answered."""
    new_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that speaks OpenAI's chat completions."""

    url: str
    """Its base, such as http://127.0.0.1:8000/v1."""
    model: str
    key: str | None = None
    concurrency: int = 8
    """Requests in flight at once."""
    retries: int = 5
    """Further tries after a failed connection, a rate limit or a fault of the server, with growing pauses."""
    timeout: float = 600.0
    """Seconds that one try may take."""

    def __post_init__(self) -> None:
        for name, least in {"concurrency": 1, "retries": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is {least} or more")
        if not re.match(r"https?://", self.url):
            raise ValueError(f"server: got {self.url!r}, allowed is an http or https address")


def synthesize(
    teacher: LM | Server, source: Path, target: Path, *, name: str, sampling: Mapping[str, Any] | None = None,
    system: str | None = None, keep_cut: bool = False, engine: Engine | None = None, progress: bool = True,
) -> Report:  # fmt: skip
    """Let a teacher answer the prompts of `source` in `target`; see the module.

    Args:
        name: what the rows say of their model.
        sampling: controls, named as in SamplingParams; n answers a prompt.
        system: text put in front of the first user turn.
        keep_cut: keep answers that the limit of tokens ended.
    Raises:
        ValueError: bad lines, an output that exists, answers of another run.
        RuntimeError: the server failed; what it answered is kept.
    """
    if target.exists():
        raise ValueError(f"output: {target} exists; remove it, or choose another name")
    report = Report()
    rows = list(_distinct(read_rows(source), report))
    asked: list[dict[str, Any]] = [
        {"messages": _with_system(messages, system), "teacher": name, "controls": dict(sampling or {})}
        for messages in rows
    ]
    if sampling and sampling.get("seed") is not None:  # with one seed for all, like prompts would get like answers
        for number, row in enumerate(asked):
            row["sampling"] = {"seed": (int(sampling["seed"]) + _STRIDE * number) % 2**31}
    answers = target.with_name(target.name + ".answers")
    if not answers.exists():
        if isinstance(teacher, Server):
            done = _ask(teacher, asked, answers, dict(sampling or {}), progress=progress)
        else:
            done = answer_rows(teacher, asked, answers, sampling=dict(sampling or {}), engine=engine, progress=progress)
        report.found, report.new_tokens = done.found, done.new_tokens
    _deliver(answers, target, report, keep_cut=keep_cut)
    answers.unlink()
    return report


# --- what is asked ---------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Lower case, words alone, one space between: texts that differ otherwise say the same."""
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def _distinct(rows: Sequence[Mapping[str, Any]], report: Report) -> Iterator[list[dict[str, str]]]:
    """The conversations to answer, each once."""
    report.prompts = len(rows)
    seen: set[tuple[tuple[str, str], ...]] = set()
    for number, row in enumerate(rows, 1):
        prompt = row.get("prompt", row.get("messages"))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise ValueError(f"prompt {number}: {prompt!r:.80}; allowed is a text or a list of messages")
        while messages and messages[-1]["role"] in ASSISTANT:
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"prompt {number}: there is nothing to answer; allowed is a conversation with a user turn")
        key = tuple((m["role"], normalised(m["content"])) for m in messages)
        if key in seen:
            report.same_prompts += 1
            continue
        seen.add(key)
        yield [{"role": m["role"], "content": m["content"]} for m in messages]


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """`system` in front of the first user turn, which is where Gemma 2 reads one."""
    if not system:
        return messages
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise ValueError("system: there is no user turn to put it in front of")
    text = f"{system.strip()}\n\n{messages[first]['content']}"
    return [m | {"content": text} if i == first else m for i, m in enumerate(messages)]


# --- a server --------------------------------------------------------------------------------------------------------


def _ask(server: Server, rows: list[dict[str, Any]], target: Path, sampling: dict[str, Any], *, progress: bool) -> Any:
    """Answer rows in `target`. RuntimeError where the server fails; a request that it refuses is that row's error."""
    try:
        import openai
    except ImportError as error:
        raise ModuleNotFoundError(f"server: openai is not installed: {EXTRA}") from error
    client = openai.OpenAI(
        base_url=server.url, api_key=server.key or "none", max_retries=server.retries, timeout=server.timeout
    )

    def one(row: Any) -> dict[str, Any]:
        controls = _controls(sampling | row.get("sampling", {}))
        try:
            reply = client.chat.completions.create(model=server.model, messages=row["messages"], **controls)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return {"error": f"refused by the server: {error.message}"}
        usage = reply.usage
        return {
            "answers": [choice.message.content or "" for choice in reply.choices],
            "finish_reasons": [choice.finish_reason for choice in reply.choices],
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "new_tokens": usage.completion_tokens if usage else 0,
        }

    fault: Exception | None = None
    with Part(rows, target, progress=progress) as part, ThreadPoolExecutor(server.concurrency) as pool:
        flying: dict[Future[dict[str, Any]], int] = {}
        todo = part.todo()
        while True:
            while fault is None and len(flying) < server.concurrency and (i := next(todo, None)) is not None:
                flying[pool.submit(one, rows[i])] = i
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                index = flying.pop(future)
                try:
                    part.write(index, future.result())
                except openai.OpenAIError as error:  # what is in flight is still taken in
                    fault = fault or error
        if fault is not None:
            answered = part.report.found + part.report.answered + part.report.failed
            raise RuntimeError(
                f"server: {server.url} failed: {fault}. {answered} of {len(rows)} prompts are answered and kept in "
                f"{part.path}; the same command goes on from there"
            ) from fault
        part.finish()
    return part.report


def _controls(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling controls as OpenAI's API names them; those that it does not know go into the body as they are."""
    names = {"max_new_tokens": "max_tokens"}
    known = {"temperature", "top_p", "max_tokens", "n", "seed", "stop", "frequency_penalty", "presence_penalty"}
    renamed = {names.get(name, name): list(v) if isinstance(v, tuple) else v for name, v in sampling.items()}
    extra = {name: value for name, value in renamed.items() if name not in known}
    return {name: v for name, v in renamed.items() if name in known} | ({"extra_body": extra} if extra else {})


# --- what is delivered -----------------------------------------------------------------------------------------------


def _deliver(answers: Path, target: Path, report: Report, *, keep_cut: bool) -> None:
    """Turn answers into rows. ValueError where none is left."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows, failed = [], []
    for line in read_rows(answers):
        messages = line["messages"]
        if "error" in line:
            failed.append({"messages": messages, "error": line["error"]})
            continue
        texts = line.get("answers", [line.get("answer", "")])
        ends = line.get("finish_reasons", [line.get("finish_reason")])
        seen: set[str] = set()
        for text, end in zip(texts, ends, strict=True):
            key = normalised(text)
            report.empty += not text.strip()
            report.cut += bool(text.strip()) and end == "length"
            report.same_answers += key in seen
            if not text.strip() or (end == "length" and not keep_cut) or key in seen:
                continue
            seen.add(key)
            provenance = {"model": line["teacher"], "sampling": line["controls"], "date": today}
            answer = {"role": "assistant", "content": text.strip()}
            rows.append({"messages": [*messages, answer], "provenance": provenance})
    report.rows, report.failed = len(rows), len(failed)
    report.first_error = failed[0]["error"] if failed else None
    if failed:
        write_rows(target.with_name(target.name + ".failed.jsonl"), failed)
    if not rows:
        raise ValueError(f"{answers}: no answer is left to write: {asdict(report)}")
    write_rows(target, rows)
