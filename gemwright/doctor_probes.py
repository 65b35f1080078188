"""Probes: numbers that tell whether attention, head, embedding and cache do on this machine what Gemma 2 defines.

A few layers of a checkpoint (one local and one global at least) are held in fp32 beside a slice of the vocabulary, so
that memory stays bounded for any size. One forward pass records what attention is given: real queries, keys and values,
and the scale, cap and window that the model asks for. The attention probes repeat those to the length they need and
change one thing each, so that one broken trait fails one probe:

    plain   scores of size 2, no cap, all in sight            what remains is the scale and the arithmetic
    cap     scores four times past the cap                    without the cap the largest score takes everything
    window  no cap; three keys carry values a thousandfold,   one key too many or too few in the window is then
            queries stand just inside and just past them      the largest part of the output
    all     cap and window together, keys in the order of a   the form in which the model runs
            wrapped ring with free slots, one padded query

Truth is `ops.attention.reference` in fp32 on the same rounded inputs. An error is the largest difference of a head's
output over the largest value of the true output: 1 is total.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim, X tokens, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor, nn

from gemwright.cache import KVCache
from gemwright.checkpoint import EMBEDDING, HEAD, Checkpoint
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.model import Gemma2
from gemwright.ops.attention import EMPTY, PADDING, PHASES, Attend, Attention, Visibility, reference

Kind = Literal["plain", "cap", "window", "all"]

TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Error allowed to a backend, by the dtype of its inputs. Where bf16 is native on a CPU products are rounded to bf16
(torch 2.13 has no other), and a score of 100 is off by up to 0.25: errors of 3e-2 to 5e-2 were seen past the cap."""
TOKENS: Final = 32
"""Tokens of the recorded pass."""
QUERIES: Final = 40
"""Queries of a window probe; the first stands where the whole window is just in sight."""
ROWS: Final = 256
"""Embedding rows that are read."""
CACHE_WINDOW: Final = 16
"""The cache probe shortens the window to this, so that the ring wraps within a few tokens."""


@dataclass(frozen=True)
class Call:
    """What one layer gave to attention."""

    layer: int
    q_BTNH: Tensor
    k_BSKH: Tensor
    v_BSKH: Tensor
    window: int | None
    scale: float
    cap: float | None


@dataclass(frozen=True)
class _Recording(Attention):
    """The reference backend, writing down its calls."""

    calls: list[Call] = field(default_factory=list)

    def backend(self, phase: str) -> Attend:
        def attend(
            q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, see: Visibility, *, scale: float, cap: float | None
        ) -> Tensor:
            self.calls.append(Call(len(self.calls), q_BTNH, k_BSKH, v_BSKH, see.window, scale, cap))
            return reference(q_BTNH, k_BSKH, v_BSKH, see, scale=scale, cap=cap)

        return attend


@dataclass(frozen=True)
class Sample:
    """A few layers of a model, and one forward pass through them."""

    layers: tuple[int, ...]
    """Numbers of the layers in the whole model."""
    model: Gemma2
    tokens_BT: Tensor
    embedded_BTD: Tensor
    """Input of the first block."""
    hidden_BTD: Tensor
    calls: tuple[Call, ...]
    peak: float
    """Largest value of the residual stream."""


def choose_layers(config: ModelConfig, count: int) -> tuple[int, ...]:
    """The first `count` layers, and the first local and the first global one."""
    kinds = {config.layer_types.index(kind) for kind in (LOCAL, GLOBAL) if kind in config.layer_types}
    return tuple(sorted(kinds | set(range(min(count, config.num_hidden_layers)))))


@torch.inference_mode()
def sample(checkpoint: Checkpoint, config: ModelConfig, layers: tuple[int, ...]) -> Sample:
    """Read the layers and run them, in fp32 on the CPU."""
    rows = min(ROWS, config.vocab_size)
    start = (config.vocab_size - rows) // 2  # the first rows belong to control and unused tokens
    small = dataclasses.replace(
        config,
        vocab_size=rows,
        num_hidden_layers=len(layers),
        layer_types=tuple(config.layer_types[i] for i in layers),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = {}
    for name in small.parameter_shapes():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        state[name] = checkpoint.tensor(
            ".".join(parts), slice(start, start + rows) if name == EMBEDDING else None
        ).float()
    recording = _Recording()
    model = _assemble(small, recording, state)
    inputs: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    handles = [block.register_forward_pre_hook(note) for block in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(note))
    tokens_BT = (torch.arange(TOKENS) * 7 % rows)[None]
    hidden_BTD = model(tokens_BT, torch.arange(TOKENS)[None])
    for handle in handles:
        handle.remove()
    peak = float(torch.stack([x.abs().max() for x in inputs]).max())  # NaN stays NaN
    return Sample(layers, model, tokens_BT, inputs[0], hidden_BTD, tuple(recording.calls), peak)


def _assemble(config: ModelConfig, attention: Attention, state: dict[str, Tensor]) -> Gemma2:
    """A model over tensors that are there already."""
    with torch.device("meta"):
        model = Gemma2(config, attention)
    model.load_state_dict(state | {HEAD: state[EMBEDDING]}, assign=True)
    model.tie()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Outcome:
    """One backend in one probe."""

    backend: str
    phase: str
    error: float
    allowed: float
    bite: float
    """Error that the broken trait would have, in the way that shows least."""
    nearest: float
    """Distance of the output to that of the trait broken in the way that comes closest."""
    fault: str = ""
    """What the backend raised instead of an output."""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        if self.fault:
            return f"{self.backend} ({self.phase}) {self.fault}"
        return f"{self.backend} ({self.phase}) error {self.error:.1e}, allowed {self.allowed:.0e}"


@dataclass(frozen=True)
class _Inputs:
    q_BTNH: Tensor
    k_BSKH: Tensor
    v_BSKH: Tensor
    see: Visibility
    scale: float
    cap: float | None


@torch.inference_mode()
def attention_probe(
    kind: Kind, calls: tuple[Call, ...], attention: Attention, device: torch.device, dtype: torch.dtype
) -> list[Outcome]:
    """Run one probe through the backend of every phase, on the recorded layers it concerns."""
    outcomes = []
    for phase in PHASES:
        attend = attention.backend(phase)
        for call in calls:
            if (kind == "cap" and call.cap is None) or (kind == "window" and call.window is None):
                continue
            given = _inputs(kind, call, phase, device, dtype)
            truth = _reference(given, given.see, given.cap)
            name, fault = getattr(attention, phase), ""
            try:
                got = attend(given.q_BTNH, given.k_BSKH, given.v_BSKH, given.see, scale=given.scale, cap=given.cap)
            except RuntimeError as error:  # torch: no such kernel, out of memory
                got, fault = torch.full_like(truth, torch.nan), f"raises {type(error).__name__}: {error}"
            broken = list(_broken(kind, given))
            bite = min((_error(wrong, truth) for wrong in broken), default=math.inf)
            nearest = min((_error(got, wrong) for wrong in broken), default=math.inf)
            outcomes.append(Outcome(name, phase, _error(got, truth), TOLERANCE[dtype], bite, nearest, fault))
    return outcomes


def _inputs(kind: Kind, call: Call, phase: str, device: torch.device, dtype: torch.dtype) -> _Inputs:
    """Queries, keys and positions of a probe."""
    past = kind in ("window", "all")
    window = call.window if past else None
    S = (window + QUERIES if window is not None else 2 * QUERIES) if past else QUERIES
    q_pos_T = torch.arange(S - QUERIES - 1, S - 1) if past else torch.arange(S)
    k_pos_S = torch.arange(S)
    q_TNH, k_SKH, v_SKH = (
        x[0, torch.arange(n) % TOKENS] for x, n in ((call.q_BTNH, len(q_pos_T)), (call.k_BSKH, S), (call.v_BSKH, S))
    )
    size = {"plain": 2.0, "window": 0.3}.get(kind, 4 * (call.cap or 0.5))
    q_TNH = q_TNH * (size / _score_size(call))
    v_SKH = v_SKH.clone()
    if kind == "window":
        v_SKH[[0, QUERIES // 2, QUERIES // 2 + 1]] *= S  # query i sees key i, the next one no longer does
    if kind == "all":
        order = torch.cat((torch.arange(S // 3, S), torch.arange(S // 3)))  # a ring that has wrapped
        k_SKH, v_SKH, k_pos_S = (torch.cat((x[order], x[:3])) for x in (k_SKH, v_SKH, k_pos_S))
        k_pos_S[-3:] = EMPTY
        q_pos_T[0] = PADDING
    if phase == "decode":  # one query: it has one such key at its window's last place, and one just past it
        at = QUERIES // 2 + 1 if kind == "window" else -1
        q_TNH, q_pos_T = q_TNH[at][None], q_pos_T[at][None]
    q, k, v = (x[None].to(device, dtype) for x in (q_TNH, k_SKH, v_SKH))
    see = Visibility(q_pos_T[None].to(device), k_pos_S[None].to(device), window=window)
    return _Inputs(q, k, v, see, call.scale, call.cap if kind in ("cap", "all") else None)


def _score_size(call: Call) -> float:
    """Standard deviation of the recorded scores."""
    N, K = call.q_BTNH.shape[2], call.k_BSKH.shape[2]
    k_BSNH = call.k_BSKH.repeat_interleave(N // K, dim=2)
    scores = torch.einsum("btnh,bsnh->bnts", call.q_BTNH, k_BSNH) * call.scale
    return float(scores.std().clamp(min=1e-6))


def _reference(given: _Inputs, see: Visibility, cap: float | None) -> Tensor:
    q, k, v = (x.float() for x in (given.q_BTNH, given.k_BSKH, given.v_BSKH))
    return reference(q, k, v, see, scale=given.scale, cap=cap)


def _broken(kind: Kind, given: _Inputs) -> Iterator[Tensor]:
    """The output with the probe's trait broken in each way it is known to break."""
    see, head_scale = given.see, given.q_BTNH.shape[-1] ** -0.5
    if kind == "plain" and abs(head_scale / given.scale - 1) > 0.01:
        yield _reference(dataclasses.replace(given, scale=head_scale), see, given.cap)
    if kind == "cap":
        yield _reference(given, see, None)
    if kind == "window" and see.window is not None:
        for window in (see.window + 1, see.window - 1, None):
            yield _reference(given, dataclasses.replace(see, window=window, _memo={}), given.cap)


def _error(got: Tensor, truth: Tensor) -> float:
    difference = (got.float() - truth).abs().amax(-1)
    return float((difference / truth.abs().amax(-1).clamp(min=1e-6)).max())


@torch.inference_mode()
def final_cap_error(taken: Sample) -> tuple[float, float]:
    """Error of logits driven three times past the cap, and the error without a cap, both over the largest logit."""
    cap, weight_VD = taken.model.config.final_logit_softcapping, taken.model.model.embed_tokens.weight
    hidden_XD = taken.hidden_BTD[0]
    raw_XV = hidden_XD @ weight_VD.T
    factor = 3 * (cap or 30.0) / float(raw_XV.std().clamp(min=1e-6))
    raw_XV = raw_XV * factor
    truth_XV = raw_XV if cap is None else cap * torch.tanh(raw_XV / cap)
    got_XV = taken.model.logits(hidden_XD * factor)
    unit = float(truth_XV.abs().max())
    return float((got_XV - truth_XV).abs().max()) / unit, float((raw_XV - truth_XV).abs().max()) / unit


def embedding_factor(taken: Sample) -> float:
    """The factor between the stored embedding and the input of the first block."""
    stored_BTD = taken.model.model.embed_tokens.weight[taken.tokens_BT]
    return float((taken.embedded_BTD * stored_BTD).sum() / stored_BTD.square().sum().clamp(min=1e-12))


@torch.inference_mode()
def cache_error(taken: Sample) -> float:
    """Hidden states of chunked prefill and decode through the cache against one pass without it.

    The window is shortened and attention is the reference, so that nothing but the cache differs.
    """
    window = min(taken.model.config.sliding_window, CACHE_WINDOW)
    config = dataclasses.replace(taken.model.config, sliding_window=window)
    model = _assemble(config, Attention(), dict(taken.model.state_dict()))
    length, chunk = 4 * window, 5
    tokens_BT = (torch.arange(length) * 7 % config.vocab_size)[None]
    pos_BT = torch.arange(length)[None]
    truth = model(tokens_BT, pos_BT)
    cache = KVCache(config, 1, length, chunk=chunk, dtype=torch.float32)
    edges = [*range(0, 3 * window, chunk), *range(3 * window, length + 1)]
    parts = [model(tokens_BT[:, a:b], pos_BT[:, a:b], cache=cache) for a, b in pairwise(edges)]
    return _error(torch.cat(parts, 1), truth)
