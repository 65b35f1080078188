"""Gemwright: the whole Gemma 2 recipe, exactly and fast."""
