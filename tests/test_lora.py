"""LoRA: PEFT is the oracle of files and arithmetic, both ways; adapters chosen per row equal each one applied alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import ENTRIES, TOLERANCE, debug, distance, forward, oracle, oracle_logits, ours, positions, tokens, weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gemwright.checkpoint import Checkpoint, CheckpointError, write
from gemwright.loader import load_model
from gemwright.lora import (
    AdapterSlots,
    LoraConfig,
    LoRALinear,
    add_lora,
    fuse,
    fuse_checkpoint,
    load_adapter,
    save_adapter,
)
from gemwright.model import Gemma2

CONFIG = debug()
BASE = weights(CONFIG)
CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL = "model.layers.1.mlp.up_proj"
"""What PEFT is asked for; every rank, alpha and target set differs."""
PEFT_CASES: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "lora_dropout": 0.3},
    "rslora": {"r": 5, "lora_alpha": 4, "target_modules": ["down_proj", "q_proj"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["v_proj", "up_proj"],
        "rank_pattern": {FULL: 6, "layers.1.self_attn.v_proj": 5, "v_proj": 1},  # the first that fits counts
        "alpha_pattern": {"layers.2.mlp.up_proj": 7, "layers.0.self_attn.v_proj": 9, "self_attn.v_proj": 2},
    },
    "some_layers": {"r": 4, "lora_alpha": 4, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "lora_alpha": 4, "target_modules": r".*layers\.[02]\.self_attn\.(q|o)_proj"},
}


def plain() -> Gemma2:
    return ours(CONFIG, BASE)


def theirs(folder: Path, case: str) -> tuple[Path, Any]:
    """A PEFT model over the oracle with random factors, and the folder that it wrote."""
    torch.manual_seed(len(case))
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])
    model = peft.get_peft_model(oracle(CONFIG, BASE), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(str(folder / case))
    return folder / case, model


def mine(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A folder that we wrote, with random factors."""
    torch.manual_seed(seed)
    model = plain()
    for name in add_lora(model, LoraConfig(**config)):
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.3)  # type: ignore[arg-type]
    return save_adapter(model, folder)


def adapted(folder: Path) -> Gemma2:
    """A model with one adapter applied."""
    model = plain()
    add_lora(model, load_adapter(folder))
    return model.eval()


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def retensor(folder: Path, change: Mapping[str, Tensor | None]) -> None:
    """Replace or (None) drop tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | {name: t for name, t in change.items() if t is not None}
    save_file({name: t.contiguous() for name, t in tensors.items() if change.get(name, t) is not None}, path)


# --- training and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PEFT_CASES)
def test_reads_what_peft_wrote(case: str, tmp_path: Path) -> None:
    """Applied, chosen per row and fused into a checkpoint: each equals PEFT over transformers."""
    folder, model = theirs(tmp_path, case)
    text = tokens(CONFIG, 2, 20)
    want = oracle_logits(model, text)
    assert distance(oracle_logits(oracle(CONFIG, BASE), text), want) > 100 * TOLERANCE
    assert distance(forward(adapted(folder), text), want) < TOLERANCE
    served = plain()
    slots = AdapterSlots(served)
    slots.load("a", folder)
    slots.select(["a", "a"])
    assert distance(forward(served, text), want) < TOLERANCE
    write(tmp_path / "base", BASE.items(), config=CONFIG.to_hf(), generation_config={"eos_token_id": [1]})
    fused = fuse_checkpoint(tmp_path / "base", folder, tmp_path / "fused")
    assert distance(forward(load_model(fused, device=CPU, pack=False), text), want) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=6, targets="attention"),
        LoraConfig(rank=3, alpha=2, use_rslora=True),
        LoraConfig(rank=2, alpha=2.5, targets=["q_proj", "layers.1.mlp.down_proj"]),
        LoraConfig(rank=2, alpha=4, targets=ALL, rank_pattern={"k_proj": 5}, alpha_pattern={FULL: 16}, dropout=0.1),
    ],
    ids=lambda config: f"{config.targets}-{config.use_rslora}",
)
def test_peft_reads_what_we_wrote(config: LoraConfig, tmp_path: Path) -> None:
    model, text = plain(), tokens(CONFIG, 2, 20)
    names = add_lora(model, config)
    for name in names:
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.2)  # type: ignore[arg-type]
    folder = save_adapter(model.eval(), tmp_path / "a", base_model="some/base")
    got = forward(model, text)
    other = peft.PeftModel.from_pretrained(oracle(CONFIG, BASE), folder).eval()
    assert distance(got, oracle_logits(other, text)) < TOLERANCE
    assert distance(got, forward(plain(), text)) > 100 * TOLERANCE
    assert other.peft_config["default"].base_model_name_or_path == "some/base"
    assert other.peft_config["default"].lora_dropout == config.dropout
    again = adapted(folder)
    for name in names:  # save -> load is bitwise
        a, b = again.get_submodule(name), model.get_submodule(name)
        assert isinstance(a, LoRALinear)
        assert isinstance(b, LoRALinear)
        assert torch.equal(a.lora_A, b.lora_A)
        assert torch.equal(a.lora_B, b.lora_B)
        assert a.scale == b.scale
    with pytest.raises(FileExistsError):
        save_adapter(model, folder)


def test_a_fresh_adapter_is_the_identity() -> None:
    model, text = plain(), tokens(CONFIG, 2, 12)
    want = forward(model, text)
    names = add_lora(model, LoraConfig(rank=3, alpha=6))
    assert len(names) == 7 * CONFIG.num_hidden_layers
    assert torch.equal(forward(model, text), want)


def test_fuse_rounds_once() -> None:
    """bf16 factors: product and sum are exact to fp32, and the weight is the nearest bf16 to W + s B A."""
    weight, a, b = (torch.randn(shape).bfloat16() for shape in ((40, 30), (4, 30), (40, 4)))
    fused = fuse(weight, a, b, scale=0.5)
    assert fused.dtype == torch.bfloat16
    assert torch.equal(fused, (weight.double() + 0.5 * b.double() @ a.double()).bfloat16())
    assert not torch.equal(fused, weight + 0.5 * (b @ a))  # two roundings more


def test_fused_checkpoint_changes_the_targets_alone(tmp_path: Path) -> None:
    """bf16: targets are rounded once from fp32; every other tensor and both configs stay as they are."""
    write(
        tmp_path / "base",
        ((name, t.bfloat16()) for name, t in BASE.items()),
        config=CONFIG.to_hf(),
        generation_config={"eos_token_id": [1, 107]},
    )
    adapter = mine(tmp_path / "a", rank=3, alpha=5, targets=["o_proj"])
    base, fused = Checkpoint(tmp_path / "base"), Checkpoint(fuse_checkpoint(tmp_path / "base", adapter, tmp_path / "f"))
    assert (fused.config, fused.generation_config) == (base.config, base.generation_config)
    assert fused.names() == base.names()
    factors = load_adapter(adapter).factors
    for name in base.names():
        want = base.tensor(name)
        if name.endswith("o_proj.weight"):
            a, b = factors[name.removesuffix(".weight")]
            want = (want.double() + 5 / 3 * b.double() @ a.double()).bfloat16()
            assert not torch.equal(base.tensor(name), want)
        assert torch.equal(fused.tensor(name), want), name
    with pytest.raises(FileExistsError):
        fuse_checkpoint(tmp_path / "base", adapter, tmp_path / "f")


def test_only_the_adapter_learns() -> None:
    model = plain().requires_grad_()
    add_lora(model, LoraConfig(rank=3, targets=["q_proj"]))
    hidden = model(tokens(CONFIG, 1, 9), positions(1, 9))
    linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(linears) == CONFIG.num_hidden_layers
    for layer in linears:
        assert not any(p.requires_grad for p in layer.base.parameters())
        grad_a, grad_b = torch.autograd.grad(hidden.square().sum(), [layer.lora_A, layer.lora_B], retain_graph=True)
        assert not grad_a.any()  # B is 0, so A has no gradient yet
        assert grad_b.any()


def test_factors_are_fp32_and_a_bf16_update_is_as_exact_as_bf16() -> None:
    base = nn.Linear(64, 40, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(base, 8, alpha=4)
    nn.init.normal_(layer.lora_B)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
    x = torch.randn(5, 64).bfloat16()
    update = 0.5 * x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    error = layer(x).double() - (base(x).double() + update)
    assert (error.abs() <= 2**-8 * base(x).abs() + 2**-6 * update.abs().mean() + 2**-7 * update.abs()).all()
    exact = LoRALinear(base.float(), 8, alpha=4)
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(exact(x.float()).double(), base(x.float()).double() + update, rtol=1e-5, atol=1e-5)
    wide = LoRALinear(nn.Linear(4096, 2, bias=False), 64, alpha=1)
    assert float(wide.lora_A.detach().std()) == pytest.approx(1 / 64, rel=0.02)


def test_dropout_is_for_training_and_for_the_update() -> None:
    base = nn.Linear(64, 40, bias=False)
    layer = LoRALinear(base, 8, alpha=8, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), base(x) + dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), base(x) + x @ layer.lora_A.T @ layer.lora_B.T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank: got 0, allowed is a positive integer"),
        ({"rank_pattern": {"q_proj": True}}, "rank: got True"),
        ({"rank_pattern": {".*q": 2}}, r"rank_pattern: got '\.\*q', allowed is names"),
        ({"alpha": float("nan")}, "alpha: got nan, allowed is a positive number"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"targets": "mlp"}, "targets: got 'mlp', allowed is attention, all-linear or a list"),
        ({"targets": []}, r"targets: got \[\]"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qproj"], "targets: got 'qproj', allowed is q_proj"),
        (["proj"], "targets: got 'proj', allowed is q_proj"),
        (["lm_head"], "targets: got 'lm_head'; head and embedding are one matrix"),
        (["model.embed_tokens"], "targets: got 'model.embed_tokens'; head and embedding are one matrix"),
    ],
)
def test_targets_refused(targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(plain(), LoraConfig(targets=targets))


def test_an_adapter_on_an_adapter_is_refused() -> None:
    model = plain()
    add_lora(model, LoraConfig(targets="attention"))
    with pytest.raises(ValueError, match=r"add_lora: model\.layers\.0\.self_attn\.q_proj is a LoRALinear"):
        add_lora(model, LoraConfig())
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear  # nothing was changed


class _Packed(nn.Module):
    """A linear of another kind: its weight is no parameter, and its gradient is lost or passes."""

    def __init__(self, linear: nn.Linear, *, gradient: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = (linear.weight.detach(),)
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.packed[0])
        return y if self.gradient else y.detach()


@pytest.mark.parametrize("gradient", [True, False])
def test_packed_linears_train_where_a_gradient_passes(gradient: bool) -> None:
    model, text = plain(), tokens(CONFIG, 1, 9)
    want = forward(model, text)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = _Packed(mlp.up_proj, gradient=gradient)  # type: ignore[union-attr, arg-type]
    if gradient:
        add_lora(model, LoraConfig())
        assert torch.equal(forward(model, text), want)
        return
    with pytest.raises(ValueError, match=r"no gradient passes model\.layers\.1\.mlp\.up_proj, a _Packed"):
        add_lora(model, LoraConfig())
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora: got True, allowed is none; DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*head and embedding are one matrix"),
        ({"bias": "all"}, "bias: got 'all'.*no biases"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices: .*one matrix"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: .*may change the arithmetic"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow: got 3"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4'"),
        ({"peft_type": "LOHA"}, "peft_type: got 'LOHA', allowed is 'LORA'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "targets: got 'lm_head'; head and embedding are one matrix"),
        ({"rank_pattern": {r"layers\.(0|1).*": 4}}, "rank_pattern: got"),
        ({"rank_pattern": [4]}, r"rank_pattern: got \[4\], allowed is dict or null"),
        ({"use_rslora": "no"}, "use_rslora: got 'no', allowed is bool or null"),
        ({"r": 5}, r"q_proj: lora_A \(3, 48\) and lora_B \(64, 3\), due is rank 5"),
        ({"r": "3"}, "rank: got '3'"),
        ({"lora_alpha": 0}, "alpha: got 0"),
    ],
)
def test_fields_that_are_not_computed_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = mine(tmp_path / "a", rank=3, targets=["q_proj"])
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(folder)


def key(name: str, side: str = "A") -> str:
    return f"base_model.model.model.layers.{name}.lora_{side}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({key("0.self_attn.q_proj", "B"): None}, "only one of lora_A and lora_B for model.layers.0.self_attn.q_proj"),
        ({key("0.self_attn.q_proj"): torch.full((3, 48), float("nan"))}, "holds infinities or NaN"),
        ({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 48)}, "'lm_head'; head and embedding are one"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 48)}, "is no factor of a linear"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(3)}, "is no factor"),
        ({key("0.self_attn.q_proj"): torch.zeros(4, 48)}, r"lora_A \(4, 48\) and lora_B \(64, 3\), due is rank 3"),
    ],
)
def test_damaged_tensors_are_refused(change: Mapping[str, Tensor | None], message: str, tmp_path: Path) -> None:
    folder = mine(tmp_path / "a", rank=3, targets=["q_proj"])
    retensor(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(folder)


def test_pickles_and_absent_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "none")
    folder = mine(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle, which can run code"):
        load_adapter(folder)


# --- adapters chosen per row -----------------------------------------------------------------------------------------

ROWS = ["thin", None, "wide", "thin", "one", None, "wide"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other ranks, scales and targets; `one` adapts a single linear."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "thin": mine(folder / "thin", 1, rank=1, alpha=2, targets="attention"),
        "wide": mine(folder / "wide", 2, rank=9, alpha=7, rank_pattern={"v_proj": 2}, use_rslora=True),
        "one": mine(folder / "one", 3, rank=4, alpha=9, targets=[FULL]),
    }


def serving(adapters: Mapping[str, Path]) -> tuple[Gemma2, AdapterSlots]:
    model = plain()
    slots = AdapterSlots(model)
    for name, folder in adapters.items():
        slots.load(name, folder)
    return model, slots


@pytest.mark.parametrize("entry", ["forward", "prefill", "decode", "mixed"])
def test_a_mixed_batch_equals_each_adapter_alone(entry: str, adapters: dict[str, Path]) -> None:
    model, slots = serving(adapters)
    text, run = tokens(CONFIG, len(ROWS), 20), ENTRIES[entry]
    slots.select(ROWS)
    got = run(model, text)
    base = run(plain(), text)
    for name in {*ROWS}:
        rows = [i for i, row in enumerate(ROWS) if row == name]
        if name is None:
            assert torch.equal(got[rows], base[rows])  # the neighbours' adapters leave no trace, not even a rounding
            continue
        alone = run(adapted(adapters[name]), text[rows])
        assert distance(got[rows], alone) < TOLERANCE, name
        assert distance(alone, base[rows]) > 100 * TOLERANCE, name
        slots.select([name] * len(rows))  # all rows share one: no row is copied
        assert distance(run(model, text[rows]), alone) < TOLERANCE, name
        slots.select(ROWS)


def test_over_the_packed_bf16_model(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Fused in fp32 is the truth; the served model is as near to it as bf16 lets the plain model be to its own.

    Within a factor of 4: base and update are each rounded before they are added, and this adapter takes much away.
    """
    write(tmp_path / "m", ((n, t.bfloat16()) for n, t in BASE.items()), config=CONFIG.to_hf())
    model = load_model(tmp_path / "m", device=CPU)
    slots = AdapterSlots(model)
    slots.load("a", adapters["wide"])
    text = tokens(CONFIG, 2, 12)
    fused = fuse_checkpoint(tmp_path / "m", adapters["wide"], tmp_path / "fused")
    with torch.inference_mode():
        slots.select(["a", None])
        got = forward(model, text)
        for row, folder in enumerate((fused, tmp_path / "m")):
            truth = forward(load_model(folder, device=CPU, dtype="float32", pack=False), text)[row]
            rounded = forward(load_model(folder, device=CPU), text)[row]
            assert distance(got[row], truth) < 4 * distance(rounded, truth) + TOLERANCE


def test_unload_restores_the_base(adapters: dict[str, Path]) -> None:
    model, text = plain(), tokens(CONFIG, 3, 9)
    before = dict(model.named_modules())
    want = forward(model, text)
    slots = AdapterSlots(model)
    slots.load("wide", adapters["wide"])
    slots.load("one", adapters["one"])
    assert slots.names == ["wide", "one"]
    slots.select([None] * 3)
    assert torch.equal(forward(model, text), want)
    slots.select(["one", "wide", None])
    both = forward(model, text)
    slots.unload("wide")
    assert torch.equal(forward(model, text), want)  # a selection does not outlive an adapter that it may name
    slots.select(["one", None, None])
    got = forward(model, text)
    assert distance(got[0], both[0]) < TOLERANCE
    assert torch.equal(got[1:], want[1:])
    slots.unload("one")
    assert dict(model.named_modules()) == before  # the very modules
    assert torch.equal(forward(model, text), want)
    assert slots.names == []


def test_a_name_loaded_anew_is_another_adapter(adapters: dict[str, Path]) -> None:
    """In company, on linears that only the old or only the new one has."""
    model, slots = serving({"wide": adapters["wide"]})
    text, numbers = tokens(CONFIG, 2, 9), {slots.generation(None), slots.generation("wide")}
    for i, kind in enumerate(("thin", "one", "thin")):
        slots.load("a", adapters[kind])
        numbers.add(slots.generation("a"))
        assert len(numbers) == 3 + i
        slots.select(["a", "wide"])
        got = forward(model, text)
        for row, name in enumerate((kind, "wide")):
            assert distance(got[row], forward(adapted(adapters[name]), text)[row]) < TOLERANCE
        slots.unload("a")


def test_what_does_not_fit_is_refused_before_anything_changes(adapters: dict[str, Path], tmp_path: Path) -> None:
    model, slots = serving({"thin": adapters["thin"]})
    before = dict(model.named_modules())
    wrong = mine(tmp_path / "wrong", rank=3, targets=["up_proj", "q_proj"])
    stray = "base_model.model.model.layers.7.mlp.up_proj.lora_{}.weight"
    change = {
        key("0.mlp.up_proj"): torch.zeros(3, 40),
        key("2.self_attn.q_proj"): None,
        key("2.self_attn.q_proj", "B"): None,
        stray.format("A"): torch.zeros(3, 48),
        stray.format("B"): torch.zeros(96, 3),
    }
    retensor(wrong, change)
    faults = (
        r"model\.layers\.0\.mlp\.up_proj is for a linear of 40 x 96, due 48 x 96; "
        r"target_modules names model\.layers\.2\.self_attn\.q_proj, which has no factors; "
        r"the model has no linear model\.layers\.7\.mlp\.up_proj"
    )
    with pytest.raises(CheckpointError, match=faults):
        slots.load("wrong", wrong)
    with pytest.raises(CheckpointError, match=faults):
        add_lora(model, load_adapter(wrong))
    with pytest.raises(ValueError, match=r"adapter: got 'thin', allowed is a name that is not loaded \(thin\)"):
        slots.load("thin", adapters["wide"])
    with pytest.raises(ValueError, match="adapter: got 'wide', loaded are thin"):
        slots.unload("wide")
    with pytest.raises(ValueError, match="adapter: got 'wide', loaded are thin"):
        slots.select(["thin", "wide"])
    with pytest.raises(FileNotFoundError):
        slots.load("none", tmp_path / "none")
    assert dict(model.named_modules()) == before
    assert slots.names == ["thin"]


def test_a_batch_that_was_not_selected_is_an_assertion(adapters: dict[str, Path]) -> None:
    model, slots = serving(adapters)
    slots.select(ROWS)
    with pytest.raises(AssertionError, match=r"select\(\) named 7 rows, 2 came"):
        forward(model, tokens(CONFIG, 2, 5))
