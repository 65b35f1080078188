"""Several ranks: the numbers of one process, and states that any number of them resumes. Two processes, over gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import folder_fixtures
import pytest
import torch
import train_fixtures as fixtures
import yaml
from test_trainer import begin_from, last_step, losses, weights
from train_fixtures import gather, model, options, run, together

from gemwright.adapter import LoraConfig
from gemwright.lora import LoRALinear
from gemwright.quant.nf4 import Nf4Linear
from gemwright.train.progress import LOG, records
from gemwright.train.state import STATE

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("sh", "bash", "yaml")


def test_two_ranks_agree_with_one_and_resume_each_other(tmp_path: Path) -> None:
    """FSDP2 over gloo, fp32, within 1e-5 of one process; a state of 2 ranks resumes on 1, and one of 1 on 2.

    A LoRA rank of 3 does not divide evenly by 2.
    """
    lora = LoraConfig(rank=3, dropout=0.0)
    one = {"gradient_accumulation_steps": 2, "logging_steps": 1}
    two = {"gradient_accumulation_steps": 1, "logging_steps": 1, "zero_stage": 3}
    short = {"max_steps": 6, "save_steps": 3}
    run(options(tmp_path / "one", **one, **short), evaluate=True)
    run(options(tmp_path / "one-lora", **one, **short), lora=lora)
    for source, target in (("one", "one-to-two"), ("one-lora", "one-to-two-lora")):
        begin_from(tmp_path / source, tmp_path / target, 3)
    jobs: list[tuple[Any, dict[str, Any]]] = [
        (options(tmp_path / "two", **two, **short), {"evaluate": True}),
        (options(tmp_path / "two-offload", **two, **short, cpu_offload=True), {}),
        (options(tmp_path / "two-lora", **two, **short), {"lora": lora}),
        (options(tmp_path / "one-to-two", **two, **short, resume=True), {"evaluate": True}),
        (options(tmp_path / "one-to-two-lora", **two, **short, resume=True), {"lora": lora}),
    ]
    together(fixtures.run_all, jobs)
    begin_from(tmp_path / "two", tmp_path / "two-to-one", 3)
    run(options(tmp_path / "two-to-one", **one, **short, resume=True), evaluate=True)
    expected = losses(tmp_path / "one")
    for name in ("two", "two-offload", "one-to-two", "two-to-one"):
        torch.testing.assert_close(losses(tmp_path / name), expected, rtol=1e-5, atol=1e-5)
        for tensor, theirs in zip(weights(tmp_path / name).values(), weights(tmp_path / "one").values(), strict=True):
            torch.testing.assert_close(tensor, theirs, rtol=0, atol=1e-5)
    for name in ("two-lora", "one-to-two-lora"):
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "one-lora"), rtol=1e-5, atol=1e-5)
    for key in ("eval_loss", "grad_norm"):  # clipping would hide gradients of another scale
        one_run, two_run = (
            [line[key] for line in records(tmp_path / name / LOG) if key in line] for name in ("one", "two")
        )
        torch.testing.assert_close(two_run, one_run, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "two" / "checkpoint-3" / "state").iterdir())) == 2  # a file a rank


def test_sigterm_to_one_rank_stops_both_and_any_number_goes_on(tmp_path: Path) -> None:
    """2 ranks are terminated and 1 goes on, 1 is terminated and 2 go on: the losses of an uninterrupted run."""
    shared = {"max_steps": 24, "save_steps": 4, "save_total_limit": 1, "logging_steps": 1, "learning_rate": 1e-3}
    shapes = {1: {"gradient_accumulation_steps": 2}, 2: {"gradient_accumulation_steps": 1}}
    run(options(tmp_path / "whole", **shared, **shapes[1]))
    for before, after in ((2, 1), (1, 2)):
        out = tmp_path / f"{before}-to-{after}"
        ranks = gather(fixtures.run, options(out, **shared, **shapes[before]), world=before)
        begun = time.monotonic()
        while last_step(out) < 4:
            assert time.monotonic() - begun < 90
            time.sleep(0.002)
        os.kill(ranks[-1].pid or 0, signal.SIGTERM)
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * before
        assert 4 <= last_step(out) < 24
        assert not (out / "config.json").exists()
        together(fixtures.run, options(out, **shared, **shapes[after], resume=True), world=after)
        torch.testing.assert_close(losses(out), losses(tmp_path / "whole"), rtol=1e-4, atol=1e-4)


def test_two_ranks_over_a_4_bit_base(tmp_path: Path) -> None:
    """NF4 buffers are the same on every rank, the adapter is sharded: the losses of one process."""
    lora = LoraConfig(rank=3, dropout=0.0)
    changes = {"logging_steps": 1, "max_steps": 3, "save_steps": 3}
    made = model(lora, nf4=True)
    assert {type(m.base) for m in made.modules() if isinstance(m, LoRALinear)} == {Nf4Linear}
    run(options(tmp_path / "one", **changes, gradient_accumulation_steps=2), lora=lora, nf4=True)
    run(options(tmp_path / "full", **changes, gradient_accumulation_steps=2), lora=lora)
    together(fixtures.run, options(tmp_path / "two", **changes), lora=lora, nf4=True)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-5)
    assert losses(tmp_path / "full")[0] != pytest.approx(losses(tmp_path / "one")[0], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_agree_with_one_in_bf16(tmp_path: Path) -> None:
    """Shards are fp32 masters and the products bf16, within what bf16 differs by."""
    changes = {"logging_steps": 1, "max_steps": 3, "save_steps": 3, "dtype": "bfloat16"}
    run(options(tmp_path / "fp32", **{**changes, "dtype": "float32"}, gradient_accumulation_steps=2))
    run(options(tmp_path / "one", **changes, gradient_accumulation_steps=2))
    together(fixtures.run_all, [(options(tmp_path / "two", **changes), {})])
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0.01, atol=0)
    assert losses(tmp_path / "two")[0] != pytest.approx(losses(tmp_path / "fp32")[0], rel=1e-6)


def test_a_single_process_may_offload(tmp_path: Path) -> None:
    """FSDP2 over one rank with everything in main memory: the same numbers."""
    run(options(tmp_path / "plain"))
    run(options(tmp_path / "offload", cpu_offload=True))
    torch.testing.assert_close(losses(tmp_path / "offload"), losses(tmp_path / "plain"), rtol=1e-5, atol=1e-5)


# --- docs/distributed.md ---------------------------------------------------------------------------------------------


class Launch:
    """The commands of the document over a debug model, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
        self.blocks = {
            language: re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) for language in LANGUAGES
        }
        folder_fixtures.gemma2(folder / "base")
        rows = [{"prompt": f"The capital of {place}", "completion": " is Paris"} for place in "abcdefgh"]
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.config = yaml.safe_load(self.blocks["yaml"][0])
        small = {"model_name": "base", "max_steps": 2, "max_seq_length": 64, "device": "cpu", "dtype": "float32"}
        (folder / "run.yaml").write_text(yaml.safe_dump(self.config | small))

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        """A command with two processes a node instead of eight, or one where there are two nodes."""
        count = "1" if "--nnodes 2" in command else "2"
        for name in ("--nproc-per-node", "--num_processes", "--ntasks-per-node="):
            command = re.sub(rf"({name}[ =]?)8", rf"\g<1>{count}", command)
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, text=True, stderr=subprocess.PIPE,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def check(self, processes: list[subprocess.Popen[str]], code: int = 0) -> None:
        """All of them end so, and two ranks have trained."""
        for process in processes:
            _, told = process.communicate(timeout=300)
            assert process.returncode == code, told[-3000:]
        record = json.loads((self.folder / "out" / "checkpoint-2" / STATE).read_text())
        assert (record["world"], record["step"]) == (2, 2)


@pytest.mark.slow
def test_the_commands_of_the_document(tmp_path: Path) -> None:
    """One node by both launchers, and two nodes that meet over a port."""
    for index in range(3):
        launch = Launch(tmp_path / str(index))
        command = launch.blocks["sh"][index]
        nodes = ("0", "1") if "--nnodes" in command else ("0",)
        port = {"MASTER_ADDR": "127.0.0.1"}
        command = command.replace("29500", str(fixtures.free_port()))
        launch.check([launch.start(command, NODE_RANK=rank, **port) for rank in nodes])


@pytest.mark.slow
def test_the_slurm_script_of_the_document(tmp_path: Path) -> None:
    """With stand-ins: `srun` starts the tasks here, `scontrol` names this host and notes what is put into the queue."""
    launch = Launch(tmp_path)
    (script,) = launch.blocks["bash"]
    stand_ins = {
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & all="$all $!"; done\n'
        "code=0; for one in $all; do wait $one || code=$?; done; exit $code",
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> told',
    }
    (tmp_path / "bin").mkdir()
    for name, text in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "77"}
    launch.check([launch.start(script, **job)])
    assert not (tmp_path / "told").exists()
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\nexit 143\n")
    launch.check([launch.start(script, **job)], code=143)
    assert (tmp_path / "told").read_text() == "requeue 77\n"
