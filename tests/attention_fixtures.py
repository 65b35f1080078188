"""Cases of attention, the rule and the plain computation that backends are compared with.

A backend may be as wrong as the plain computation in the same dtype (what transformers' eager path does) and no more.
Truth and the plain computation build their mask here, token by token from the rule, not from `Visibility`.

Legend: B rows, T queries, S keys, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gemwright.ops.attention import EMPTY, PADDING, Attend, Visibility

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SLACK = {FP32: 2e-6, BF16: 2**-7, FP16: 2**-10}
"""Above the plain computation's own error: in bf16 two roundings of 2^-8, of the weights and of the output."""


@dataclass(frozen=True)
class Case:
    """One shape: who sees whom, as positions and documents, and what the scores go through."""

    name: str
    T: int
    S: int
    rows: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    cap: float | None = 50.0
    scale: float = 12**-0.5
    layout: str = "causal"

    def see(self, device: str = "cpu") -> Visibility:
        """Positions in the layout's way; keys end where the queries do."""
        k_pos = torch.arange(self.S).repeat(self.rows, 1)
        q_pos = k_pos[:, self.S - self.T :].clone()
        q_doc = k_doc = None
        if self.layout == "left_padding":  # each row has one token less
            for row in range(self.rows):
                q_pos[row], k_pos[row] = q_pos[row] - 3 * row, k_pos[row] - 3 * row
            q_pos, k_pos = q_pos.clamp(min=PADDING), k_pos.clamp(min=PADDING)
        elif self.layout == "right_padding":
            for row in range(self.rows):
                if cut := min(3 * row, self.T - 1):
                    q_pos[row, self.T - cut :] = PADDING
                    k_pos[row, self.S - cut :] = PADDING
        elif self.layout == "ring":  # keys in the order of a wrapped ring, some slots empty, rows at other places
            for row in range(self.rows):
                k_pos[row] = k_pos[row].roll(7 + 5 * row)
                k_pos[row][k_pos[row] < 2 * row] = EMPTY
        elif self.layout == "documents":
            lengths = torch.tensor([self.S // 3, 1, self.S - self.S // 3 - 1])
            k_doc = torch.arange(3).repeat_interleave(lengths).repeat(self.rows, 1)
            k_pos = torch.cat([torch.arange(int(n)) for n in lengths]).repeat(self.rows, 1)
            k_pos[-1, -2:], k_doc[-1, -2:] = PADDING, 0
            q_doc, q_pos = k_doc[:, self.S - self.T :], k_pos[:, self.S - self.T :]
        elif self.layout == "blind":  # half of the rows and the first query of the others see nothing at all
            k_pos[0] = EMPTY
            k_pos[1:, 0] = PADDING
            q_pos[1:, 0] = 0
        moved = [None if x is None else x.to(device) for x in (q_pos, k_pos, q_doc, k_doc)]
        assert moved[0] is not None
        assert moved[1] is not None
        return Visibility(moved[0], moved[1], moved[2], moved[3], window=self.window)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys whose scores pass the cap, in the strides of the model (q) and of the cache (k, v)."""
        generator = torch.Generator().manual_seed(len(self.name))
        B, K, H = self.rows, self.kv_heads, self.head_dim
        q = 4 * torch.randn(B, self.T, self.heads, H, generator=generator)
        k = 4 * torch.randn(B, K, self.S, H, generator=generator)
        v = torch.randn(B, K, self.S, H, generator=generator)
        q, k, v = (x.to(device, dtype) for x in (q, k, v))
        return q, k.transpose(1, 2), v.transpose(1, 2)


CASES = [
    Case("one token alone", 1, 1),
    Case("one query", 1, 40, window=8),
    Case("seven queries at the end", 7, 40, window=8),
    Case("whole sequence", 40, 40),
    Case("window of 1", 40, 40, window=1),
    Case("window of 3", 40, 40, window=3),
    Case("window of T", 40, 40, window=40),
    Case("window past T", 40, 40, window=1000),
    Case("past one block", 130, 130, rows=1, window=33),
    Case("past one block, global", 130, 130),
    Case("no cap", 40, 40, window=8, cap=None),
    Case("cap past the safe one", 40, 40, window=8, cap=200.0),
    Case("tight cap, other scale", 40, 40, cap=5.0, scale=0.3),
    Case("one key head", 40, 40, kv_heads=1, window=8),
    Case("as many key heads", 40, 40, kv_heads=4, window=8),
    Case("odd heads", 40, 40, heads=6, kv_heads=2, head_dim=10, rows=3),
    Case("left padding", 40, 40, rows=3, window=8, layout="left_padding"),
    Case("left padding, global", 40, 40, rows=3, layout="left_padding"),
    Case("right padding", 130, 130, rows=3, window=20, layout="right_padding"),
    Case("documents", 130, 130, window=20, layout="documents"),
    Case("documents, global", 40, 40, layout="documents"),
    Case("wrapped ring", 7, 40, rows=3, window=30, layout="ring"),
    Case("wrapped ring, one query", 1, 15, rows=3, window=15, layout="ring"),
    Case("blind rows", 7, 7, layout="blind"),
    Case("blind rows, no cap", 7, 7, layout="blind", cap=None, window=3),
]
IDS = [case.name for case in CASES]


@cache
def rule(case: Case) -> Tensor:
    """The mask [B, T, S] of a case by the rule, one pair at a time."""
    see = case.see()
    q_pos, k_pos = see.q_pos_BT.tolist(), see.k_pos_BS.tolist()
    q_doc, k_doc = (None if x is None else x.tolist() for x in (see.q_doc_BT, see.k_doc_BS))

    def visible(b: int, t: int, s: int) -> bool:
        q, k = q_pos[b][t], k_pos[b][s]
        near = see.window is None or q - k < see.window
        same = q_doc is None or k_doc is None or q_doc[b][t] == k_doc[b][s]
        return bool(q >= 0 and 0 <= k <= q and near and same)

    return torch.tensor([[[visible(b, t, s) for s in range(case.S)] for t in range(case.T)] for b in range(case.rows)])


def plain(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """Attention as transformers' eager path has it, every step in the dtype of q but the softmax in at least fp32."""
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * case.scale
    if case.cap is not None:
        scores = torch.tanh(scores / case.cap) * case.cap
    scores = scores.masked_fill(~rule(case).to(q.device)[:, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, FP32)).nan_to_num(0.0).to(q.dtype)
    return torch.einsum("bnts,bsnh->btnh", weights, v)


def error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest magnitude of the truth."""
    assert got.isfinite().all()
    return float((got.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def check_output(attend: Attend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The output is as near to the truth as the plain computation's, and 0 where nothing is seen."""
    q, k, v = case.inputs(dtype, device)
    truth = plain(q.double(), k.double(), v.double(), case)
    got = attend(q, k, v, case.see(device), scale=case.scale, cap=case.cap)
    assert got.dtype == dtype
    assert error(got, truth) <= error(plain(q, k, v, case), truth) + SLACK[dtype], case.name
    assert not got[~rule(case).any(-1)].any(), case.name


def check_gradients(attend: Attend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradients of q, k and v are as near to the truth's as the plain computation's."""
    leaves = [x.detach().requires_grad_() for x in case.inputs(dtype, device)]
    upstream = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)

    def gradients(f: Callable[[Tensor, Tensor, Tensor], Tensor], to: torch.dtype = dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(to).requires_grad_() for x in leaves)
        return list(torch.autograd.grad(f(q, k, v), (q, k, v), upstream.to(to)))

    see = case.see(device)
    truth = gradients(lambda q, k, v: plain(q, k, v, case), torch.float64)
    own = gradients(lambda q, k, v: plain(q, k, v, case).nan_to_num(0.0))
    got = gradients(lambda q, k, v: attend(q, k, v, see, scale=case.scale, cap=case.cap))
    largest = max(float(t.abs().max()) for t in truth)  # with one key, the gradients of q and k are 0
    for which, g, o, t in zip("qkv", got, own, truth, strict=True):
        assert g.dtype == dtype
        assert g.isfinite().all()
        allowed = float((o.nan_to_num(0.0).double() - t).abs().max()) + 4 * SLACK[dtype] * largest
        assert float((g.double() - t).abs().max()) <= allowed, (case.name, which)
