"""Talk to a model with 20 fixed prompts at its default sampling, print what it says, and count what goes wrong.

    python recipes/mini/converse.py [FOLDER]        # the bundled model without FOLDER

Counted: answers that end by themselves within 256 tokens, and answers in which some four tokens in a row come more than
three times. Goal for the bundled model: at least 18 end, none repeats.
"""

import sys
from collections import Counter

import gemwright

PROMPTS = (
    "Hello! How are you today?",
    "Who are you?",
    "What is the capital of France?",
    "Tell me a joke.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "What is the difference between a frog and a toad?",
    "Give me three tips for sleeping well.",
    "How do I boil an egg?",
    "What is 12 plus 30?",
    "Explain gravity to a child.",
    "Write a short story about a lost dog.",
    "What should I pack for a weekend in the mountains?",
    "Thank you for your help!",
    "What is a computer?",
    "Write a polite email asking for a day off.",
    "Name five fruits.",
    "How do I write a for loop in Python?",
    "Is it better to live in a city or in the country?",
    "Summarize in one sentence: The sun is a star. It gives us light and warmth. Without it there would be no life.",
)
LIMIT = 256


def repeats(tokens: list[int]) -> int:
    """How often the commonest four tokens in a row come."""
    return max(Counter(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False)).values(), default=0)


def main() -> None:
    lm = gemwright.load(sys.argv[1] if len(sys.argv) > 1 else None)
    ended = repeating = 0
    for seed, prompt in enumerate(PROMPTS):
        answer = lm.generate([{"role": "user", "content": prompt}], max_new_tokens=LIMIT, seed=seed)
        most = repeats(answer.tokens)
        ended += answer.finish_reason == "stop"
        repeating += most > 3
        note = f"{len(answer.tokens)} tokens, {answer.finish_reason}, commonest 4-gram {most} times"
        print(f"> {prompt}\n{answer.text}\n[{note}]\n", flush=True)
    print(f"{ended} of {len(PROMPTS)} ended by themselves within {LIMIT} tokens; {repeating} repeat a 4-gram > 3 times")


if __name__ == "__main__":
    main()
