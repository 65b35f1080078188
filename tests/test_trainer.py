"""The training loop: its numbers against a plain torch loop, and that nothing is lost when a run is cut off."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import oracle
import pytest
import torch
import train_fixtures as fixtures
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from train_fixtures import LENGTH, documents, model, options, run, start, trainer

from gemwright.adapter import LoraConfig
from gemwright.checkpoint import Checkpoint
from gemwright.data.batch import Batch
from gemwright.data.loader import Batching, Loader
from gemwright.model import Gemma2
from gemwright.ops.attention import Attention
from gemwright.train import distributed
from gemwright.train.distributed import World
from gemwright.train.optimizer import SCHEDULES, AdamW, Schedule
from gemwright.train.options import FREE, PRETRAIN_FREE, SFT_FREE, PretrainConfig, Scheduler, SftConfig
from gemwright.train.progress import LOG, records
from gemwright.train.sft import loss
from gemwright.train.speed import Work, check_recording, choose_precision
from gemwright.train.state import STATE
from gemwright.train.trainer import Diverged

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def weights(out: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(out)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def same_bits(one: Path, other: Path) -> None:
    """All that a later step hangs on is equal: weights, masters, moments, random states, the place in the data."""
    files = [path.relative_to(one) for path in (*one.glob("state/*.safetensors"), *one.glob("*.safetensors"))]
    assert len(files) >= 3, files
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), file
    records = [json.loads((folder / STATE).read_text()) for folder in (one, other)]
    for key in ("step", "updates", "data", "window", "tokens", "refused", "best", "evaluated"):
        assert records[0][key] == records[1][key], key


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in records(out / LOG) if "loss" in line]


def test_the_loss_curve_is_that_of_a_plain_loop_over_the_oracle(tmp_path: Path) -> None:
    """Full fine-tuning, fp32: transformers' model in eager mode, torch's AdamW, clipping and cosine schedule by hand.

    One document a row, so that the oracle needs no document mask. Gradients are clipped throughout (norms of 10 to 17).
    """
    config = options(tmp_path / "run", gradient_accumulation_steps=2, logging_steps=1, save_steps=100)
    assert run(config, packing=False) == "done"
    theirs = oracle.oracle(fixtures.debug(), fixtures.weights(fixtures.debug())).requires_grad_(True).train()
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    gains = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=1e-4)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 6)
    batching = Batching(length=LENGTH, rows=2, accumulation=2, seed=3, packing=False)
    loader = Loader(documents(), batching, epochs=None)
    expected, norms = [], []
    for _ in range(6):
        batches = [next(loader) for _ in range(2)]
        count = torch.stack([batch.weights_BT.sum() for batch in batches]).sum()
        total = torch.stack([plain_loss(theirs, batch) for batch in batches]).sum() / count
        total.backward()  # type: ignore[no-untyped-call]
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(float(total.detach()))
    torch.testing.assert_close(losses(tmp_path / "run"), expected, rtol=0, atol=1e-4)
    logged = [line["grad_norm"] for line in records(tmp_path / "run" / LOG) if "loss" in line]
    torch.testing.assert_close(logged, norms, rtol=1e-4, atol=0)
    with torch.no_grad():  # training matters: without it the last loss is another one
        untrained = torch.stack([loss(model(), batch)[0] for batch in batches]).sum() / count
    assert abs(float(untrained) - expected[-1]) > 0.1
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, theirs.get_parameter(name).data, rtol=0, atol=2e-4)


def plain_loss(theirs: Any, batch: Batch) -> Tensor:
    """Sum over targets of the cross-entropy, from whole logits; padding at the end is seen by nobody before it."""
    logits_BTV = theirs(batch.tokens_BT, use_cache=False).logits
    losses_BT = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    return (losses_BT * batch.weights_BT.flatten()).sum()


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Divided by the global count, not by each batch's own: batches here differ in their number of targets."""
    run(options(tmp_path / "one", per_device_train_batch_size=4, logging_steps=1))
    run(options(tmp_path / "four", per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_steps=1))
    torch.testing.assert_close(losses(tmp_path / "four"), losses(tmp_path / "one"), rtol=1e-6, atol=1e-5)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "four")[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.2)], ids=["full", "lora with dropout"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: weights, masters, moments, random states, and the log; stopped between two records of it."""
    monkeypatch.setattr(distributed, "FILE_BYTES", 50_000)  # several files of state
    changes = {"logging_steps": 2, "gradient_accumulation_steps": 2, "save_steps": 3}
    run(options(tmp_path / "whole", **changes), lora=lora, evaluate=True)
    stopping = options(tmp_path / "parts", **changes)
    with World.join("cpu") as world:
        part = trainer(stopping, world, lora=lora, evaluate=True)
        step = part._step

        def stop_at_3(*arguments: Any) -> bool:
            if part.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        part._step = stop_at_3  # type: ignore[assignment,method-assign]
        assert part.train() == "terminated"
    assert len(list((tmp_path / "parts" / "checkpoint-3" / "state").glob("*.safetensors"))) > 1
    assert not (tmp_path / "parts" / "config.json").exists()  # only a finished run delivers
    torch.manual_seed(99)  # whatever the process did before, it does not matter
    assert run(options(tmp_path / "parts", resume=True, **changes), lora=lora, evaluate=True) == "done"
    same_bits(tmp_path / "parts" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    begin_from(tmp_path / "whole", tmp_path / "again", 3)  # as if killed after it: step 3 was not logged yet
    assert run(options(tmp_path / "again", resume=True, **changes), lora=lora, evaluate=True) == "done"
    same_bits(tmp_path / "again" / "checkpoint-6", tmp_path / "whole" / "checkpoint-6")
    timings = ("seconds", "tokens_per_second", "mfu", "memory")
    logs = [
        [{k: v for k, v in line.items() if k not in timings} for line in records(tmp_path / name / LOG)]
        for name in ("again", "whole")
    ]
    assert logs[0] == logs[1]


def test_sigkill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """Killed again and again, in the middle of steps and of saves, and resumed: the same bits at the end."""
    changes = {"save_steps": 1, "save_total_limit": 2, "max_steps": 16}
    run(options(tmp_path / "whole", **changes), evaluate=True)
    draw, killed, reached = random.Random(0), 0, 0
    out = tmp_path / "killed"
    while not (out / "config.json").exists():
        process = start(run_evaluated, options(out, **changes, resume=True))
        aim, begun = reached + draw.randint(1, 3), time.monotonic()
        while process.is_alive() and last_step(out) < aim:
            assert time.monotonic() - begun < 90
            time.sleep(0.002)
        process.join(draw.random() * 0.1)  # in a step, an evaluation, a save, or between them
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        reached = last_step(out)
    assert killed >= 2
    same_bits(out / "checkpoint-16", tmp_path / "whole" / "checkpoint-16")
    assert not list(out.glob(".*checkpoint-*"))


def last_step(out: Path) -> int:
    return max((int(path.name[11:]) for path in out.glob("checkpoint-*")), default=0)


def run_evaluated(config: Any) -> None:
    run(config, evaluate=True)


def begin_from(source: Path, target: Path, step: int) -> None:
    """A folder with one checkpoint of another run, and its log."""
    import shutil

    target.mkdir()
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    shutil.copyfile(source / LOG, target / LOG)


class Poisoned:
    """The loss, but NaN or an infinite gradient in some of its calls."""

    def __init__(self, bad: set[int], value: float) -> None:
        self.bad, self.value, self.calls = bad, value, 0

    def __call__(self, model: Gemma2, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        total, count, metrics = loss(model, batch)
        self.calls += 1
        return total * self.value if self.calls in self.bad else total, count, metrics


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_refused_and_reported(tmp_path: Path, value: float) -> None:
    """The second update of three is bad: the parameters after it are those after the first."""
    made = model()
    seen: list[dict[str, Tensor]] = []
    with World.join("cpu") as world:
        made_trainer = trainer(
            options(tmp_path / "run", max_steps=3, warmup_steps=0), world, made=made, algorithm=Poisoned({2}, value)
        )
        apply = made_trainer._apply

        def watched(*arguments: Any) -> None:
            apply(*arguments)
            seen.append({name: p.detach().clone() for name, p in made.named_parameters()})

        made_trainer._apply = watched  # type: ignore[assignment,method-assign]
        assert made_trainer.train() == "done"
    assert all(torch.equal(seen[1][name], seen[0][name]) for name in seen[0])
    assert any(not torch.equal(seen[2][name], seen[1][name]) for name in seen[0])
    assert all(tensor.isfinite().all() for tensor in seen[2].values())
    refused = [line for line in records(tmp_path / "run" / LOG) if "refused" in line]
    assert [line["step"] for line in refused] == [2]
    assert str(value) in refused[0]["refused"]


def test_many_refused_updates_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 4: 3 updates in a row were refused \(max_refused is 3\)"):
        run(options(tmp_path / "run", max_refused=3), algorithm=Poisoned({2, 3, 4}, math.nan))
    run(options(tmp_path / "other", max_refused=3), algorithm=Poisoned({2, 3, 5, 6}, math.nan))  # never 3 in a row


def test_the_full_checkpoint_loads_in_transformers(tmp_path: Path) -> None:
    run(options(tmp_path / "run", max_steps=2))
    theirs: Any = transformers.Gemma2ForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoint-2", attn_implementation="eager"
    )
    ours = model()
    ours.load_state_dict(
        {**weights(tmp_path / "run"), "lm_head.weight": weights(tmp_path / "run")["model.embed_tokens.weight"]}
    )
    tokens_BT = oracle.tokens(fixtures.debug(), 2, 12)
    with torch.no_grad():
        assert oracle.distance(oracle.forward(ours, tokens_BT), oracle.oracle_logits(theirs, tokens_BT)) < 1e-4
    assert "lm_head.weight" not in weights(tmp_path / "run")  # still tied


def test_bf16_parameters_are_roundings_of_fp32_masters(tmp_path: Path) -> None:
    """Steps far below bf16's resolution add up in the master and reach the parameter; accumulation sums in fp32."""
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW([("w", parameter)])
    reference = torch.nn.Parameter(torch.ones(4, 4))
    plain = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.0)
    for _ in range(6):
        for part in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
            (parameter * part).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.collect()
        reference.grad = torch.full((4, 4), 258.0)
        torch.testing.assert_close(optimizer.squares(), reference.grad.square().sum())
        optimizer.update(1e-3, 1.0)
        plain.step()
    assert torch.equal(optimizer.slots[0].master, reference.data)
    assert torch.equal(parameter.data, reference.data.bfloat16())
    assert float(parameter.data[0, 0]) < 1.0
    assert parameter.grad is None


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
def test_low_precision_follows_fp32(tmp_path: Path, dtype: str) -> None:
    run(options(tmp_path / "fp32", logging_steps=1, max_steps=4))
    run(options(tmp_path / "low", logging_steps=1, max_steps=4, dtype=dtype))
    torch.testing.assert_close(losses(tmp_path / "low"), losses(tmp_path / "fp32"), rtol=0.02, atol=0)
    assert losses(tmp_path / "low") != losses(tmp_path / "fp32")


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}], ids=str)
def test_recomputed_blocks_give_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With dropout, whose draws must be repeated."""
    lora = LoraConfig(rank=4, dropout=0.3)
    run(options(tmp_path / "kept"), lora=lora)
    run(options(tmp_path / "again", **changes), lora=lora)
    same_bits(tmp_path / "kept" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")


@pytest.mark.slow
def test_compiled_blocks_follow_eager_ones(tmp_path: Path) -> None:
    """With recomputation too; blocks share one compiled code, however many layers there are."""
    from torch._dynamo.utils import counters

    config = fixtures.debug(num_hidden_layers=10)
    short = {"logging_steps": 1, "max_steps": 3, "save_steps": 3, "learning_rate": 1e-3}  # more layers magnify rounding
    run(options(tmp_path / "eager", **short), made=model(config=config))
    counters.clear()
    run(options(tmp_path / "compiled", **short, compile="on"), made=model(config=config))
    assert not counters["recompiles"], counters["recompiles"]
    run(options(tmp_path / "both", **short, compile="on", gradient_checkpointing=True), made=model(config=config))
    for name in ("compiled", "both"):
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "eager"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recorded_passes_train_as_plain_ones(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once, for batches of the first one's shape; evaluations run as before. On a CPU the recording is a
    stand-in that counts."""
    calls: list[torch.Size] = []
    if place == "cpu":

        def stand_in(module: Any, sample: tuple[Tensor, ...]) -> None:
            plain = module.forward

            def replay(*given: Tensor) -> Any:
                assert [x.shape for x in given] == [x.shape for x in sample] and module.training
                calls.append(given[0].shape)
                return plain(*given)

            module.forward = replay

        monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
        monkeypatch.setattr("gemwright.train.trainer.check_recording", lambda *of, **named: None)
    for recorded in (False, True):
        out = tmp_path / str(recorded)
        changes: dict[str, Any] = {"logging_steps": 1, "cuda_graphs": recorded, "eval_steps": 3}
        made = model().to(place)
        made.attention = Attention("flex", "flex", "flex") if place == "cuda" else made.attention
        trainer(options(out, **changes), World(0, 1, torch.device(place)), made=made, evaluate=True).train()
    assert place == "cuda" or calls == [(2, LENGTH)] * 6
    for key in ("loss", "eval_loss", "grad_norm"):
        values = [
            [line[key] for line in records(tmp_path / str(recorded) / LOG) if key in line] for recorded in (True, False)
        ]
        torch.testing.assert_close(*values, rtol=1e-4 if place == "cuda" else 0, atol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "device cpu"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"dtype": "autocast"}, "autocast"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    config = options(tmp_path / "out", cuda_graphs=True, **changes)
    device = torch.device("cuda" if changes else "cpu")
    with pytest.raises(ValueError, match=f"cuda_graphs: given beside .*{told}"):
        check_recording(config, device, choose_precision(config, CPU), sharded=False, adapted=False)


def test_an_adapter_is_not_recorded(tmp_path: Path) -> None:
    """On an H100 such a run failed; a device is not needed to say so."""
    config = options(tmp_path / "out", cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: given beside frozen weights"):
        check_recording(config, torch.device("cuda"), "bfloat16", sharded=False, adapted=True)


def test_schedules_have_the_values_of_transformers_and_of_the_papers() -> None:
    assert set(SCHEDULES) == set(get_args(Scheduler))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    for kind in ("linear", "cosine", "constant_with_warmup"):
        theirs: Any = transformers.get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=20)
        ours = Schedule(kind, 2.0, 20, warmup=3)
        for update in range(20):
            assert ours.rate(update) == pytest.approx(2.0 * theirs.lr_lambdas[0](update)), (kind, update)
    wsd = Schedule("wsd", 1.0, 12, warmup=2, floor=0.1, decay=0.5)
    expected = [0, 0.5, 1, 1, 1, 1, 1, 1, 0.82, 0.64, 0.46, 0.28]
    assert [wsd.rate(update) for update in range(12)] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"warmup_steps: got 30, allowed are 0 to 20"):
        Schedule("linear", 1.0, 20, warmup=30)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(options(tmp_path / "run", max_steps=2))
    with pytest.raises(FileExistsError, match=r"has checkpoints \(the last of step 2\); --resume"):
        run(options(tmp_path / "run", max_steps=2))
    with pytest.raises(ValueError, match=r"learning_rate: was 0.003, is 0.5; weight_decay: was 0.1, is 0.2") as caught:
        run(options(tmp_path / "run", max_steps=2, resume=True, learning_rate=0.5, weight_decay=0.2))
    assert "these may change" in str(caught.value) and "logging_steps" in str(caught.value)
    with pytest.raises(ValueError, match=r"rows of an update: was 2, is 6"):
        run(
            options(
                tmp_path / "run", max_steps=2, resume=True, per_device_train_batch_size=3, gradient_accumulation_steps=2
            )
        )
    run(options(tmp_path / "run", max_steps=2, resume=True, logging_steps=1, save_steps=7))  # free ones: nothing to do
    run(options(tmp_path / "run", max_steps=1, overwrite_output_dir=True, warmup_steps=0))
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_free_options_exist() -> None:
    import dataclasses

    sft, pretrain = ({field.name for field in dataclasses.fields(cls)} for cls in (SftConfig, PretrainConfig))
    assert set(FREE) | set(SFT_FREE) <= sft
    assert set(FREE) | set(PRETRAIN_FREE) <= pretrain


def test_last_and_best_checkpoints_stay(tmp_path: Path) -> None:
    """The evaluation is made to be best at step 4 of 10; it stays beside the last two, and is delivered."""
    config = options(tmp_path / "run", max_steps=10, save_total_limit=2, load_best_model_at_end=True)
    with World.join("cpu") as world:
        made = trainer(config, world, evaluate=True)
        evaluate = made._evaluate

        def staged(progress: Any) -> None:
            evaluate(progress)
            made.evaluated = {"step": made.done, "loss": abs(made.done - 4) + 1.0}

        made._evaluate = staged  # type: ignore[method-assign]
        made.train()
    kept = sorted(int(path.name[11:]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == [4, 8, 10]
    best = weights(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(tmp_path / "run").items())


def test_evaluation_is_the_mean_over_all_targets_and_draws_nothing(tmp_path: Path) -> None:
    config = options(tmp_path / "run", max_steps=2, learning_rate=0.0, weight_decay=0.0)
    ours, total, count = model(lora := LoraConfig(rank=2, dropout=0.5)), 0.0, 0.0
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)  # else the update is zero, whatever dropout does
    run(config, evaluate=True, made=ours, lora=lora)
    logged = [line for line in records(tmp_path / "run" / LOG) if "eval_loss" in line]
    ours.eval()
    with torch.no_grad():
        for batch in Loader(documents(7, seed=9), Batching(length=LENGTH, rows=3, shuffle=False)):
            value, number, _ = loss(ours, batch)
            total, count = total + float(value), count + float(number)
    assert logged[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    assert logged[-1]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    with World.join("cpu") as world:
        made = trainer(options(tmp_path / "run"), world)

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        object.__setattr__(made.export, "write", full)
        with pytest.raises(OSError, match="No space left"):
            made.train()
    left = [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]
    assert left == []


def test_the_work_of_a_step_is_counted_by_hand() -> None:
    """2 layers, window 8, one document of 10 tokens and one of 3: the keys that each query sees, one by one."""
    config = fixtures.debug(num_hidden_layers=2)
    made = model(config=config)
    D, Ff, N, K, H, V = 48, 96, 4, 2, 16, 384
    batch = Batch(*(torch.zeros(1, 14, dtype=torch.int64) for _ in range(5)))
    batch.pos_BT[:] = torch.tensor([[*range(10), *range(3), -1]])
    object.__setattr__(batch, "weights_BT", torch.tensor([[1.0] * 5 + [0.0] * 9]))
    linears = 2 * (D * (N + 2 * K) * H + N * H * D + 3 * D * Ff)
    seen_local = sum(min(p + 1, 8) for p in [*range(10), *range(3)])
    seen_global = sum(p + 1 for p in [*range(10), *range(3)])
    expected = 6 * linears * 13 + 6 * V * D * 5 + 12 * N * H * (seen_local + seen_global)
    assert Work.of(made).flops(batch) == expected
    frozen = model(LoraConfig(rank=2), config)
    low = sum(p.numel() for name, p in frozen.named_parameters() if "lora" in name)
    expected = (4 * linears + 6 * low) * 13 + 4 * V * D * 5 + 12 * N * H * (seen_local + seen_global)
    assert Work.of(frozen).flops(batch) == expected


def test_the_run_reports_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    run(options(tmp_path / "run", report_to=("tensorboard",)), evaluate=True)
    lines = records(tmp_path / "run" / LOG)
    first = next(line for line in lines if "loss" in line)
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory"} <= set(first)
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "step 2: loss" in capfd.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(tmp_path / "run" / "runs"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line}, rel=1e-6)
    with pytest.raises(ValueError, match=r"report_to: got mlflow, allowed are none, all, tensorboard, wandb"):
        run(options(tmp_path / "other", report_to=("mlflow",)))


def test_a_log_cut_by_a_kill_is_mended(tmp_path: Path) -> None:
    run(options(tmp_path / "run", max_steps=4, logging_steps=1))
    with (tmp_path / "run" / LOG).open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    run(options(tmp_path / "run", max_steps=4, logging_steps=1, resume=True))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / LOG).read_text().splitlines()] == [1, 2, 3, 4]
