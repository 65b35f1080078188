"""Whether what an engine holds may stay on a CUDA device while the model behind it is trained.

Keys, values and recorded passes cost time to make again, and memory that an update may need. What an update takes is
known once one has run without them, so after the first use they always go. Then they stay if they fit beside the peak
so far, and until the peak, which includes them from then on, comes near the limit; then they go for good.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

SHARE: Final = 0.85
"""Of the memory that this process can have, how much may be taken; the rest is for fragments and longer answers."""


class Memory(NamedTuple):
    """Bytes of a CUDA device, as this process sees it."""

    allocated: int
    peak: int
    """The most that was allocated since the process began."""
    limit: int
    """What torch holds, and what nobody does."""


def cuda_memory(device: torch.device) -> Memory:
    """The numbers of now."""
    free, _ = torch.cuda.mem_get_info(device)
    limit = free + torch.cuda.memory_reserved(device)
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), limit)


class Room:
    """One device, asked before and after each use of an engine over it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stays = False
        self._uses = self._before = self._held = 0

    def enter(self) -> None:
        """Before the engine is used."""
        if self.device.type == "cuda" and not self.stays:
            self._before = cuda_memory(self.device).allocated

    def leave(self) -> bool:
        """After it was used: whether its memory stays."""
        if self.device.type != "cuda":
            return False
        now = cuda_memory(self.device)
        if not self.stays:
            self._held = max(0, now.allocated - self._before)
        wanted = now.peak if self.stays else now.peak + self._held
        self._uses += 1
        self.stays = self._uses > 1 and wanted <= SHARE * now.limit
        return self.stays
