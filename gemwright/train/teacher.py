"""The teacher: final hidden states of a batch, and the head that makes a distribution of them, in the student's ids.

Logits of a whole batch would outweigh both models, so the teacher stops in front of its head: a Gemma 2 by its own
forward pass, any other causal model by a module in the place of its head that keeps what comes in. What a model does
after its head must be nothing but a soft cap: that is tried on a few tokens when it is loaded, and refused otherwise.

Every rank holds the whole teacher. transformers loads foreign teachers and is imported only for them.

Legend: B rows, T places, P documents, L places of the longest of them, D the teacher's width, V vocabulary, X places
that carry loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from gemwright.checkpoint import Checkpoint
from gemwright.data.batch import Batch
from gemwright.loader import load_model
from gemwright.model import Gemma2
from gemwright.ops.attention import softcap
from gemwright.ops.head import Head
from gemwright.swap import put
from gemwright.train.token_ids import SameIds

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens_BT, pos_BT, doc_BT) -> hidden_BTD."""
EXTRA: Final = "pip install 'gemwright[teacher]'"
_SAMPLES, _SAMPLE = 64, 2**16


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model. `forward` takes its own ids; `hidden` and `head` are in the student's once `speak` was called."""

    forward: Forward
    head: Head
    fingerprint: str
    """Digest of configuration and weights."""
    model: Gemma2 | None = None
    """The model itself, where it is a Gemma 2."""
    ids_V: Tensor | None = None
    """The teacher's id of each of the student's, where any differ."""

    def speak(self, ids: SameIds) -> Teacher:
        """The same teacher in the student's ids."""
        if not ids.moved:
            return self
        weight_VD = self.head.weight_VD
        ids_V = torch.tensor(ids.teacher_ids(), device=weight_VD.device)
        return replace(self, ids_V=ids_V, head=replace(self.head, weight_VD=weight_VD[ids_V]))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [X, D] at the places that carry loss, in the order of the batch."""
        tokens_BT = batch.tokens_BT if self.ids_V is None else self.ids_V[batch.tokens_BT]
        hidden_BTD = self.forward(tokens_BT, batch.pos_BT, batch.doc_BT)
        return hidden_BTD[batch.weights_BT > 0]


def load_teacher(folder: Path, *, device: torch.device, dtype: str = "auto") -> Teacher:
    """A teacher in evaluation mode on a device.

    Raises ValueError where its logits are not a softcap of its head's product, ModuleNotFoundError without
    transformers, and what loading a folder raises.
    """
    if Checkpoint(folder).config.get("model_type") != "gemma2":
        return _foreign(folder, device, dtype)
    model = load_model(folder, device=device, dtype=dtype)
    # as it is, tied: a packed copy would be the largest tensor of all, for a product that the loss makes itself
    put(model, "lm_head", nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta"))
    model.tie()
    head = Head(model.model.embed_tokens.weight.detach(), model.config.final_logit_softcapping)
    return Teacher(model, head, fingerprint(folder), model)


def fingerprint(folder: Path) -> str:
    """Digest of a folder's configuration and weights: headers, and samples over the length of each file."""
    digest = hashlib.sha256(json.dumps(Checkpoint(folder).config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for n in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * n // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]


# --- any causal model of transformers --------------------------------------------------------------------------------


class _Catch(nn.Module):
    """Stands in the place of a head, and keeps what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: Tensor | None = None

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        self.caught = hidden_BTD
        return hidden_BTD[..., :1]

    def take(self) -> Tensor:
        """What came in last; it is let go."""
        caught, self.caught = self.caught, None
        assert caught is not None, "the model did not call its head"
        return caught


def _foreign(folder: Path, device: torch.device, dtype: str) -> Teacher:
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(f"teacher: {folder} is no Gemma 2, and transformers is missing: {EXTRA}") from error
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    model = model.to(device).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if not isinstance(head, nn.Linear) or name is None or head.bias is not None:
        came = "with a bias" if getattr(head, "bias", None) is not None else f"a {type(head).__name__}"
        raise ValueError(f"teacher: the output head of {folder} is {came}, allowed is a linear without one")
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    catch = _Catch()
    _try_head(folder, model, name, head, cap, catch)
    reader = _Reader(model, catch)
    return Teacher(reader.forward, Head(head.weight.detach(), cap), fingerprint(folder))


def _try_head(folder: Path, model: Any, name: str, head: nn.Linear, cap: float | None, catch: _Catch) -> None:
    """Put `catch` in the head's place; ValueError where hidden states, head and cap do not make the model's logits."""
    probe_BT = torch.arange(1, 9, device=head.weight.device)[None]
    with torch.no_grad():
        want_BTV = model(probe_BT, use_cache=False).logits.float()
        put(model, name, catch)
        model(probe_BT, use_cache=False)
        hidden_BTD = catch.take()
        got_BTV = softcap(head(hidden_BTD).float(), cap)
    off = float((got_BTV - want_BTV).abs().max() / want_BTV.abs().max())
    if not off < (1e-3 if head.weight.dtype == torch.float32 else 2e-2):
        raise ValueError(
            f"teacher: the logits of {folder} are not its head's product with a soft cap of {cap} (off by "
            f"{100 * off:.1f} %): it scales or changes them in a way that is not understood here"
        )


@dataclass(frozen=True, eq=False)
class _Reader:
    """Documents one by one through a model that knows nothing of packed rows: padded on the right, and masked."""

    model: Any
    catch: _Catch

    def forward(self, tokens_BT: Tensor, pos_BT: Tensor, doc_BT: Tensor) -> Tensor:
        tokens_X = tokens_BT.flatten()
        out_XD: Tensor | None = None
        for at_PL, there_PL in documents(pos_BT):
            read_PL = torch.where(there_PL, tokens_X[at_PL], 0)
            self.model(read_PL, attention_mask=there_PL.long(), use_cache=False)
            hidden_PLD = self.catch.take()
            if out_XD is None:
                out_XD = hidden_PLD.new_zeros(len(tokens_X), hidden_PLD.shape[-1])
            out_XD[at_PL[there_PL]] = hidden_PLD[there_PL]
        if out_XD is None:  # padding only
            out_XD = torch.zeros(len(tokens_X), 1, device=tokens_BT.device)
        return out_XD.view(*tokens_BT.shape, -1)


def documents(pos_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of packed rows in groups of like length, none larger than the batch: the places [P, L] in the
    flattened batch, and which of them belong to the document."""
    flat = pos_BT.flatten()
    starts_P = (flat == 0).nonzero()[:, 0]
    number_X = (flat == 0).cumsum(0) - 1
    sizes_P = torch.bincount(number_X[flat >= 0], minlength=len(starts_P))
    order = sizes_P.argsort(descending=True, stable=True)
    while len(order):
        longest = int(sizes_P[order[0]])
        take = max(1, len(flat) // longest)
        group, order = order[:take], order[take:]
        offset_L = torch.arange(longest, device=flat.device)
        there_PL = offset_L < sizes_P[group, None]
        yield torch.where(there_PL, starts_P[group, None] + offset_L, 0), there_PL
