"""Tokenizer: text to token ids and back, and TextStream: text that grows one token at a time.

A folder's `tokenizer.json` is run by the tokenizers library; where only `tokenizer.model` exists, sentencepiece runs
it. `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` say what is special and how a chat is
written.

Control tokens (`specials`) are those that the library marks special, those that the configuration names, and Gemma's
two turn tokens wherever the vocabulary has them. Text that only spells one is encoded as plain text unless
`special=True`, so that what a user types never ends a turn; decoding leaves them out unless `skip_special=False`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from gemwright.tokenizer_backends import Backend, Library, SentencePiece

TURN_TOKENS: Final = ("<start_of_turn>", "<end_of_turn>")
NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of `tokenizer_config.json` that name a control token; a chat template sees them under these names."""
FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Everything that belongs to a tokenizer in a Hugging Face folder."""


class Tokenizer:
    """Text to ids and back, with the control tokens of one model folder. Made by `load`."""

    def __init__(self, folder: Path, backend: Backend, settings: Mapping[str, Any], chat_template: str | None) -> None:
        where = folder / "tokenizer_config.json"
        self.folder = folder
        self.chat_template = chat_template
        """The folder's own jinja template, or None."""
        self.names = _names(settings, where, backend)
        """Text of the named control tokens: `{"bos_token": "<bos>", ...}`."""
        backend.make_special(_declared(settings, where, backend, self.names))
        self.backend = backend
        self.specials: Mapping[str, int] = dict(backend.specials)
        """Every control token and its id."""
        self.special_ids = frozenset(self.specials.values())
        self.vocab_size = backend.size
        self.bos_id = self.specials.get(self.names.get("bos_token", ""))
        if "eos_token" not in self.names:
            raise ValueError(f"{where}: eos_token is missing, and the vocabulary has no <eos>")
        self.eos_id = self.specials[self.names["eos_token"]]
        self.pad_id = self.specials[self.names.get("pad_token", self.names["eos_token"])]
        explicit = settings.get("add_bos_token")
        if explicit not in (None, True, False):
            raise ValueError(f"{where}: add_bos_token is {explicit!r}; allowed: true, false, null")
        gemma_like = self.names.get("bos_token") == "<bos>" or backend.leads_with(self.bos_id)
        self.add_bos = self.bos_id is not None and (gemma_like if explicit is None else bool(explicit))
        """Whether raw text gets a BOS: the configuration's `add_bos_token`; where that is absent, yes if the token is
        spelled `<bos>` or the tokenizer file itself puts it in front."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a model folder.

        Raises:
            FileNotFoundError: the folder has neither tokenizer.json nor tokenizer.model.
            ValueError: a file is damaged, contradicts the vocabulary, or asks for something that is not understood; the
                message names the file.
        """
        folder = Path(folder)
        settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        backend: Backend
        if (folder / "tokenizer.json").is_file():
            backend = Library(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").is_file():
            backend = SentencePiece(folder / "tokenizer.model")
        else:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")
        return cls(folder, backend, settings, _chat_template(folder, settings))

    def id(self, token: str) -> int | None:
        """The id of a token given by its exact spelling in the vocabulary, or None."""
        return self.backend.id(token)

    def encode(self, text: str, *, bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of `text`; an EOS is never added.

        Args:
            bos: put a BOS in front; None follows `add_bos`. With `special`, a text that itself begins with the BOS
                token gets no second one.
            special: read spelled-out control tokens as control tokens. Otherwise they are plain text.

        Raises:
            ValueError: `bos=True` without a BOS token, or text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: {error.reason} at character {error.start}; allowed: valid Unicode") from None
        ids = self.backend.encode(text, special)
        if not (self.add_bos if bos is None else bos):
            return ids
        if self.bos_id is None:
            raise ValueError("bos: True, but this tokenizer has no BOS token; allowed: False or None")
        return ids if special and ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. Control tokens are left out unless `skip_special` is False.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        self.check(ids)
        return self.backend.decode([int(i) for i in ids], skip_special)

    def token_bytes(self, i: int) -> bytes:
        """What an id adds to a text that has begun; a control token's spelling; b"" where there is no token."""
        spelled = (self.backend.token(i) or "") if i < self.vocab_size else ""
        if not spelled or i in self.special_ids:
            return spelled.encode()
        ids, cut = self._begun
        text = self.backend.decode([*ids, i], False)[cut:]
        if "\ufffd" not in text:
            return text.encode()
        if self.backend.is_byte(i):
            return bytes.fromhex(spelled[3:5])
        return self.backend.token_bytes(i) if isinstance(self.backend, Library) else text.encode()

    @cached_property
    def _begun(self) -> tuple[list[int], int]:
        """Ids of a text that has begun (the start of one has rules of its own), and how many characters they are."""
        ids = self.backend.encode("a", False)
        return ids, len(self.backend.decode(ids, False))

    def check(self, ids: Iterable[int]) -> None:
        """Raises ValueError for the first id that the vocabulary does not have."""
        for index, i in enumerate(ids):
            if not 0 <= i < 2**31 or self.backend.token(i) is None:
                raise ValueError(f"ids[{index}]: {i} is no token id; the vocabulary has {self.vocab_size} ids from 0")

    def save(self, folder: str | Path) -> None:
        """Copies the files that this tokenizer was loaded from into `folder`, unchanged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file() and not (folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


class TextStream:
    """Text of a token sequence that arrives in parts, cut at a stop string.

    The pieces that `push` and `finish` return, joined, equal `tokenizer.decode(all ids)` up to the stop string that is
    complete first (of two complete at the same character, the longer). A piece never ends inside a character and never
    holds the beginning of a stop string that may still be completed. Each push costs time in its own ids, not in the
    length of the text. With byte-fallback tokens a whole run of them is held until it ends, because the decoder accepts
    or rejects it as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop: {stop!r}; allowed: a sequence of non-empty strings")
        self._tokenizer = tokenizer
        self._stop = tuple(sorted(stop, key=len, reverse=True))
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = tokenizer.backend.stream(skip_special)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped = False
        """Whether a stop string has been met; what follows it is dropped."""

    @property
    def text(self) -> str:
        """Everything returned so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that is now certain; "" once stopped. ValueError: an unknown id."""
        self._tokenizer.check(ids)
        if self.stopped:
            return ""
        return self._emit(self._decoder.push([int(i) for i in ids if i not in self._skip]), last=False)

    def finish(self) -> str:
        """Returns what was held back; the bytes of a character that never ended come out as U+FFFD."""
        return "" if self.stopped else self._emit(self._decoder.finish(), last=True)

    def _emit(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            self.stopped, keep = True, min(found)[1]
        else:
            keep = len(text) if last else len(text) - self._may_begin_stop(text)
        self._held = "" if self.stopped else text[keep:]
        self._pieces.append(text[:keep])
        return text[:keep]

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest tail of `text` that begins a stop string."""
        longest = min(len(text), len(self._stop[0]) - 1) if self._stop else 0
        tails = (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop))
        return next(tails, 0)


def _names(settings: Mapping[str, Any], where: Path, backend: Backend) -> dict[str, str]:
    """The named control tokens: as configured, else as the vocabulary offers; an explicit null means none."""
    given = {key: _text(settings[key], where, key) if key in settings else backend.named(key) for key in NAMED}
    return {key: token for key, token in given.items() if token is not None}


def _declared(settings: Mapping[str, Any], where: Path, backend: Backend, names: Mapping[str, str]) -> dict[str, None]:
    """Control tokens by configuration, in order; each must be in the vocabulary, since no new id has an embedding."""
    declared = {token: key for key, token in names.items()}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        if not isinstance(listed, (list, dict)):
            raise ValueError(f"{where}: {key} is {listed!r}; allowed: a list of tokens, or an object of named ones")
        tokens = [_text(t, where, key) for t in (listed.values() if isinstance(listed, dict) else listed)]
        declared |= {token: key for token in tokens if token is not None}
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise ValueError(f"{where}: added_tokens_decoder is {added!r}; allowed: an object of ids and tokens")
    for i, entry in added.items():
        key = f"added_tokens_decoder[{i}]"
        token = _text(entry, where, key)
        if token is None or str(backend.id(token)) != i:
            raise ValueError(
                f"{where}: {key} is {token!r}, which has id {token and backend.id(token)} in the vocabulary"
            )
        if isinstance(entry, dict) and entry.get("special"):
            declared[token] = key
    for token, key in declared.items():
        if backend.id(token) is None:
            raise ValueError(f"{where}: {key} is {token!r}, which the vocabulary does not have")
    return dict.fromkeys([*declared, *(token for token in TURN_TOKENS if backend.id(token) is not None)])


def _text(value: object, where: Path, key: str) -> str | None:
    """A token as configurations spell it: a string, `{"content": string}`, or null."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not (isinstance(text, str) and text):
        raise ValueError(f'{where}: {key} is {value!r}; allowed: a non-empty string, {{"content": string}} or null')
    return text


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, else the configuration's `chat_template`: one template, or a list with a "default"."""
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", named)
    if template is not None and not isinstance(template, str):
        where = folder / "tokenizer_config.json"
        raise ValueError(f"{where}: chat_template is {template!r:.200}; allowed: a string, or a list with a 'default'")
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where the file is absent."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__}; allowed: an object")
    return value
