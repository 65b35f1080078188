"""The arithmetic: attention, norms, rotary positions, losses. Plain definitions first, fast backends beside them."""
