"""Text and tokenizer of the comparison.

    python recipes/distill-vs-scratch/prepare.py --out DIR [--packages FOLDER]

The prose is that of `recipes/mini/data.py`, which has its sources and licences. Files in DIR:

    teacher.jsonl     all documents to train on, in a random order
    student.jsonl     the first of them, `--tokens` tokens
    heldout.jsonl     documents that nobody reads
    tokenizer/        a byte-level BPE of 8192 ids, learned from teacher.jsonl
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.append(str(Path(__file__).resolve().parent.parent / "mini"))
from data import documents, english, fetch, split_of

IDS = 8192
SPECIAL = ("<pad>", "<eos>", "<bos>")


def write(path: Path, texts: Iterable[str]) -> None:
    """Write a row of text for each document."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def learn(texts: list[str], folder: Path) -> Tokenizer:
    """A tokenizer of the text, as a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=IDS, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="unpacked packages; fetched to OUT/packages where not given")
    parser.add_argument("--tokens", type=float, default=5.05e6, help="of student.jsonl")
    parser.add_argument("--heldout", type=float, default=2.5e5, help="tokens of heldout.jsonl")
    args = parser.parse_args()
    root = args.packages or args.out / "packages"
    if not root.exists():
        fetch(root)
    texts = sorted({text for found in documents(root).values() for text in found if english(text)})
    random.Random(0).shuffle(texts)
    split = {name: [text for text in texts if split_of(text, 50) == name] for name in ("train", "heldout")}
    tokenizer = learn(split["train"], args.out / "tokenizer")
    write(args.out / "teacher.jsonl", split["train"])
    for name, source, most in (("student", "train", args.tokens), ("heldout", "heldout", args.heldout)):
        taken, tokens = 0, 0
        while tokens < most and taken < len(split[source]):
            tokens += len(tokenizer.encode(split[source][taken]).ids)
            taken += 1
        write(args.out / f"{name}.jsonl", split[source][:taken])
        print(f"{name}: {taken} documents, {tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
