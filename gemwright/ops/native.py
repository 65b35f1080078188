"""Native kernels: C, compiled by the user's own compiler at first use and called through ctypes.

They are the fast path on processors whose matrix units torch does not serve (AVX2: a bf16 matmul is emulated there, and
every torch operation of a decode step costs microseconds of dispatch). Where there is no compiler, `library` is None
and says why in the log; the callers have plain torch paths.

The library lies in the user's cache folder under a key of its sources, flags, compiler and processor. It is linked
against the OpenMP runtime that torch has mapped already: a second one would start threads of its own beside it.

Nothing here is differentiated. Tensors are contiguous, on CPU, and all bf16 or all fp32 in one call; sums are fp32,
rounded once.
Legend: X rows (any leading dimensions), D in, F out; B rows, T queries, N query heads, K key/value heads, H head dim,
P pages in the store, s positions in a page, n pages in a row's table.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

SOURCES: Final = (
    "native.h", "native_tiles.h", "native.c", "native_amx.c", "native_attention.c", "native_flash.c", "native_loss.c",
    "native_pass.c", "native_scores.c",
)  # fmt: skip
FLAGS: Final = ("-std=gnu11", "-O3", "-march=native", "-fno-trapping-math", "-fPIC", "-fopenmp")
"""`-fno-trapping-math` lets the compiler vectorise loops that choose; it changes no result."""
COMPILE_SECONDS: Final = 300

log = logging.getLogger(__name__)


class NativeUnavailable(RuntimeError):
    """There is no native library here; the message says why."""


class _PagedAttention(ctypes.Structure):
    """The struct of the same name in native_attention.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "table", "first", "q_pos")),
        *((name, c_int64) for name in ("B", "T", "N", "K", "H", "pages", "page", "width", "window")),
        *((name, c_float) for name in ("scale", "cap")),
        *((name, c_int32) for name in ("bf16", "threads")),
    )


_ARGUMENTS: Final = {
    "linear": [*[c_void_p] * 3, *[c_int64] * 3, c_int, c_int],
    "norm": [*[c_void_p] * 3, *[c_int64] * 2, c_float, c_int, c_int],
    "rotate": [*[c_void_p] * 4, *[c_int64] * 3, c_int, c_int],
    "softcap": [*[c_void_p] * 2, c_int64, c_float, c_int],
    "gated_gelu": [*[c_void_p] * 3, c_int64, c_int, c_int],
    "noisy_ids": [*[c_void_p] * 4, *[c_int64] * 3, c_int],
    "logits_of": [*[c_void_p] * 2, c_int64, *[c_float] * 2, c_int],
    "logits_read": [*[c_void_p] * 3, *[c_int64] * 3, *[c_float] * 2, c_int, c_int],
    "logits_entropy": [*[c_void_p] * 2, *[c_int64] * 2, c_int, c_int],
    "logits_gradient": [*[c_void_p] * 5, *[c_int64] * 3, c_int, c_int],
    "divergence_compare": [*[c_void_p] * 4, *[c_int64] * 2, c_int, c_float, c_int, c_int],
    "divergence_gradient": [*[c_void_p] * 4, *[c_int64] * 2, c_int, c_float, c_int, c_int],
    "scores": [c_void_p],
    "nf4": [*[c_void_p] * 4, c_int64, c_int, c_int],
    "paged_attention": [ctypes.POINTER(_PagedAttention)],
    "model_pass": [c_void_p],
    "ask_for_tiles": [],
    "tiles_allowed": [],
    "flash_attention": [c_void_p],
}
_ANSWERS: Final = ("paged_attention", "model_pass", "ask_for_tiles", "tiles_allowed", "flash_attention")
"""Functions that return a number; the others return nothing."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None with the reason in the log; asked once a process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemwright"
    try:
        loaded = ctypes.CDLL(str(build(cache)))
    except (NativeUnavailable, OSError, subprocess.TimeoutExpired) as reason:
        log.warning("native kernels are not used, torch computes instead: %s", reason)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int if name in _ANSWERS else None
    log.info("native kernels: %s%s", loaded._name, ", with matrix tiles" if loaded.ask_for_tiles() else "")
    return loaded


def build(folder: Path) -> Path:
    """The shared library in `folder`, compiled now unless this source was already compiled there for this processor.

    It appears by one atomic rename, so processes that build at once do not meet. Raises NativeUnavailable.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NativeUnavailable("no C compiler (gcc or cc) is in PATH")
    here, processor, openmp = Path(__file__).parent, _processor(), _openmp()
    facts = [platform.machine(), processor, _run(compiler, "--version"), openmp, *FLAGS]
    key = hashlib.sha256("\n".join([*facts, *((here / name).read_text() for name in SOURCES)]).encode()).hexdigest()
    target = folder / f"native-{key[:12]}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        sources = [str(here / name) for name in SOURCES if name.endswith(".c")]
        with tempfile.TemporaryDirectory(prefix=".native-", dir=folder) as scratch:
            objects = [f"{scratch}/{Path(name).stem}.o" for name in sources]
            for source, made in zip(sources, objects, strict=True):
                _run(compiler, *FLAGS, "-c", source, "-o", made)
            _run(compiler, "-shared", *objects, openmp, "-lm", "-o", f"{scratch}/native.so")
            Path(f"{scratch}/native.so").replace(target)
    return target


def _run(*command: str) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=COMPILE_SECONDS
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise NativeUnavailable(f"{command[0]}: {said}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: the instruction sets that the kernel names."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        raise NativeUnavailable(f"made for Linux so far, this is {platform.system()}")
    lines = file.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _openmp() -> str:
    """The file of the OpenMP runtime that torch calls; other packages may have mapped their own beside it."""
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if not hasattr(torch_cpu, "omp_get_max_threads"):
        raise NativeUnavailable("this torch is built without OpenMP")
    address = ctypes.cast(torch_cpu.omp_get_max_threads, c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return file
    raise NativeUnavailable("the file of torch's OpenMP runtime is not mapped")


def has_tiles() -> bool:
    """Whether products of bf16 rows run on the processor's matrix tiles (AMX)."""
    loaded = library()
    return loaded is not None and bool(loaded.tiles_allowed())


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel may stand in for plain torch: plain tensors on CPU, one known dtype, no gradient, no tracing."""
    dtype = tensors[0].dtype
    return (
        not torch.is_grad_enabled()
        and dtype in (torch.bfloat16, torch.float32)
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def kernels() -> ctypes.CDLL:
    """The library, where `serves` said that it is there."""
    loaded = library()
    assert loaded is not None, "native kernels were called where library() is None"
    return loaded


def _check(*tensors: Tensor) -> bool:
    """Whether these tensors, which share a dtype that the kernels know and lie as they expect, are bf16."""
    dtype = tensors[0].dtype
    assert dtype in (torch.bfloat16, torch.float32), dtype
    for tensor in tensors:
        assert tensor.dtype is dtype and tensor.is_contiguous() and tensor.is_cpu, (tensor.dtype, tensor.stride())
    return dtype is torch.bfloat16


def linear(x_XD: Tensor, weight_FD: Tensor) -> Tensor:
    """x W^T, [..., F], in the dtype of both. Made for up to about a hundred rows; right for any number."""
    F, D = weight_FD.shape
    assert x_XD.shape[-1] == D, (x_XD.shape, weight_FD.shape)
    x_XD = x_XD.contiguous()
    bf16 = _check(x_XD, weight_FD)
    y_XF = x_XD.new_empty((*x_XD.shape[:-1], F))
    kernels().linear(
        x_XD.data_ptr(), weight_FD.data_ptr(), y_XF.data_ptr(), x_XD.numel() // D, F, D, bf16, torch.get_num_threads()
    )
    return y_XF


def norm(x_XD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm with gain 1 + weight."""
    x_XD = x_XD.contiguous()
    D = x_XD.shape[-1]
    assert weight_D.shape == (D,), (x_XD.shape, weight_D.shape)
    bf16 = _check(x_XD, weight_D)
    y_XD = torch.empty_like(x_XD)
    kernels().norm(
        x_XD.data_ptr(), weight_D.data_ptr(), y_XD.data_ptr(), x_XD.numel() // D, D, eps, bf16, torch.get_num_threads()
    )
    return y_XD


def rotate(x_BTNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """What ops.rope.rotate computes: rotary positions, half-split, with fp32 tables [B, T, 1, H]."""
    x_BTNH = x_BTNH.contiguous()
    B, T, N, H = x_BTNH.shape
    cos, sin = tables
    assert not _check(cos, sin), "rotary tables are fp32"
    assert cos.shape == sin.shape == (B, T, 1, H) and H % 2 == 0, (cos.shape, sin.shape, x_BTNH.shape)
    y_BTNH = torch.empty_like(x_BTNH)
    kernels().rotate(
        x_BTNH.data_ptr(), cos.data_ptr(), sin.data_ptr(), y_BTNH.data_ptr(), B * T, N, H, _check(x_BTNH),
        torch.get_num_threads(),
    )  # fmt: skip
    return y_BTNH


def gated_gelu(gate_XF: Tensor, up_XF: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh form of GELU."""
    assert gate_XF.shape == up_XF.shape, (gate_XF.shape, up_XF.shape)
    bf16 = _check(gate_XF, up_XF)
    y_XF = torch.empty_like(gate_XF)
    kernels().gated_gelu(
        gate_XF.data_ptr(), up_XF.data_ptr(), y_XF.data_ptr(), y_XF.numel(), bf16, torch.get_num_threads()
    )
    return y_XF


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) of fp32 numbers in any shape."""
    x = x.contiguous()
    assert not _check(x) and cap > 0, (x.dtype, cap)
    y = torch.empty_like(x)
    kernels().softcap(x.data_ptr(), y.data_ptr(), x.numel(), cap, torch.get_num_threads())
    return y


def nf4(packed_P: Tensor, levels: Tensor, scales_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of blocks of 64, flat: levels[code] * scale rounded to `dtype`; two codes a byte, the upper one first."""
    assert packed_P.dtype is torch.uint8 and packed_P.is_contiguous() and packed_P.is_cpu, packed_P.stride()
    assert len(packed_P) == 32 * len(scales_b) and levels.shape == (16,), (packed_P.shape, scales_b.shape, levels.shape)
    assert not _check(levels, scales_b), "levels and scales are fp32"
    weight_n = torch.empty(64 * len(scales_b), dtype=dtype)
    kernels().nf4(
        packed_P.data_ptr(), levels.data_ptr(), scales_b.data_ptr(), weight_n.data_ptr(), len(scales_b),
        _check(weight_n), torch.get_num_threads(),
    )  # fmt: skip
    return weight_n


def check_paged(
    q_BTNH: Tensor, k_PKsH: Tensor, v_PKsH: Tensor, table_Bn: Tensor, first_B: Tensor, q_pos_BT: Tensor
) -> None:
    """Assert that what an attention over pages is given fits together, on whatever device."""
    B, T, N, H = q_BTNH.shape
    P, K, s, _ = k_PKsH.shape
    n = table_Bn.shape[1]
    assert k_PKsH.shape == v_PKsH.shape == (P, K, s, H) and N % K == 0, (q_BTNH.shape, k_PKsH.shape, v_PKsH.shape)
    assert table_Bn.shape == (B, n) and first_B.shape == (B,) and q_pos_BT.shape == (B, T), (B, T, table_Bn.shape)
    for index in (table_Bn, first_B, q_pos_BT):
        assert index.dtype == torch.int32 and index.is_contiguous(), (index.dtype, index.stride())


def noisy_ids(key_X: Tensor, least_X: Tensor, vocab: int, room: int) -> tuple[Tensor, Tensor]:
    """The ids below `vocab` whose noise bits (`ops.draw`) reach `least`, [X, room], and how many there are, [X].

    Where a row has fewer its other places are undefined; where it has more the first ones are there. int64 on CPU.
    """
    X = len(key_X)
    assert key_X.dtype == least_X.dtype == torch.int64 and key_X.is_contiguous() and least_X.is_contiguous()
    ids_Xr, counts_X = torch.empty(X, room, dtype=torch.int64), torch.empty(X, dtype=torch.int64)
    pointers = (t.data_ptr() for t in (key_X, least_X, ids_Xr, counts_X))
    kernels().noisy_ids(*pointers, X, vocab, room, torch.get_num_threads())
    return ids_Xr, counts_X


def paged_attention(
    q_BTNH: Tensor,
    k_PKsH: Tensor,
    v_PKsH: Tensor,
    table_Bn: Tensor,
    first_B: Tensor,
    q_pos_BT: Tensor,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Attention over keys in pages, [B, T, N, H] in the dtype of q, k and v.

    Args:
        k_PKsH, v_PKsH: the stores; position p of a row is offset p % s of page table[p // s - first].
        table_Bn, first_B, q_pos_BT: int32. Entries of the table that hold no visible position are not read. A query
            with position -1 is padding and yields 0.
        window: a key is visible up to window - 1 positions back; None: any distance.
        cap: of the scaled scores; None: none.
    Raises:
        AssertionError: tensors do not fit each other, or a visible page is not in its table or not in the store.
    """
    B, T, N, H = q_BTNH.shape
    P, K, s, _ = k_PKsH.shape
    n = table_Bn.shape[1]
    check_paged(q_BTNH, k_PKsH, v_PKsH, table_Bn, first_B, q_pos_BT)
    assert (window is None or window > 0) and (cap is None or cap > 0), (window, cap)
    q_BTNH = q_BTNH.contiguous()
    bf16 = _check(q_BTNH, k_PKsH, v_PKsH)
    out_BTNH = torch.empty_like(q_BTNH)
    call = _PagedAttention(
        q_BTNH.data_ptr(), k_PKsH.data_ptr(), v_PKsH.data_ptr(), out_BTNH.data_ptr(),
        table_Bn.data_ptr(), first_B.data_ptr(), q_pos_BT.data_ptr(),
        B, T, N, K, H, P, s, n, window or 0, scale, cap or 0.0, bf16, torch.get_num_threads(),
    )  # fmt: skip
    missing = kernels().paged_attention(call)
    assert missing == 0, f"a visible page is not in its table of {n}, or not among the {P} of the store"
    return out_BTNH
