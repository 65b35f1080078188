"""World: the processes that train together, and all that training knows of torch.distributed.

torchrun (or anything that sets its variables: `accelerate launch`, Slurm scripts) starts one process a device. Their
parameters are sharded by FSDP2 (`fully_shard`), blocks first, then the model, whose own parameters are the embedding,
the final norm and the tied head: one tensor may not lie in two groups, and the head's weight is read after a forward
pass, so the root is not resharded after it. FSDP would divide gradients by the number of ranks; here they are summed,
since the loss is divided by the global count.

With bf16, the shards are fp32: they are the masters, and FSDP gathers their bf16 roundings. Forward inputs are not
cast, because the rotary tables are fp32.

Sharded state is written by torch.distributed.checkpoint in its safetensors layout, a file a rank with the offsets of
its slices, which any other number of ranks can read. No pickle.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gemwright.loader import choose_device
from gemwright.model import Gemma2

FILE_BYTES: Final = 2**30
"""Bytes of state in a file: the writer holds one file's bytes in memory."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device. Without a mesh nothing is sharded."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    offload: bool = False
    """Keep shards, masters and moments in main memory."""

    @classmethod
    @contextmanager
    def join(cls, device: str = "auto", *, offload: bool = False) -> Iterator[World]:
        """Meet the other processes, if there are any, and part from them at the end."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        chosen = choose_device(device)
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(chosen)
        if size == 1 and not offload:
            yield cls(0, 1, chosen)
            return
        # gloo beside nccl: offloaded gradients and the state's bookkeeping are tensors in main memory
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = None if size > 1 else dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            yield cls(rank, size, chosen, init_device_mesh(chosen.type, (size,)), offload)
        finally:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place; in the same order everywhere, so all ranks hold the same bits."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process goes through a block alone, then the others: they find what it has made."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def shard(self, model: Gemma2, *, dtype: torch.dtype) -> None:
        """Shard a model that holds any device's tensors, in place; nothing where there is no mesh.

        Args:
            dtype: of the computation. The shards of trained parameters are fp32, those of frozen ones stay as they are.
        """
        if self.mesh is None:
            return
        casts = dtype == torch.bfloat16 and all(p.requires_grad for p in model.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if casts else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offload else OffloadPolicy()
        root = [model.model.embed_tokens, model.model.norm]
        for part in (*model.model.layers, *root):
            if casts:
                part.float()  # one block at a time: the whole model in fp32 may not fit beside its shards
            if part not in root:
                fully_shard(part, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(model, mesh=self.mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    def reshard(self, model: nn.Module) -> None:
        """Give back what a forward pass without a backward has gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor with all its shards; every rank must ask for it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def save(self, tensors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
        """Write `name -> (tensor whose sharding it has, this rank's part)` into a folder; every rank must call it."""
        state = self._state(tensors)
        files: dict[str, int] = {}
        number, held = 1, 0
        for name, (_, part) in tensors.items():
            if held + part.nbytes > FILE_BYTES and held:
                number, held = number + 1, 0
            files[name], held = number, held + part.nbytes
        writer = HuggingFaceStorageWriter(
            str(folder), fqn_to_index_mapping=files, save_distributed=self.mesh is not None
        )
        try:
            with _no_warning():
                save(state, storage_writer=writer, no_dist=self.mesh is None)
        except CheckpointException as error:  # holds every rank's own; a full disk is the user's to mend
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(folder)) from error
            raise

    def load(self, tensors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
        """Read them back into this rank's parts, whatever number of ranks wrote them."""
        state = self._state(tensors)
        with _no_warning():
            load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=self.mesh is None)

    def _state(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {name: _like(whole, part) for name, (whole, part) in tensors.items()}


@contextmanager
def _no_warning() -> Iterator[None]:
    """torch warns that a single process saves alone, though it was told to (2.13)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """A rank's part as the shard of a tensor that is shaped and sharded as another one."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
