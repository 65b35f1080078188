"""Bulk generation: a file of prompts in, a file of answers out, many at a time, and a killed run goes on.

Input: JSON lines, each with `prompt` (a text), or `messages` (a conversation), and whatever else, which is kept. A line
may set sampling controls of its own under `sampling`. Output: the same lines in the same order with `answer`,
`finish_reason`, `prompt_tokens` and `new_tokens` added (`answers`, a list, where n > 1); a line that could not be
answered has `error` instead, and harms no other.

Finished lines are appended to OUTPUT.part as they come; OUTPUT appears by a rename when all are there. A run that
finds a part file takes it up; each line carries a digest of its input, so a changed input is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gemwright.engine.engine import Engine
from gemwright.engine.request import Request, TokenEvent
from gemwright.engine.structured import Constraint
from gemwright.lm import LM, Answer

MAX_LINE = 16 * 2**20
"""Most characters of an input line."""


@dataclass
class Report:
    """What a run did."""

    answered: int = 0
    found: int = 0
    """Lines that an earlier run had answered."""
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass
class _Job:
    """One input line in flight."""

    index: int
    answers: list[Answer]
    open: int
    """Samples that have not ended."""


def bulk(
    lm: LM,
    source: Path,
    target: Path,
    *,
    sampling: Mapping[str, Any] | None = None,
    system: str | None = None,
    constraint: Constraint | None = None,
    adapter: str | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Report:
    """Answer every line of `source` in `target`; see the module. ValueError names the line that is not right."""
    common = {"constraint": constraint, "adapter": adapter}
    return answer_rows(
        lm, read_rows(source), target, sampling=dict(sampling or {}), system=system, common=common, engine=engine,
        progress=progress,
    )  # fmt: skip


def answer_rows(
    lm: LM, rows: list[dict[str, Any]], target: Path, *, sampling: dict[str, Any], system: str | None = None,
    common: dict[str, Any] | None = None, engine: Engine | None = None, progress: bool = True,
) -> Report:  # fmt: skip
    """The same for rows in memory; `common` goes into every request."""
    with Part(rows, target, progress=progress) as part:
        _Run(lm, engine or lm.engine, part).all(part.todo(), sampling, system, common or {})
        part.finish()
    return part.report


class Part:
    """The finished lines of a run, appended as they come; what an earlier run left is taken up.

    ValueError where `target` exists, or the part file is of another input.
    """

    def __init__(self, rows: list[dict[str, Any]], target: Path, *, progress: bool) -> None:
        if target.exists():
            raise ValueError(f"output: {target} exists; remove it, or choose another name")
        self.rows, self.target = rows, target
        self.path = target.with_name(target.name + ".part")
        self.done = _found(self.path, rows)
        self.report = Report(found=len(self.done))
        self.bar: Any = tqdm(total=len(rows), initial=len(self.done), unit="prompt", disable=not progress)
        self.out = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *error: object) -> None:
        self.out.close()
        self.bar.close()

    def todo(self) -> Iterator[int]:
        """Indices of the lines that are not answered."""
        return (i for i in range(len(self.rows)) if i not in self.done)

    def write(self, index: int, result: dict[str, Any]) -> None:
        """Take in what came of a line."""
        row, report = self.rows[index], self.report
        self.out.write(json.dumps([index, _digest(row), row | result], ensure_ascii=False) + "\n")
        self.out.flush()
        report.failed += "error" in result
        report.answered += "error" not in result
        report.prompt_tokens += result.get("prompt_tokens", 0)
        report.new_tokens += result.get("new_tokens", 0)
        self.bar.update()
        if elapsed := self.bar.format_dict["elapsed"]:
            self.bar.set_postfix_str(f"{report.new_tokens / elapsed:.0f} new tokens/s")

    def finish(self) -> None:
        """Put the lines in order, and let the output appear."""
        rows = {index: row for index, _, row in _lines(self.path)}
        assert len(rows) == len(self.rows), (len(rows), len(self.rows))
        write_rows(self.target, (rows[i] for i in range(len(rows))))
        self.path.unlink()


class _Run:
    """The lines in flight, and where the finished ones go."""

    def __init__(self, lm: LM, engine: Engine, part: Part) -> None:
        self.lm, self.engine, self.part = lm, engine, part
        self.jobs: dict[str, _Job] = {}

    def all(self, todo: Iterator[int], sampling: dict[str, Any], system: str | None, common: dict[str, Any]) -> None:
        """Answer the lines of these indices; more are in flight than run, so that a freed row is taken at once."""
        try:
            while True:
                while len(self.jobs) < 2 * self.engine.scheduler.rows and (i := next(todo, None)) is not None:
                    self._submit(i, sampling, system, common)
                if not self.jobs:
                    return
                for event in self.engine.step():
                    if event.id in self.jobs:
                        self._take(event)
        finally:
            for ident in self.jobs:
                self.engine.cancel(ident)

    def _submit(self, index: int, sampling: dict[str, Any], system: str | None, common: dict[str, Any]) -> None:
        """Put one line into the engine, or its refusal into the output."""
        row = self.part.rows[index]
        try:
            params = self.lm.params(**{**sampling, **row.get("sampling", {})})
            prompt = row["prompt"] if "prompt" in row else row["messages"]
            if not isinstance(prompt, str if "prompt" in row else list):
                raise TypeError(
                    f"prompt or messages: got {type(prompt).__name__}, allowed are a text or a list of turns"
                )
            tokens = self.lm.encode(prompt, system=system)
            ident = self.engine.submit(Request(tokens=tokens, params=params, **common))
        except (ValueError, TypeError, AttributeError) as error:  # whatever a line of foreign JSON may hold
            self.part.write(index, {"error": str(error)})
            return
        answers = [Answer(self.lm.tokenizer, params, len(tokens)) for _ in range(params.n)]
        self.jobs[ident] = _Job(index, answers, params.n)

    def _take(self, event: TokenEvent) -> None:
        job = self.jobs[event.id]
        if event.finish == "error":
            self.engine.cancel(event.id)
            self.part.write(self.jobs.pop(event.id).index, {"error": event.error})
            return
        answer = job.answers[event.index]
        answer.push(event)
        if answer.stopped and event.finish is None:
            self.engine.cancel(event.id, event.index)
        job.open -= event.finish is not None
        if not job.open:
            self.part.write(self.jobs.pop(event.id).index, _result(job.answers))


def read_rows(source: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file as objects. ValueError names the line."""
    rows: list[dict[str, Any]] = []
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(line) > MAX_LINE:
                raise ValueError(f"{source}:{number}: {len(line)} characters, allowed are {MAX_LINE}")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
                raise ValueError(f'{source}:{number}: allowed is an object with either "prompt" or "messages"')
            rows.append(row)
    if not rows:
        raise ValueError(f"{source}: no prompts in it")
    return rows


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _lines(part: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Index, digest and output of each whole line of a part file."""
    with part.open(encoding="utf-8") as file:
        for line in file:
            index, digest, row = json.loads(line)
            yield index, digest, row


def _found(part: Path, rows: list[dict[str, Any]]) -> set[int]:
    """Lines that an earlier run answered. A torn last line is cut off."""
    if not part.exists():
        return set()
    text = part.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(part, len(whole))
    done = set()
    for index, digest, _ in _lines(part):
        if index >= len(rows) or _digest(rows[index]) != digest:
            raise ValueError(f"{part}: made from another input (line {index + 1} differs); remove it to start afresh")
        done.add(index)
    return done


def _result(answers: list[Answer]) -> dict[str, Any]:
    done = [answer.completion() for answer in answers]
    texts, ends = [c.text for c in done], [c.finish_reason for c in done]
    counts = {"prompt_tokens": done[0].prompt_tokens, "new_tokens": sum(len(c.tokens) for c in done)}
    if len(done) == 1:
        return {"answer": texts[0], "finish_reason": ends[0], **counts}
    return {"answers": texts, "finish_reasons": ends, **counts}


def write_rows(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears whole."""
    partial = target.with_name(target.name + ".part.ordered")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
