"""Tiny tokenizers made on the spot: Gemma's layout of ids, Llama's leading space, GPT-2's bytes, and sentencepiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The capital of France is Paris.\nThe capital of Italy is Rome.",
    "user\nHello there, how are you?",
    "model\nHello! I am fine.\nThank you, and you?",
    "user\nTell me of the end of a turn, the start of a turn and the end of the line.\n",
    "Zwölf Boxkämpfer jagen Viktor. L'été est là, où êtes-vous ?",
    "  two leading spaces, def f(x):\n    return x + 1\n",
] * 4
LAYOUT = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{n}>" for n in range(102)), "<start_of_turn>", "<end_of_turn>"]
CONTROL = [*LAYOUT[:4], "<start_of_turn>", "<end_of_turn>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CONFIG = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

PUBLISHED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for turn in messages %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no alternation') }}{% endif %}"
    "{% set name = 'model' if turn['role'] == 'assistant' else turn['role'] %}"
    "{{ '<start_of_turn>' + name + '\n' + turn['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""What Gemma 2's published template does, in words of our own."""


def gemma(folder: Path, *, config: dict[str, Any] | None = None, leading_space: bool = False) -> Path:
    """tokenizer.json as Gemma 2 has it: spaces become U+2581, one BPE over the text, byte fallback. `leading_space`
    gives Llama's: a space in front, stripped again by the decoder."""
    space = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if leading_space else space
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    tokens = [*LAYOUT, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * leading_space)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in LAYOUT if token not in CONTROL])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return _write(folder, tokenizer, CONFIG if config is None else config)


def byte_level(folder: Path) -> Path:
    """tokenizer.json as GPT-2 and SmolLM2 have it, with ChatML's tokens and no BOS of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["→ arrow"])  # outside the byte alphabet
    return _write(folder, tokenizer, {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2]})


def sentence_piece(folder: Path, *, leading_space: bool = False) -> Path:
    """tokenizer.model alone, Gemma's way; `leading_space` gives Llama's dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=LAYOUT[4:],
        add_dummy_prefix=leading_space,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}), encoding="utf-8"
    )
    return folder
