"""gemwright adopt: a Llama-style checkpoint becomes a Gemma 2 folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gemwright.cli.options import Count, File, Flag


@dataclass(frozen=True)
class Options:
    """Put a Llama-style model into the Gemma 2 architecture, as a Hugging Face folder in bfloat16.

    Linears, embedding and the norms in front of sub-layers carry over. A constant written to one dimension of the
    stream makes the new norms behind sub-layers pass outputs at their own size, and logits are lowered to where the
    final cap leaves them alone. SmolLM2-135M comes within 0.1 nats a token of itself (KL), untrained; training brings
    it nearer (recipes/mini). What the fit needs of text the source writes itself: some minutes on a laptop.

    For example:

      gemwright adopt SmolLM2-135M-Instruct.Q4_1.gguf OUT

      gemwright adopt LLAMA_FOLDER OUT --calibration prose.txt --overwrite
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """GGUF file of architecture llama, or Hugging Face folder of model_type llama."""
    out: Annotated[Positional[str], arg(metavar="OUT", help_behavior_hint="")]
    """Folder to write."""
    calibration: File = None
    """Text file to fit to, some ten thousand tokens of what the model is for; default: text that the source writes."""
    window: Count = None
    """Positions that the even layers see; default: the source's context, so that nothing is out of sight. Gemma 2 has
    4096; past a window's end the model is far from its source (0.4 nats) until it is trained there."""
    overwrite: Flag = False
    """Replace the checkpoint that is at OUT."""
    json: Flag = False
    """Print one JSON object: folder, parameters, kl."""


def run(options: Options) -> int:
    """Adopt; 0."""
    from gemwright.adopt import adopt, read_text

    calibration = None if options.calibration is None else read_text(Path(options.calibration).expanduser())
    out = Path(options.out).expanduser().resolve()
    adopted = adopt(
        options.source,
        out,
        calibration=calibration,
        window=options.window,
        overwrite=options.overwrite,
        progress=not options.json and sys.stderr.isatty(),
    )
    parameters, layers = adopted.config.num_parameters(), adopted.config.num_hidden_layers
    if options.json:
        print(json.dumps({"folder": str(out), "parameters": parameters, "kl": adopted.kl}))
    else:
        print(f"{out}: {parameters:,} parameters in {layers} layers; KL to the source {adopted.kl:.3f} nats a token")
    return 0
