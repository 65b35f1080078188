"""The two tokenizer libraries behind one face, and their texts decoded as they come.

`Library` runs tokenizer.json through the tokenizers library, `SentencePiece` runs tokenizer.model. A backend knows
tokens, ids and which of them are special; what the configuration says about them is read by `tokenizer.py`.

Streaming rests on one property of the decoders accepted here: apart from the start of the text (where a leading space
may be dropped) and from a run of byte-fallback tokens (decoded as a whole: one bad byte spoils the run), a token's
text does not depend on its neighbours. So a block that ends outside such a run is decoded behind a fixed anchor token,
whose own text is then cut off. A byte-level vocabulary needs less: its tokens are bytes, and UTF-8 says where a
character ends.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol

import sentencepiece
import tokenizers

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Decoder(Protocol):
    """The streaming half of a backend: certain text so far, then the rest. Ids are filtered and checked before."""

    def push(self, ids: list[int]) -> str: ...
    def finish(self) -> str: ...


class Backend(Protocol):
    """What the two libraries have in common. Ids given to `decode` and `stream` exist."""

    specials: dict[str, int]
    size: int

    def id(self, token: str) -> int | None: ...
    def token(self, i: int) -> str | None: ...
    def named(self, key: str) -> str | None:
        """The token that the vocabulary itself offers for one of NAMED."""

    def make_special(self, tokens: Iterable[str]) -> None: ...
    def leads_with(self, bos: int | None) -> bool: ...
    def encode(self, text: str, special: bool) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def is_byte(self, i: int) -> bool: ...
    def stream(self, skip_special: bool) -> Decoder: ...


class _RunDecoder:
    """Blocks that end outside a run of byte tokens, each decoded behind the anchor once the text has begun."""

    def __init__(self, backend: Backend, skip_special: bool, anchor: list[int]) -> None:
        self._backend, self._skip, self._anchor = backend, skip_special, anchor
        self._cut = len(backend.decode(anchor, skip_special))
        self._run: list[int] = []
        self._head: list[int] | None = []
        """Ids so far, while they have no text: the start-of-text rule still waits. None afterwards."""

    def push(self, ids: list[int]) -> str:
        end = next((n for n in range(len(ids), 0, -1) if not self._backend.is_byte(ids[n - 1])), 0)
        if end == 0:
            self._run += ids
            return ""
        block, self._run = self._run + ids[:end], ids[end:]
        return self._text(block)

    def finish(self) -> str:
        block, self._run = self._run, []
        return self._text(block)

    def _text(self, block: list[int]) -> str:
        if self._head is None:
            return self._backend.decode(self._anchor + block, self._skip)[self._cut :]
        self._head += block
        text = self._backend.decode(self._head, self._skip)
        if text:
            self._head = None
        return text


class _ByteDecoder:
    """Byte-level tokens: UTF-8 decoded as it comes."""

    def __init__(self, backend: Library) -> None:
        self._bytes = backend.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class Library:
    """tokenizer.json, through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            # A template may name tokens that are absent, which shows only when it runs.
            self._lead: list[int] = self._tokenizer.encode("").ids
        except Exception as error:  # the library raises bare Exception for every fault of a file
            raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        # A file may ask to cut or pad every text; prompts here are never cut in silence.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = _is_byte_level(self._tokenizer, path)
        self._lock = Lock()
        self.make_special(())

    def make_special(self, tokens: Iterable[str]) -> None:
        known = {t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special}
        new = [tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens if t not in known]
        self._tokenizer.add_special_tokens(new)
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {t.content: i for i, t in added.items() if t.special}
        self.size = self._tokenizer.get_vocab_size()
        self._anchor = _anchor(self)

    def id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token(self, i: int) -> str | None:
        found: str | None = self._tokenizer.id_to_token(i)
        return found

    def named(self, key: str) -> str | None:
        token = f"<{key.removesuffix('_token')}>"
        return token if self.id(token) is not None else None

    def leads_with(self, bos: int | None) -> bool:
        return bos is not None and self._lead[:1] == [bos]

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:  # the switch is state of the shared tokenizer
            self._tokenizer.encode_special_tokens = not special
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        return text

    def is_byte(self, i: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self.token(i) or "") is not None

    def token_bytes(self, i: int) -> bytes:
        """Bytes of a byte-level token; a token with a character outside the byte alphabet stands for its own text."""
        token = self.token(i)
        assert token is not None, i
        try:
            return bytes(_BYTE_OF[c] for c in token)
        except KeyError:
            return token.encode()

    def stream(self, skip_special: bool) -> Decoder:
        return _ByteDecoder(self) if self._byte_level else _RunDecoder(self, skip_special, self._anchor)


class SentencePiece:
    """tokenizer.model, through sentencepiece.

    Text never becomes a piece of type `control`, and always becomes one of type `user-defined`, as the turn tokens are.
    So text is split here: at control tokens when they are wanted, inside their spelling when they are not. A model
    that puts a space in front of every text (Gemma's does not) puts it in front of each part too.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
        self.size: int = self._processor.get_piece_size()
        unknown, control = self._processor.is_unknown, self._processor.is_control
        self.specials = {self._piece(i): i for i in range(self.size) if unknown(i) or control(i)}
        self._anchor: list[int] = []
        self.make_special(())

    def make_special(self, tokens: Iterable[str]) -> None:
        self.specials |= {token: self._processor.piece_to_id(token) for token in tokens}
        self._special_ids = frozenset(self.specials.values())
        longest_first = "|".join(re.escape(t) for t in sorted(self.specials, key=len, reverse=True))
        self._split = re.compile(f"({longest_first})")
        self._inside = re.compile(f"(?<=(?=(?:{longest_first}))[\\s\\S])")
        self._anchor = _anchor(self)

    def _piece(self, i: int) -> str:
        piece: str = self._processor.id_to_piece(i)
        return piece

    def id(self, token: str) -> int | None:
        i: int = self._processor.piece_to_id(token)
        return i if self._piece(i) == token else None  # an absent piece gives the unknown id

    def token(self, i: int) -> str | None:
        return self._piece(i) if i < self.size else None

    def named(self, key: str) -> str | None:
        ids = {"bos_token": self._processor.bos_id(), "eos_token": self._processor.eos_id()}
        ids |= {"pad_token": self._processor.pad_id(), "unk_token": self._processor.unk_id()}
        return self._piece(ids[key]) if ids.get(key, -1) >= 0 else None

    def leads_with(self, bos: int | None) -> bool:
        return bos is not None  # the file cannot say; models that define a BOS piece are trained with it

    def encode(self, text: str, special: bool) -> list[int]:
        if special:
            parts = (part for part in self._split.split(text) if part)
            return [i for p in parts for i in ([self.specials[p]] if p in self.specials else self._encode(p))]
        ids = self._encode(text)
        if self._special_ids.isdisjoint({*ids} - {self._processor.unk_id()}):
            return ids
        return [i for part in self._inside.split(text) for i in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            return self._plain([i for i in ids if i not in self._special_ids])
        parts: list[str] = []  # sentencepiece gives control pieces no text
        for special, group in groupby(ids, self._special_ids.__contains__):
            if special:
                parts += map(self._piece, group)
            elif not parts:
                parts.append(self._plain([*group]))
            else:
                parts.append(self._plain([*self._anchor, *group])[len(self._plain(self._anchor)) :])
        return "".join(parts)

    def _plain(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids) if ids else ""
        return text

    def is_byte(self, i: int) -> bool:
        return bool(self._processor.is_byte(i))

    def stream(self, skip_special: bool) -> Decoder:
        return _RunDecoder(self, skip_special, self._anchor)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


def _anchor(backend: Backend) -> list[int]:
    """The first token with a text of its own; none in a vocabulary of bytes alone, which is one run."""
    special = frozenset(backend.specials.values())
    ordinary = (i for i in range(backend.size) if i not in special and backend.token(i) and not backend.is_byte(i))
    return next(([i] for i in ordinary if backend.decode([i], False)), [])


def _is_byte_level(tokenizer: tokenizers.Tokenizer, path: Path) -> bool:
    """Whether tokens spell bytes; raises where a token's text may depend on its neighbours (see the file's head)."""
    state = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = [] if state is None else state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True
    fused = steps[kinds.index("Fuse") :] if "Fuse" in kinds else []
    local = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}.issuperset(kinds)
    if not local or any(step["type"] not in ("Fuse", "Strip") or step.get("stop") for step in fused):
        raise ValueError(
            f"{path}: decoder {kinds}; allowed: ByteLevel alone, or Replace, ByteFallback, Strip, Metaspace, "
            "then Fuse and a Strip of leading characters"
        )
    return False
