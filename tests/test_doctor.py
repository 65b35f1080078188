"""doctor: a healthy folder passes every check; each trap, set in a folder or a backend, fires its own check alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import folder_fixtures
import pytest
import tokenizer_fixtures
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright import doctor, doctor_probes, model
from gemwright.cache import KVCache
from gemwright.config import GLOBAL, LOCAL, ModelConfig
from gemwright.doctor import Check, Subject, examine
from gemwright.ops import attention
from gemwright.ops.attention import Visibility, reference

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("doctor") / "tiny"
    return folder, folder_fixtures.gemma2(folder)


@pytest.fixture
def patient(healthy: tuple[Path, ModelConfig], tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy[0], tmp_path / "patient"))


def checks(folder: Path, due: ModelConfig | None = None, **options: Any) -> dict[str, Check]:
    """The report, with `due` as a published model."""
    published = {} if due is None else {"tiny": due}
    return {check.name: check for check in examine(Subject(folder, published=published, **options))}


def fired(report: dict[str, Check]) -> list[str]:
    return [name for name, check in report.items() if check.status == "FAIL"]


def edit_json(file: Path, **changes: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, **changes}))


def edit_weights(folder: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_healthy_folder_passes_every_check(healthy: tuple[Path, ModelConfig], dtype: str, backend: str) -> None:
    report = checks(*healthy, dtype=dtype, attention=backend)
    assert {name: check for name, check in report.items() if check.status != "ok"} == {}
    assert list(report) == list(doctor.CHECKS)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"attn_logit_softcapping": None}, "attention cap"),
        ({"attn_logit_softcapping": 30.0}, "attention cap"),
        ({"final_logit_softcapping": None}, "final cap"),
        ({"sliding_window": 9}, "window"),
        ({"layer_types": [GLOBAL, LOCAL, GLOBAL]}, "layer order"),
        ({"query_pre_attn_scalar": 16}, "query scale"),
        ({"rms_norm_eps": 1e-5}, "constants"),
        ({"rope_theta": 5000.0, "rope_parameters": None}, "constants"),
        ({"bos_token_id": 3}, "BOS"),
        ({"hidden_activation": "silu"}, "config"),
        ({"num_hidden_layers": 4, "layer_types": None}, "tensors"),
    ],
)
def test_a_mutated_config_fires_its_check(
    healthy: tuple[Path, ModelConfig], patient: Path, changes: dict[str, Any], check: str
) -> None:
    edit_json(patient / "config.json", **changes)
    assert fired(checks(patient, healthy[1])) == [check]


@pytest.mark.parametrize(
    ("size", "changes", "check"),
    [
        ("gemma-2-27b", {"query_pre_attn_scalar": 128}, "query scale"),
        ("gemma-2-9b", {"query_pre_attn_scalar": 224}, "query scale"),
        ("gemma-2-2b", {"sliding_window": 4097}, "window"),
        ("gemma-2-2b", {"attn_logit_softcapping": None}, "attention cap"),
        ("gemma-2-9b", {"final_logit_softcapping": None}, "final cap"),
        ("gemma-2-27b", {"layer_types": (GLOBAL, LOCAL) * 23}, "layer order"),
    ],
)
def test_published_shapes_have_published_constants(
    healthy: tuple[Path, ModelConfig], size: str, changes: dict[str, Any], check: str
) -> None:
    """The real sizes, by configuration alone."""
    subject = Subject(healthy[0])
    subject.config = dataclasses.replace(ModelConfig.preset(size), **changes)
    found = doctor.CHECKS[check].run(subject)
    assert found.status == "FAIL"
    assert size in found.detail or check == "layer order"


def test_an_unusual_scale_of_an_unknown_shape_is_a_warning(patient: Path) -> None:
    edit_json(patient / "config.json", query_pre_attn_scalar=13)
    report = checks(patient)
    assert fired(report) == []
    assert report["query scale"].status == "warn"
    assert "12" in report["query scale"].detail
    assert "16" in report["query scale"].detail


def test_missing_caps_of_an_unknown_shape_are_warnings(patient: Path) -> None:
    edit_json(patient / "config.json", attn_logit_softcapping=None, final_logit_softcapping=None)
    report = checks(patient)
    assert fired(report) == []
    assert {name for name, check in report.items() if check.status == "warn"} == {"attention cap", "final cap"}


def plus_one(weights: Weights) -> None:
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] += 1


def trained_plus_one(weights: Weights) -> None:
    """Gains as a trained Gemma has them, large and scattered, stored as gains."""
    for i, name in enumerate(weights):
        if name.endswith("norm.weight"):
            weights[name] = (torch.randn(48, generator=torch.Generator().manual_seed(i)) + 1.5).exp()


def untied(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.01


def missing(weights: Weights) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def infinite(weights: Weights) -> None:
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.inf


def cropped(weights: Weights) -> None:
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:, :40].contiguous()


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (plus_one, "norms"),
        (trained_plus_one, "norms"),
        (untied, "tied head"),
        (missing, "tensors"),
        (cropped, "tensors"),
        (infinite, "dtype"),
    ],
)
def test_mutated_weights_fire_their_check(patient: Path, change: Callable[[Weights], None], check: str) -> None:
    edit_weights(patient, change)
    assert fired(checks(patient)) == [check]


def test_trained_gains_and_a_repeated_head_are_healthy(patient: Path) -> None:
    """The counterparts of two traps: the same gains stored as w, and a stored head that is the embedding."""

    def change(weights: Weights) -> None:
        trained_plus_one(weights)
        for name in weights:
            if name.endswith("norm.weight"):
                weights[name] -= 1
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(patient, change)
    report = checks(patient)
    assert fired(report) == []
    assert report["tied head"].status == "ok"


def test_a_truncated_file_fails_and_the_rest_is_skipped(patient: Path) -> None:
    whole = (patient / "model.safetensors").read_bytes()
    (patient / "model.safetensors").write_bytes(whole[:-100])
    report = checks(patient)
    assert fired(report) == ["files"]
    assert report["window"].status == "skipped"
    assert report["tokenizer"].status == "ok"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"add_bos_token": False}, "BOS"),
        ({"chat_template": "{{ bos_token }}" + tokenizer_fixtures.PUBLISHED}, "BOS"),
        ({"bos_token": "<nowhere>"}, "tokenizer"),
    ],
)
def test_a_mutated_tokenizer_fires_its_check(patient: Path, changes: dict[str, Any], check: str) -> None:
    edit_json(patient / "tokenizer_config.json", **changes)
    assert fired(checks(patient)) == [check]


def test_stop_ids_without_the_end_of_a_turn(patient: Path) -> None:
    edit_json(patient / "generation_config.json", eos_token_id=1)
    report = checks(patient)
    assert fired(report) == ["stop ids"]
    assert "107" in report["stop ids"].remedy


def test_a_foreign_template_is_a_warning(patient: Path) -> None:
    template = tokenizer_fixtures.PUBLISHED.replace("start_of_turn", "unused3")
    edit_json(patient / "tokenizer_config.json", chat_template=template)
    report = checks(patient)
    assert fired(report) == []
    assert report["turn format"].status == "warn"


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    folder_fixtures.gemma2(tmp_path / "few", vocab_size=600)
    assert fired(checks(tmp_path / "few")) == ["vocabulary"]


def test_a_context_past_the_published_one_is_a_warning(healthy: tuple[Path, ModelConfig], patient: Path) -> None:
    edit_json(patient / "config.json", max_position_embeddings=512)
    assert checks(patient, healthy[1])["context"].status == "warn"


def test_fp16_is_refused_at_the_size_that_overflows_it(tmp_path: Path) -> None:
    config = folder_fixtures.gemma2(
        tmp_path / "wide", hidden_size=4608, num_hidden_layers=2, layer_types=(), intermediate_size=8
    )
    assert fired(checks(tmp_path / "wide", dtype="float16")) == ["dtype"]
    weights = {name: tensor.half() for name, tensor in folder_fixtures.weights(config)}
    save_file(weights, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    report = checks(tmp_path / "wide")
    assert fired(report) == ["dtype"]
    assert "65504" in report["dtype"].detail


def without_cap(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    return reference(q, k, v, see, scale=scale, cap=None)


def one_key_too_many(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    window = None if see.window is None else see.window + 1
    return reference(q, k, v, dataclasses.replace(see, window=window, _memo={}), scale=scale, cap=cap)


def one_key_too_few(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    window = None if see.window is None else see.window - 1
    return reference(q, k, v, dataclasses.replace(see, window=window, _memo={}), scale=scale, cap=cap)


def without_window(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    return reference(q, k, v, dataclasses.replace(see, window=None, _memo={}), scale=scale, cap=cap)


def scaled_by_head(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    return reference(q, k, v, see, scale=q.shape[-1] ** -0.5, cap=cap)


def first_key_head(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    return reference(q, k[:, :, :1], v[:, :, :1], see, scale=scale, cap=cap)


def nothing_for_padding(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    out = reference(q, k, v, see, scale=scale, cap=cap)
    return out.masked_fill((see.q_pos_BT < 0)[:, :, None, None], torch.nan)


def refuses(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *, scale: float, cap: float | None) -> Tensor:
    raise NotImplementedError("no kernel for this device")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("backend", "check"),
    [
        (without_cap, "attention cap"),
        (one_key_too_many, "window"),
        (one_key_too_few, "window"),
        (without_window, "window"),
        (scaled_by_head, "query scale"),
        (first_key_head, "attention"),
        (nothing_for_padding, "attention"),
        (refuses, "attention"),
    ],
)
def test_a_broken_backend_fires_its_check(
    healthy: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch, dtype: str, backend: Any, check: str
) -> None:
    whole = attention.BACKENDS["blocked"]
    monkeypatch.setitem(attention.BACKENDS, "blocked", dataclasses.replace(whole, load=lambda: backend))
    assert fired(checks(*healthy, dtype=dtype)) == [check]


def test_a_backend_broken_in_decoding_alone_fires_its_check(
    healthy: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.AUTO, ("cpu", "decode"), "flex")
    whole, broken = attention.BACKENDS["flex"], cast(Callable[[], attention.Attend], lambda: one_key_too_many)
    monkeypatch.setitem(attention.BACKENDS, "flex", dataclasses.replace(whole, load=broken))
    report = checks(*healthy)
    assert fired(report) == ["window"]
    assert "flex (decode)" in report["window"].detail
    assert "blocked" not in report["window"].detail


class ShortRing(KVCache):
    """A cache whose ring is one slot short."""

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataclasses.replace(config, sliding_window=config.sliding_window - 1), *args, **kwargs)


def test_a_ring_one_slot_short_fires_the_cache_check(
    healthy: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_probes, "KVCache", ShortRing)
    assert fired(checks(*healthy)) == ["cache"]


@pytest.mark.parametrize(
    ("name", "broken", "check"),
    [
        ("math", SimpleNamespace(sqrt=lambda _: 1.0), "embedding scale"),
        ("softcap", lambda logits, cap: logits, "final cap"),
    ],
)
def test_a_broken_model_fires_its_check(
    healthy: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, check: str
) -> None:
    monkeypatch.setattr(model, name, broken)
    assert fired(checks(*healthy)) == [check]


def test_what_the_folder_cannot_be(tmp_path: Path, healthy: tuple[Path, ModelConfig]) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Subject(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="layers: got 0, allowed >= 1"):
        Subject(healthy[0], layers=0)
    with pytest.raises(ValueError, match="device: got 'tpu'"):
        Subject(healthy[0], device="tpu")


def test_a_few_layers_of_a_deep_model_are_read(healthy: tuple[Path, ModelConfig]) -> None:
    config = ModelConfig.preset("gemma-2-27b")
    assert doctor_probes.choose_layers(config, 2) == (0, 1)
    late = dataclasses.replace(config, layer_types=(LOCAL,) * 40 + (GLOBAL,) * 6)
    assert doctor_probes.choose_layers(late, 3) == (0, 1, 2, 40)
    assert doctor_probes.choose_layers(healthy[1], 9) == (0, 1, 2)
