"""gemwright adopt: a Llama-style checkpoint becomes a Gemma 2 folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from gemwright.cli.options import File, Flag


@dataclass(frozen=True)
class Options:
    """Put a Llama-style model into the Gemma 2 architecture, as a Hugging Face folder in bfloat16.

    Linears, embedding and the norms in front of sub-layers carry over; the new norms behind them get the gain that the
    source's outputs have on a calibration text, and logits are lowered to where the final cap leaves them alone. The
    result is a start, not yet a good model: the new norms cost over a nat a token until it is healed by training
    (recipes/mini does that).

    For example:

      gemwright adopt SmolLM2-135M-Instruct.Q4_1.gguf OUT

      gemwright adopt LLAMA_FOLDER OUT --calibration prose.txt --overwrite
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE", help_behavior_hint="")]
    """GGUF file of architecture llama, or Hugging Face folder of model_type llama."""
    out: Annotated[Positional[str], arg(metavar="OUT", help_behavior_hint="")]
    """Folder to write."""
    calibration: File = None
    """Text file to measure norms and logits on; default: a page of plain English prose."""
    overwrite: Flag = False
    """Replace the checkpoint that is at OUT."""
    json: Flag = False
    """Print one JSON object: folder, parameters."""


def run(options: Options) -> int:
    """Adopt; 0."""
    from gemwright.adopt import adopt, read_text

    calibration = None if options.calibration is None else read_text(Path(options.calibration).expanduser())
    out = Path(options.out).expanduser().resolve()
    config = adopt(
        options.source,
        out,
        calibration=calibration,
        overwrite=options.overwrite,
        progress=not options.json and sys.stderr.isatty(),
    )
    if options.json:
        print(json.dumps({"folder": str(out), "parameters": config.num_parameters()}))
    else:
        print(f"{out}: {config.num_parameters():,} parameters in {config.num_hidden_layers} layers")
    return 0
