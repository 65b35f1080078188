"""Adapter files: PEFT's `adapter_config.json` and `adapter_model.safetensors`, read into an Adapter.

The config says rank and scale, the tensors `base_model.model.NAME.lora_A.weight` which linears are adapted
(https://huggingface.co/docs/peft/developer_guides/checkpoint). A field that asks for arithmetic that `lora.py` does not
have is refused by its name; so is one that is not known, since it may.

Legend: D in, F out, r rank.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from gemwright.config import ModelConfig
from gemwright.weights import CheckpointError, read_header, read_json

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR: Final = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PRESETS: Final = {"attention": ATTENTION, "all-linear": ALL_LINEAR}
TIED: Final = "head and embedding are one matrix: an update of either unties them and is lost when it is merged"

_FREE: Final = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_ga_config megatron_config megatron_core peft_version
    qalora_group_size revision runtime_config task_type""".split()
)
"""Fields of PEFT that change no arithmetic once the factors exist; which linears are adapted, the tensors say."""
_READ: Final = frozenset("r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules".split())
_REASONS: Final = {
    "modules_to_save": f"whole modules are not replaced ({TIED})",
    "use_dora": "DoRA's magnitudes are not computed",
    "bias": "Gemma 2 has no biases",
    "lora_bias": "Gemma 2 has no biases",
    "trainable_token_indices": TIED,
}
_INITS: Final = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are; pissa, olora, corda and loftq subtract from them."""


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) where ranks are stabilised (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _is_named(name: str, target: str) -> bool:
    """Whether a target, as PEFT reads it, names this linear: the whole name, or the end of it from a dot on."""
    return name == target or name.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linears get an update, and of what rank and scale."""

    rank: int = 16
    alpha: float = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the update's input that training drops."""
    targets: str | Sequence[str] = "all-linear"
    """`attention` (q, k, v, o), `all-linear`, or names as PEFT's target_modules: `q_proj`, `layers.0.mlp.up_proj`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks by the name or the end of the name of a linear; the first that fits counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, in the same way."""

    def __post_init__(self) -> None:
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key in patterns:
                _need(re.fullmatch(r"[\w.]+", key) is not None, name, key, "names of linears, not regular expressions")
        for rank in (self.rank, *self.rank_pattern.values()):
            _need(type(rank) is int and rank > 0, "rank", rank, "a positive integer")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            _need(number and 0 < alpha < math.inf, "alpha", alpha, "a positive number")
        _need(isinstance(self.dropout, int | float) and 0 <= self.dropout < 1, "dropout", self.dropout, "0 <= p < 1")
        preset = isinstance(self.targets, str)
        listed = not preset and len(self.targets) > 0 and all(isinstance(t, str) for t in self.targets)
        allowed = f"{', '.join(PRESETS)} or a list of names"
        _need(listed or (preset and self.targets in PRESETS), "targets", self.targets, allowed)

    def rank_of(self, name: str) -> int:
        """Rank of a linear's update."""
        return next((rank for key, rank in self.rank_pattern.items() if _is_named(name, key)), self.rank)

    def alpha_of(self, name: str) -> float:
        """Alpha of a linear's update."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if _is_named(name, key)), self.alpha)

    def scale_of(self, name: str) -> float:
        """Factor s of a linear's update."""
        return lora_scale(self.rank_of(name), self.alpha_of(name), self.use_rslora)

    def select(self, linears: Iterable[str]) -> list[str]:
        """Those of a model's linears that are targets, in its order; ValueError for a target that names none."""
        names = list(linears)
        targets = PRESETS[self.targets] if isinstance(self.targets, str) else self.targets
        for target in targets:
            _refuse_tied(target)
            _need(any(_is_named(n, target) for n in names), "targets", target, f"{', '.join(ALL_LINEAR)}, a whole name")
        return [name for name in names if any(_is_named(name, target) for target in targets)]


def _need(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got!r}, allowed is {allowed}")


def _refuse_tied(target: str) -> None:
    if target.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        raise ValueError(f"targets: got {target!r}; {TIED}")


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every linear that may be adapted, by name: its weight's [out, in]."""
    shapes = config.parameter_shapes().items()
    return {name.removesuffix(".weight"): shape for name, shape in shapes if name.endswith("_proj.weight")}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read from its folder."""

    folder: Path
    config: LoraConfig
    """Its targets are the names of the adapted linears."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """A [r, in] and B [out, r] by the name of the linear, in the stored dtype."""
    declared: tuple[str, ...] = ()
    """The target_modules that every linear they name must have factors for; empty where the file picks layers."""

    def check(self, config: ModelConfig) -> None:
        """Raise one CheckpointError that names every linear this model lacks, misshapen ones and missing ones."""
        shapes = linear_shapes(config)
        faults = []
        for name, (a_rD, b_Fr) in self.factors.items():
            got = (b_Fr.shape[0], a_rD.shape[1])
            if name not in shapes:
                faults.append(f"the model has no linear {name}")
            elif got != shapes[name]:
                faults.append(
                    f"{name} is for a linear of {got[1]} x {got[0]}, due {shapes[name][1]} x {shapes[name][0]}"
                )
        for name in shapes.keys() - self.factors.keys():
            if any(_is_named(name, target) for target in self.declared):
                faults.append(f"target_modules names {name}, which has no factors")
        if faults:
            raise CheckpointError(f"{self.folder}: the adapter does not fit the model: {'; '.join(sorted(faults))}")


def load_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT folder.

    Raises FileNotFoundError where there is none, CheckpointError for damaged files and for arithmetic that
    `lora.py` does not have (DoRA, modules_to_save, biases, head and embedding ...), with the field and the reason.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / ADAPTER_WEIGHTS
    if not os.path.lexists(path):
        pickled = (folder / "adapter_model.bin").exists()
        reason = (
            "only adapter_model.bin, a pickle, which can run code; save it as safetensors" if pickled else "missing"
        )
        raise CheckpointError(f"{path}: {reason}")
    raw = read_json(folder / ADAPTER_CONFIG)
    try:
        _refuse_fields(raw)
        factors = _read_factors(path)
        config = LoraConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout") or 0.0,
            targets=tuple(factors),
            use_rslora=raw.get("use_rslora") is True,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
        for name, (a_rD, b_Fr) in factors.items():
            if not len(a_rD) == b_Fr.shape[1] == config.rank_of(name):
                got, due = (tuple(a_rD.shape), tuple(b_Fr.shape)), config.rank_of(name)
                raise ValueError(f"{name}: lora_A {got[0]} and lora_B {got[1]}, due is rank {due}")
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    targets, picks = raw.get("target_modules"), any(raw.get(k) for k in ("layers_to_transform", "exclude_modules"))
    declared = () if picks or not isinstance(targets, list) else tuple(targets)
    return Adapter(folder, config, factors, declared)


def _refuse_fields(raw: Mapping[str, Any]) -> None:
    """Raise for every field that asks for arithmetic that is not here; one that PEFT adds later counts as such."""
    _need(raw.get("peft_type") == "LORA", "peft_type", raw.get("peft_type"), "'LORA'")
    init = raw.get("init_lora_weights")
    _need(init in _INITS, "init_lora_weights", init, "one that keeps the base weights; convert it to plain LoRA")
    targets = raw.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        _refuse_tied(target)
    for name, kind in (("use_rslora", bool), ("rank_pattern", dict), ("alpha_pattern", dict)):
        _need(isinstance(raw.get(name), kind | None), name, raw.get(name), f"{kind.__name__} or null")
    for name in raw.keys() - _FREE - _READ - {"peft_type", "init_lora_weights"}:
        if raw[name] not in (None, False, "none", [], {}):
            reason = _REASONS.get(name, "this field may change the arithmetic")
            raise ValueError(f"{name}: got {raw[name]!r}, allowed is none; {reason}")


def _read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of their linear."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, entry in read_header(path).items():
        match = re.fullmatch(r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight", key)
        if match is None or len(entry.shape) != 2:
            raise ValueError(f"{path.name}: {key!r} {entry.shape} is no factor of a linear")
        _refuse_tied(match[1])
        tensor = entry.map().clone()  # mapped, hundreds of small tensors would each hold a file descriptor
        if not tensor.isfinite().all():  # else every answer would be noise, with no error
            raise ValueError(f"{path.name}: {key!r} holds infinities or NaN")
        sides.setdefault(match[1], {})[match[2]] = tensor
    if alone := sorted(name for name, pair in sides.items() if len(pair) < 2):
        raise ValueError(f"{path.name}: only one of lora_A and lora_B for {', '.join(alone)}")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}
