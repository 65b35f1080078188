"""Options that several verbs share: how a model is loaded and how tokens are drawn, each declared once."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from gemwright.lm import LM
    from gemwright.parallel import TensorParallel

_MODELS_OWN = "default: the model's own"

Model = Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="default: the bundled model")]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
File = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]
Number = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint=_MODELS_OWN)]
Integer = Annotated[int | None, arg(metavar="INT", help_behavior_hint=_MODELS_OWN)]
Count = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]


@dataclass(frozen=True)
class Loading:
    """Where a model comes from and how it runs."""

    device: str = "auto"
    """auto (CUDA where there is one, else CPU), cpu, cuda, cuda:N or mps."""
    dtype: str = "auto"
    """auto (as stored), bfloat16, float32 or float16."""
    attention: str = "auto"
    """Attention backend: auto, reference, blocked, flex or triton."""
    revision: Text = None
    """Branch, tag or commit of a hub name."""
    token: Text = None
    """Hub token; default: the one that `hf auth login` stored."""
    cache_dir: File = None
    """Folder of the hub's cache; default: the one that huggingface_hub uses."""
    offline: Flag = False
    """Take hub names from the cache only."""
    verbose: Flag = False
    """Log what is chosen and loaded, to stderr."""

    @contextmanager
    def ranks(self) -> Iterator[TensorParallel | None]:
        """Under torchrun: join the ranks that hold the model together, of which only the first prints."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield None
            return
        from gemwright.parallel import TensorParallel

        with (
            TensorParallel.join(self.device) as parallel,
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere if parallel.rank else sys.stdout),
        ):
            yield parallel

    def load(self, model: str | None, parallel: TensorParallel | None = None) -> LM:
        """Load a folder, a hub name, or (None) the bundled model."""
        from gemwright.lm import load

        if self.verbose:
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del chosen["verbose"]
        return load(model, parallel=parallel, **chosen)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. What is not given comes from the model's generation_config.json."""

    max_new_tokens: Count = None
    """Most tokens to generate; default: 256 (chat: 1024), or what is left of the context."""
    min_new_tokens: Count = None
    """No stop token ends the answer before this many."""
    temperature: Number = None
    """Divides the logits; 0 takes the likeliest token."""
    top_k: Integer = None
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: Number = None
    """Draw from the smallest set of likeliest tokens with at least this probability."""
    min_p: Number = None
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Number = None
    """Above 1, tokens that have occurred become less likely."""
    frequency_penalty: Number = None
    """Taken from a token's logit for each time it was written; -2..2."""
    presence_penalty: Number = None
    """Taken once from the logits of tokens that were written; -2..2."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint="")] = ()
    """Text that ends the answer and is not printed; may be given several times."""
    seed: Count = None
    """Makes the draw repeatable."""

    def given(self) -> dict[str, Any]:
        """The fields that were given, as `LM.generate` takes them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value not in (None, ())}
