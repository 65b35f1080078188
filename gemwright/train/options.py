"""The options of training, each declared once and named as in transformers and TRL; which may change on resume.

Shared ones first, then those of the algorithms. Without torch: the command line's help comes at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from tyro.conf import arg

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "wsd", "warmup_stable_decay"]
Precision = Literal["auto", "bfloat16", "float32", "autocast"]
Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of the loop, named as in transformers and TRL."""

    output_dir: str
    """Folder of the run: checkpoints, log.jsonl, loss.png, and at the end the model."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir, or start where there is none."""
    overwrite_output_dir: bool = False
    """Start anew in a folder that has checkpoints, and remove them."""
    per_device_train_batch_size: int = 8
    """Rows of a batch on each device."""
    per_device_eval_batch_size: int = 8
    """Rows of a batch of the evaluation on each device."""
    gradient_accumulation_steps: int = 1
    """Batches of each device in one update."""
    num_train_epochs: float = 3.0
    """Times the data is seen, where max_steps is not given."""
    max_steps: int | None = None
    """Updates of the run."""
    learning_rate: float = 2e-5
    """Peak of the learning rate."""
    lr_scheduler_type: Scheduler = "linear"
    """Course of the rate after warm-up; wsd (warmup_stable_decay) stays at the peak, and falls at the end."""
    warmup_steps: int = 0
    """Updates over which the rate rises from 0."""
    warmup_ratio: float = 0.0
    """The same as a share of all updates, where warmup_steps is 0."""
    decay_ratio: float = 0.2
    """Share of the updates after warm-up over which wsd falls."""
    min_lr_ratio: float = 0.0
    """Share of the peak that the rate does not fall below."""
    weight_decay: float = 0.0
    """Decay of matrices, a rate times this a step; norm gains are not decayed."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the running mean of its square."""
    adam_epsilon: float = 1e-8
    """Added to the root of the latter."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0: never."""
    max_refused: int = 5
    """End the run after so many updates in a row that were not finite."""
    dtype: Precision = "auto"
    """auto (bfloat16 where the device multiplies it natively, else float32), bfloat16 (with fp32 masters), float32,
    or autocast (fp32 weights, bf16 products)."""
    bf16: bool = False
    """The same as dtype bfloat16."""
    gradient_checkpointing: bool = False
    """Keep a block's input alone and compute the block again in backward: less memory, a third more work."""
    compile: Compile = "auto"
    """Compile the blocks: auto (long runs, where there is a compiler), on, off."""
    cuda_graphs: bool = False
    """Record the model's passes as CUDA graphs: for models so small that launching takes longer than computing. For
    packed rows, all weights trained; batches of another shape than the first run as before. Takes more memory."""
    seed: int = 42
    """Of the order of the data, of fresh weights and of dropout."""
    logging_steps: int = 10
    """Updates between two records of log.jsonl."""
    eval_steps: int | None = None
    """Updates between two evaluations, where there is data for them; default: save_steps."""
    save_steps: int = 500
    """Updates between two checkpoints; the last update is always saved."""
    save_total_limit: int | None = None
    """Keep only the last so many checkpoints, and the best; default: all."""
    load_best_model_at_end: bool = False
    """Deliver the checkpoint with the lowest evaluation loss instead of the last."""
    report_to: tuple[str, ...] = ("none",)
    """tensorboard, wandb, all or none; log.jsonl is always written."""
    run_name: str | None = None
    """Name of the run for the trackers."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N; under torchrun each process takes its own."""
    cpu_offload: bool = False
    """Keep shards, masters and moments in main memory (FSDP2's offload)."""
    zero_stage: Literal[0, 3] | None = None
    """3 is what several processes do anyway: parameters, gradients and moments sharded by FSDP2."""

    token_cache: str | None = None
    """Folder for tokenised data; default: OUTPUT_DIR/tokens."""
    push_to_hub: bool = False
    """Upload the result to the hub."""
    hub_model_id: str | None = None
    """Name on the hub; default: that of output_dir under your own."""
    hub_private_repo: bool = False
    """Make the repository private, if it is new."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed is 1 or more")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed are {low} to {high}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {', '.join(get_args(allowed))}")
        if self.bf16 and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"bf16: given beside dtype {self.dtype}; allowed with auto or bfloat16")

    @property
    def token_folder(self) -> Path:
        """Where tokenised data is kept."""
        return Path(self.token_cache or Path(self.output_dir) / "tokens").expanduser()

    def updates(self, steps: int) -> int:
        """Updates of a run over data whose epoch has `steps`."""
        return self.max_steps or math.ceil(self.num_train_epochs * steps)


_CHOICES: Final[dict[str, Any]] = {"dtype": Precision, "lr_scheduler_type": Scheduler, "compile": Compile}
_AT_LEAST_ONE: Final = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
    "max_refused", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
)  # fmt: skip
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "num_train_epochs": (1e-6, math.inf), "learning_rate": (0.0, math.inf), "warmup_steps": (0, math.inf),
    "warmup_ratio": (0.0, 1.0), "decay_ratio": (1e-6, 1.0), "min_lr_ratio": (0.0, 1.0), "weight_decay": (0.0, math.inf),
    "adam_beta1": (0.0, 1.0), "adam_beta2": (0.0, 1.0), "adam_epsilon": (0.0, math.inf),
    "max_grad_norm": (0.0, math.inf), "seed": (0, 2**63 - 1),
}  # fmt: skip
FREE: Final = (
    "output_dir", "resume", "overwrite_output_dir", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_eval_batch_size", "max_refused", "gradient_checkpointing", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "load_best_model_at_end", "report_to", "run_name", "device", "dtype", "bf16", "cpu_offload",
    "zero_stage", "cuda_graphs", "token_cache", "push_to_hub", "hub_model_id", "hub_private_repo",
)  # fmt: skip
"""Options that a resumed run may change: the numbers do not hang on them (rows of an update and precision are compared
in place of what they are made of)."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained, and which part of it."""

    model_name: Annotated[str, arg(aliases=("--model-name-or-path",))]
    """Folder or hub name of the base model."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub name."""
    offline: bool = False
    """Take hub names from the cache only."""
    attn_implementation: str = "auto"
    """auto, reference, blocked, flex or triton; eager, which others want for Gemma 2, is auto: the same numbers."""
    use_peft: bool = False
    """Train a LoRA adapter (PEFT files) instead of all weights."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """Its update is scaled by alpha / rank."""
    lora_dropout: float = 0.05
    """Share of the update's input that training drops."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """all-linear, attention, or names such as q_proj v_proj."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    load_in_4bit: bool = False
    """QLoRA: hold the base in NF4."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data is trained on, and how it becomes rows; named as in TRL."""

    dataset_name: str
    """JSONL, CSV or Parquet file or glob, a folder that `datasets` saved, or a dataset's name on the hub."""
    dataset_config: str | None = None
    """Configuration of a hub dataset that has several."""
    dataset_train_split: str | None = None
    """Split of a dataset to train on; default: train."""
    dataset_test_split: str | None = None
    """Split of a dataset to evaluate on."""
    eval_dataset_name: str | None = None
    """Other file or dataset to evaluate on."""
    dataset_text_field: str = "text"
    """Column of plain text."""
    dataset_kind: Literal["messages", "prompt_completion", "text"] | None = None
    """What the columns hold, where their names leave it open."""
    answers: Literal["all", "last"] = "all"
    """Which of a conversation's answers carry loss."""
    fold_system: bool = False
    """Put a system message in front of the first user turn; Gemma 2 has no system role."""
    max_seq_length: Annotated[int, arg(aliases=("--max-length",))] = 1024
    """Places of a row: tokens that are read at once."""
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    """What becomes of longer documents."""

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise ValueError(f"max_seq_length: got {self.max_seq_length}, allowed is 1 or more")

    @property
    def eval_name(self) -> str | None:
        """The data to evaluate on: another set, or another split of the same."""
        return self.eval_dataset_name or (self.dataset_name if self.dataset_test_split else None)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig, ModelOptions, DataOptions):
    """The options of fine-tuning, named as in TRL."""

    packing: bool = False
    """Many documents in a row; they do not see each other."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        DataOptions.__post_init__(self)
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit: given without use_peft; a 4-bit base is frozen, train an adapter over it")


SFT_FREE: Final = (
    "model_name", "offline", "attn_implementation", "dataset_name", "eval_dataset_name", "dataset_test_split",
)  # fmt: skip
"""Options that a resumed run may change besides the trainer's: base and data are compared by their content."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """The options of pre-training."""

    model_config: str
    """Shape of the model: a preset (gemma-2-2b, -9b, -27b, debug), or a JSON or YAML file of config.json's fields; what
    is left out is that of 2B, and the vocabulary that of the tokenizer."""
    tokenizer: str
    """Folder or hub name with the tokenizer."""
    dataset_name: str | None = None
    """Text: JSONL, CSV or Parquet file or glob, a folder that `datasets` saved, or a dataset's name on the hub."""
    dataset_config: str | None = None
    """Configuration of a hub dataset that has several."""
    dataset_train_split: str | None = None
    """Split of a dataset; default: train."""
    dataset_text_field: str = "text"
    """Column of the text."""
    shards: str | None = None
    """Folder of tokenised shards (.bin or .npy with sidecars) instead of text."""
    streaming: bool = False
    """Tokenise the text as it is read (a hub dataset: as it is downloaded) instead of beforehand; needs max_steps."""
    eval_dataset_name: str | None = None
    """File or dataset of text to evaluate on."""
    max_seq_length: int = 1024
    """Places of a row. Rows are packed, and longer documents split."""
    attn_implementation: str = "auto"
    """auto, reference, blocked, flex or triton."""
    offline: bool = False
    """Take hub names from the cache only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dataset_name is None) == (self.shards is None):
            raise ValueError("dataset_name, shards: give one of the two, text or tokens")
        if self.streaming and (self.shards is not None or self.max_steps is None):
            raise ValueError("streaming: given without max_steps, or with shards; a stream's length is not known")


PRETRAIN_FREE: Final = (
    "tokenizer", "model_config", "dataset_name", "shards", "eval_dataset_name", "attn_implementation", "offline",
)  # fmt: skip
"""Options that a resumed run may change besides the trainer's: shape and data are compared by their content."""
