"""doctor: does a checkpoint hold what Gemma 2 defines, and does this machine compute it?

Each check is named after the trait it guards; `CHECKS` also tells how released tools have broken it. Facts of the files
are read and compared; arithmetic is probed on the checkpoint's own weights (`doctor_probes.py`). Any consistent shape
is legal, so constants are compared with the published ones only where hidden size and number of layers are those of a
published model.

A check that cannot run, because what it needs failed before, is `skipped` and names it: one fault fails one check.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import torch

from gemwright import doctor_probes as probes
from gemwright import prompt
from gemwright.checkpoint import EMBEDDING, HEAD, Checkpoint, CheckpointError
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.loader import FP16_HIDDEN_LIMIT, choose_device, choose_dtype
from gemwright.ops.attention import PHASES, Attention
from gemwright.tokenizer import TURN_TOKENS, Tokenizer

Status = Literal["ok", "warn", "FAIL", "skipped"]
PUBLISHED: Final = {name: ModelConfig.preset(name) for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")}
FP16_LARGEST: Final = 65504.0
EXACT: Final = 1e-3
"""Error allowed where both sides are computed in fp32."""
_USE_REFERENCE: Final = "use --attention reference until this backend is mended, and report it"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it."""

    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """One line of the report. `trap` says in plain words what goes wrong where this trait is broken."""

    name: str
    status: Status
    detail: str
    remedy: str
    trap: str


def _ok(detail: str) -> Finding:
    return Finding("ok", detail)


def _fail(detail: str, remedy: str) -> Finding:
    return Finding("FAIL", detail, remedy)


def _warn(detail: str, remedy: str = "") -> Finding:
    return Finding("warn", detail, remedy)


class _Skip(Exception):
    """What a check needs is not there."""


class Subject:
    """A folder under examination. Each part is read when a check first asks for it, and once."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        layers: int = 2,
        published: Mapping[str, ModelConfig] = PUBLISHED,
    ) -> None:
        """`folder` must exist; device, dtype and attention as for `gemwright.load`; `layers` layers are run.

        Raises FileNotFoundError or ValueError where one of them cannot be.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if layers < 1:
            raise ValueError(f"layers: got {layers}, allowed >= 1")
        self.folder, self.published = folder, published
        self.device = choose_device(device)
        self._dtype, self._attention, self._layers = dtype, attention, layers
        self.failed: set[str] = set()
        """Checks that have failed so far."""

    def need(self, *names: str) -> None:
        """Skip the running check if one of these has failed."""
        if missing := [name for name in names if name in self.failed]:
            raise _Skip(f"needs {' and '.join(missing)}")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        self.need("files")
        return Checkpoint(self.folder)

    @cached_property
    def config(self) -> ModelConfig:
        self.need("files", "config")
        return ModelConfig.from_hf(self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        self.need("tokenizer")
        return Tokenizer.load(self.folder)

    @cached_property
    def due(self) -> tuple[str, ModelConfig] | None:
        """The published model of this hidden size and number of layers, with its name."""
        size = (self.config.hidden_size, self.config.num_hidden_layers)
        same = (item for item in self.published.items() if (item[1].hidden_size, item[1].num_hidden_layers) == size)
        return next(same, None)

    @property
    def sample(self) -> probes.Sample:
        """A few layers with their weights, and what they compute."""
        self.need("files", "config", "tensors", "dtype")
        return self._sample

    @cached_property
    def _sample(self) -> probes.Sample:
        return probes.sample(self.checkpoint, self.config, probes.choose_layers(self.config, self._layers))

    @cached_property
    def dtype(self) -> torch.dtype:
        return choose_dtype(self._dtype, self.checkpoint, self.config, self.device)

    @cached_property
    def attention(self) -> Attention:
        """The backends that this machine takes for this model."""
        c = self.config
        return Attention.resolve(
            self._attention,
            device=self.device.type,
            dtype=self.dtype,
            cap=c.attn_logit_softcapping,
            window=c.sliding_window,
        )

    def probe(self, kind: probes.Kind) -> list[probes.Outcome]:
        """One attention probe on this machine's backends."""
        return probes.attention_probe(kind, self.sample.calls, self.attention, self.device, self.dtype)

    @cached_property
    def plain(self) -> list[probes.Outcome]:
        """The probe without cap and window: where it fails, the others say nothing."""
        return [outcome for outcome in self.probe("plain") if not outcome.ok]


def _published(s: Subject, *fields: str) -> Finding | None:
    """FAIL where a field differs from that of the published model of this shape."""
    if s.due is not None:
        name, due = s.due
        for field in fields:
            if (got := getattr(s.config, field)) != (right := getattr(due, field)):
                shape = f"this is the shape of {name}, which has {right}"
                return _fail(f"{field} is {got}; {shape}", f"set {field} to {right} in config.json")
    return None


def _files(s: Subject) -> Finding:
    checkpoint = s.checkpoint
    return _ok(f"{len(checkpoint.names())} tensors, headers whole")


def _config(s: Subject) -> Finding:
    c = s.config
    shape = f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.num_parameters():,} parameters"
    return _ok(f"{shape}; {f'the shape of {s.due[0]}' if s.due else 'a shape of its own'}")


def _tensors(s: Subject) -> Finding:
    shapes = s.config.parameter_shapes()
    if HEAD in s.checkpoint.names():  # judged by its own check
        shapes[HEAD] = s.checkpoint.shape(HEAD)
    s.checkpoint.check(shapes)
    return _ok("names and shapes are those of the config")


def _tied_head(s: Subject) -> Finding:
    s.need("tensors")
    if HEAD not in s.checkpoint.names():
        return _ok(f"no {HEAD}: the embedding is the head")
    try:
        s.checkpoint.check(s.config.parameter_shapes())
    except CheckpointError:
        remedy = f"remove {HEAD}; if it was trained apart (LoRA on the head), that training cannot be kept"
        return _fail(f"{HEAD} is stored and differs from {EMBEDDING}", remedy)
    return _ok(f"{HEAD} is stored and repeats {EMBEDDING}")


def _norms(s: Subject) -> Finding:
    """Trained gains scatter widely (in the Gemma family their means reach 100), so means alone say little; but some
    gains lie below one, where the stored w is negative (3 % and more of the norms in front of sub-layers; Gemma 3 270M,
    measured), and hardly any below zero. Stored as w + 1, almost nothing is negative. Near initialisation all
    norms have means near 0, or near 1 where the one was added.
    """
    s.need("tensors")
    names = [name for name in s.config.parameter_shapes() if name.endswith("norm.weight")]
    weights = {name: s.checkpoint.tensor(name).float() for name in names}
    if any(not bool(w.isfinite().all()) for w in weights.values()):
        return _fail("a norm holds NaN or infinity", "fetch or convert the weights again")
    front = torch.cat([w for n, w in weights.items() if "input_layernorm" in n or "pre_feedforward" in n])
    negative = float((front < 0).float().mean())
    means = torch.stack([w.mean() for w in weights.values()])
    all_near_one = bool(((means > 0.5) & (means < 1.5)).all())
    numbers = f"{negative:.1%} of the weights in front of sub-layers are negative, mean {float(front.mean()):.2f}"
    if (negative < 1e-3 and bool(front.any())) or all_near_one:
        return _fail(
            f"{numbers}: these are gains, w + 1", "subtract 1 from every norm weight (an importer of GGUF forgot it)"
        )
    return _ok(numbers)


def _attention_probe(s: Subject, kind: probes.Kind, what: str, remedy: str) -> Finding:
    """The verdict of one probe of one trait on the backends."""
    if s.plain:
        raise _Skip("needs a backend that computes plain attention")
    outcomes = s.probe(kind)
    if bad := [str(outcome) for outcome in outcomes if not outcome.ok]:
        return _fail(f"{what} is not honoured: {'; '.join(dict.fromkeys(bad))}", remedy)
    worst, bite = max(o.error for o in outcomes), min(o.bite for o in outcomes)
    names = ", ".join(dict.fromkeys(o.backend for o in outcomes))
    if not all(o.bite > 3 * o.allowed for o in outcomes):
        return _warn(f"{names}: error {worst:.0e}, but breaking the {what} would change only {bite:.1e}")
    return _ok(f"{what}; {names}: error {worst:.0e}, broken it would be {bite:.1g}")


def _attention_cap(s: Subject) -> Finding:
    cap = s.config.attn_logit_softcapping
    if wrong := _published(s, "attn_logit_softcapping"):
        return wrong
    if cap is None:
        return _warn("no cap in the config", "Gemma 2 has 50: right only for weights trained without one")
    if given := {call.cap for call in s.sample.calls} - {cap}:
        return _fail(f"the model passes cap {given} to attention, the config has {cap}", "report this")
    return _attention_probe(s, "cap", f"cap of {cap:g}", _USE_REFERENCE)


def _final_cap(s: Subject) -> Finding:
    cap = s.config.final_logit_softcapping
    if wrong := _published(s, "final_logit_softcapping"):
        return wrong
    error, bite = probes.final_cap_error(s.sample)
    if not error <= EXACT:
        return _fail(f"logits driven past the cap are off by {error:.1e} of it", "report this: the head's cap is lost")
    if cap is None:
        return _warn("no cap in the config", "Gemma 2 has 30: right only for weights trained without one")
    return _ok(f"cap of {cap:g}; logits driven past it: error {error:.0e}, broken it would be {bite:.1g}")


def _window(s: Subject) -> Finding:
    if wrong := _published(s, "sliding_window"):
        return wrong
    c = s.config
    if LOCAL not in c.layer_types:
        return _warn("no layer is local, so no window is used", "right only for weights trained like that")
    for call, layer in zip(s.sample.calls, s.sample.layers, strict=True):
        if call.window != c.window(layer):
            return _fail(
                f"layer {layer} is given window {call.window}, the config has {c.window(layer)}", "report this"
            )
    return _attention_probe(s, "window", f"window of {c.sliding_window} keys, itself included", _USE_REFERENCE)


def _layer_order(s: Subject) -> Finding:
    if wrong := _published(s, "layer_types"):
        remedy = "even layers are sliding_attention, odd ones full_attention: correct or remove layer_types"
        return dataclasses.replace(wrong, detail="layer_types is not the published order", remedy=remedy)
    kinds = s.config.layer_types
    alternating = all(kind == (GLOBAL if i % 2 else LOCAL) for i, kind in enumerate(kinds))
    counts = f"{kinds.count(LOCAL)} local, {kinds.count(GLOBAL)} global"
    if not alternating:
        return _warn(f"{counts}, in an order of its own", "Gemma 2 alternates from a local layer 0")
    return _ok(f"{counts}, alternating from a local layer 0")


def _query_scale(s: Subject) -> Finding:
    c = s.config
    scalar = c.query_pre_attn_scalar
    if wrong := _published(s, "query_pre_attn_scalar"):
        return wrong
    if any(outcome.nearest <= outcome.allowed for outcome in s.plain):
        backends = ", ".join(dict.fromkeys(outcome.backend for outcome in s.plain))
        return _fail(f"{backends} scales by the head size ({c.head_dim}), due is {scalar:g} ** -0.5", _USE_REFERENCE)
    if given := {call.scale for call in s.sample.calls if abs(call.scale * scalar**0.5 - 1) > 1e-6}:
        return _fail(f"the model scales queries by {given}, the config says {scalar:g} ** -0.5", "report this")
    usual = {c.head_dim: "the head size", c.hidden_size / c.num_attention_heads: "hidden / heads"}
    if scalar not in usual:
        allowed = " or ".join(f"{value:g} ({why})" for value, why in usual.items())
        return _warn(f"query_pre_attn_scalar is {scalar:g}; usual for this shape: {allowed}", "compare with the source")
    return _ok(f"{scalar:g} ** -0.5, {usual[scalar]}")


def _embedding_scale(s: Subject) -> Finding:
    due, got = s.config.hidden_size**0.5, probes.embedding_factor(s.sample)
    if not abs(got / due - 1) <= EXACT:
        return _fail(f"the embedding is multiplied by {got:.4g}, due is sqrt(hidden) = {due:.4g}", "report this")
    return _ok(f"sqrt({s.config.hidden_size}) = {got:.4g}")


def _constants(s: Subject) -> Finding:
    c = s.config
    return _published(s, "rope_theta", "rms_norm_eps") or _ok(f"rotary base {c.rope_theta:g}, eps {c.rms_norm_eps:g}")


def _tokenizer(s: Subject) -> Finding:
    kind = "tokenizer.json" if (s.folder / "tokenizer.json").is_file() else "tokenizer.model"
    return _ok(f"{s.tokenizer.vocab_size} tokens, {len(s.tokenizer.specials)} of them control tokens, from {kind}")


def _bos(s: Subject) -> Finding:
    tokenizer, config = s.tokenizer, s.config
    bos = tokenizer.bos_id
    if bos is None:
        return _fail("the tokenizer has no BOS token", 'set "bos_token" in tokenizer_config.json')
    if config.bos_token_id != bos:
        remedy = f"set bos_token_id to {bos} in config.json"
        return _fail(f"config.json has bos_token_id {config.bos_token_id}, the tokenizer {bos}", remedy)
    forms = {"a text prompt": tokenizer.encode("The capital of France")}
    if tokenizer.chat_template is not None or all(tokenizer.id(token) is not None for token in TURN_TOKENS):
        forms["a rendered chat"] = prompt.render([{"role": "user", "content": "Hello"}], tokenizer)
    remedies = {
        "a text prompt": 'set "add_bos_token": true in tokenizer_config.json',
        "a rendered chat": "put bos_token once at the head of the chat template",
    }
    for form, ids in forms.items():
        if ids.count(bos) != 1 or ids[0] != bos:
            return _fail(f"{form} has {ids.count(bos)} BOS tokens and starts with id {ids[0]}", remedies[form])
    return _ok(f"id {bos} once, in {' and in '.join(forms)}")


def _stop_ids(s: Subject) -> Finding:
    tokenizer, config, generation = s.tokenizer, s.config, s.checkpoint.generation_config
    union = prompt.stop_ids(config, generation, tokenizer)
    if surplus := [i for i in union if i >= config.vocab_size]:
        return _fail(f"eos_token_id {surplus} lies outside the vocabulary", "correct eos_token_id")
    listed = generation.get("eos_token_id")
    written = {*config.eos_ids, *(listed if isinstance(listed, list) else [listed])}
    end = tokenizer.id(TURN_TOKENS[1])
    remedy = f"add {end} to eos_token_id in generation_config.json"
    if tokenizer.chat_template is None and end not in written and end is not None:
        return _warn(
            f"{sorted(union)}; only the tokenizer names {TURN_TOKENS[1]} ({end})", f"for a chat model, {remedy}"
        )
    if end is not None and end not in written:
        return _fail(f"neither config names {TURN_TOKENS[1]} ({end}): other tools run on past the turn", remedy)
    if not union:
        return _fail("nothing ends a generation", "set eos_token_id in generation_config.json")
    return _ok(f"{sorted(union)}{f', {TURN_TOKENS[1]} among them' if end is not None else ''}")


_CHAT: Final = (
    {"role": "user", "content": " One? "},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three\nfour"},
)


def _turn_format(s: Subject) -> Finding:
    tokenizer = s.tokenizer
    if tokenizer.chat_template is None:
        if tokenizer.id(TURN_TOKENS[1]) is None:
            return _ok("no template and no turn tokens: a base model, it takes text")
        return _ok("no template in the folder: Gemma's own turns")
    turns = [("user", "One?"), ("model", "Two."), ("user", "Three\nfour")]
    due = "".join(f"{TURN_TOKENS[0]}{role}\n{text}{TURN_TOKENS[1]}\n" for role, text in turns)
    got = prompt.render_text(_CHAT, tokenizer).removeprefix(tokenizer.names.get("bos_token", ""))
    if got != f"{due}{TURN_TOKENS[0]}model\n":
        return _warn("the folder's chat template differs from Gemma 2's turns", "right if it was trained on it")
    return _ok("the folder's template is Gemma's turns, byte for byte")


def _vocabulary(s: Subject) -> Finding:
    size, rows = s.config.vocab_size, s.tokenizer.vocab_size
    if rows > size:
        return _fail(f"the tokenizer has {rows} ids, the embedding {size} rows", "take the tokenizer of this model")
    if rows < 0.9 * size:
        return _warn(f"the tokenizer has {rows} ids for {size} rows", "make sure that it belongs to these weights")
    stored = s.checkpoint.shape(EMBEDDING)[0]
    return _ok(f"{rows} ids, {size} rows{f' ({stored} stored, cropped)' if stored > size else ''}")


def _context(s: Subject) -> Finding:
    c = s.config
    if s.due is not None and c.max_position_embeddings > s.due[1].max_position_embeddings:
        trained = s.due[1].max_position_embeddings
        return _warn(
            f"{c.max_position_embeddings} positions, {s.due[0]} was trained on {trained}",
            "set max_position_embeddings back, unless these weights were trained further",
        )
    return _ok(f"{c.max_position_embeddings} positions")


def _dtype(s: Subject) -> Finding:
    s.need("tensors")
    stored = {str(s.checkpoint.dtype(name)).removeprefix("torch.") for name in s.checkpoint.names()}
    hidden = s.config.hidden_size
    remedy = "take the bf16 original: what was cut to fp16 cannot be had back"
    if "float16" in stored and hidden >= FP16_HIDDEN_LIMIT:
        return _fail(f"stored in float16 at hidden size {hidden}, whose activations pass {FP16_LARGEST:.0f}", remedy)
    peak = s.sample.peak
    if not peak < float("inf"):
        return _fail("the first layers give NaN or infinity", "fetch or convert the weights again")
    chosen, _ = s.dtype, s.attention  # both refuse what cannot be exact here
    if chosen == torch.float16 and peak > FP16_LARGEST:
        return _fail(f"activations reach {peak:.0f}, fp16 ends at {FP16_LARGEST:.0f}", "use bfloat16 or float32")
    note = f"stored {' and '.join(sorted(stored))}, computed in {str(chosen).removeprefix('torch.')} on {s.device}"
    if stored != {s.config.dtype}:
        return _warn(f"{note}; config.json says {s.config.dtype}", "correct dtype in config.json")
    return _ok(f"{note}; activations of {len(s.sample.layers)} layers reach {peak:.3g}")


def _cache(s: Subject) -> Finding:
    error = probes.cache_error(s.sample)
    if not error <= EXACT:
        return _fail(
            f"chunked prefill and decode differ from one pass by {error:.1e}", "report this: the cache is wrong"
        )
    return _ok(f"chunked prefill and decode across a wrapped ring equal one pass: error {error:.0e}")


def _attention(s: Subject) -> Finding:
    s.need("dtype", "query scale")
    chosen = ", ".join(f"{phase} {getattr(s.attention, phase)}" for phase in PHASES)
    if s.plain:
        return _fail("; ".join(dict.fromkeys(map(str, s.plain))), _USE_REFERENCE)
    s.need("attention cap", "window")
    outcomes = s.probe("all")
    if bad := [str(outcome) for outcome in outcomes if not outcome.ok]:
        return _fail("; ".join(dict.fromkeys(bad)), _USE_REFERENCE)
    return _ok(f"{chosen}; cap, window, wrapped cache, padding: error {max(o.error for o in outcomes):.0e}")


@dataclass(frozen=True)
class Trait:
    """How a trait is checked, and in plain words how it is known to break."""

    run: Callable[[Subject], Finding]
    trap: str


CHECKS: Final[dict[str, Trait]] = {
    "files": Trait(_files, "a damaged or incomplete folder"),
    "config": Trait(_config, "a config that asks for other arithmetic"),
    "tensors": Trait(_tensors, "weights missing, left over or of another shape"),
    "tied head": Trait(_tied_head, "trap 10: a head of its own beside the tied embedding"),
    "norms": Trait(_norms, "trap 6: norms stored as w + 1 (GGUF's way) are read as w, so every gain is one too large"),
    "dtype": Trait(_dtype, "trap 5: activations overflow fp16"),
    "query scale": Trait(
        _query_scale, "trap 2: queries are scaled by the head size where the model has another number"
    ),
    "attention cap": Trait(_attention_cap, "trap 1: a fast attention drops the soft-cap of the scores"),
    "final cap": Trait(_final_cap, "trap 17: the soft-cap of the logits is dropped"),
    "window": Trait(_window, "traps 3 and 4: local layers see one key too many, or everything"),
    "layer order": Trait(_layer_order, "trap 3: local and global layers are exchanged"),
    "embedding scale": Trait(
        _embedding_scale, "trap 10: the embedding's factor sqrt(hidden) is missing, or rounded otherwise"
    ),
    "constants": Trait(_constants, "another rotary base or epsilon than the weights were trained with"),
    "tokenizer": Trait(_tokenizer, "a tokenizer that is missing or damaged"),
    "BOS": Trait(_bos, "trap 7: the text starts with no <bos>, or with two"),
    "stop ids": Trait(_stop_ids, "trap 9: a chat that knows only <eos> never ends its turn"),
    "turn format": Trait(_turn_format, "trap 8: another turn format than the model was trained on"),
    "vocabulary": Trait(_vocabulary, "trap 19: token ids that the embedding does not have"),
    "context": Trait(_context, "a context length that the weights were not trained for"),
    "cache": Trait(_cache, "traps 4 and 12: a window-sized cache loses or keeps the wrong keys"),
    "attention": Trait(_attention, "a backend that is not the definition"),
}
"""The checks in their order: what others need comes first."""


def examine(subject: Subject) -> Iterator[Check]:
    """Run every check, yielding each as it is done; a fault of the folder or of a backend is a finding, no error."""
    for name, trait in CHECKS.items():
        try:
            found = trait.run(subject)
        except _Skip as skip:
            found = Finding("skipped", str(skip))
        except (ValueError, OSError, RuntimeError) as error:  # what readers and torch raise; others are our own bugs
            found = _fail(str(error), "")
        if found.status == "FAIL":
            subject.failed.add(name)
        yield Check(name, found.status, found.detail, found.remedy, trait.trap)
