"""Prompts of needles.py: codes hidden in a text, questions for them, and what counts as a right answer.

A prompt is [template, text with needles, question, template, start of the answer] as tokens, so that its length and the
places of its needles are exact. Template: the tokenizer's chat template, or its prefix where it has none.
"""

import bisect
import random
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.text import load_tokenizer, read_tokens

MIN_CODE_TOKENS = 5
SPARE_TOKENS = 8  # of an answer
MAX_SENTENCE = 64  # tokens that a needle may stand before its depth; in longer sentences it interrupts them
NAMES = (
    *("anchor", "basket", "candle", "dagger", "engine", "feather", "garden", "hammer", "island", "jacket"),
    *("kettle", "ladder", "mirror", "needle", "orchard", "pencil", "quilt", "rocket", "saddle", "tunnel"),
)
# of the wordings that were tried, what SmolLM2-135M in 16 bits answers best
NEEDLE = " One of the special magic numbers for {} is: {}."
INTRODUCTION = (
    "Special magic numbers are hidden in the following text. Memorize them. I will ask you for them afterwards.\n"
)
QUESTION = "What is the special magic number for {} mentioned in the text above?"
QUESTIONS = "What are the special magic numbers for {} mentioned in the text above?"
ANSWER = "The special magic number for {} is:"
OTHER_QUESTION = "What is the text above about? Answer in one sentence."


@dataclass(frozen=True)
class Task:
    """needles: codes in a text, under names out of these; asked: how many of them the question is for."""

    needles: int
    asked: int
    names: tuple[str, ...] = NAMES


TASKS = {"passkey": Task(1, 1, ("pass key",)), "multi": Task(4, 1), "multi-all": Task(4, 4)}


@dataclass(frozen=True)
class Trial:
    """A prompt and the codes that answer it, in the order asked.

    depth: of the needle that is asked for first; start, end: tokens before the first needle asked for and up to the end
    of the last one; shared: tokens before the question.
    """

    prompt: list[int]
    codes: list[str]
    depth: float
    start: int
    end: int
    shared: int


def numbers(answer: str, count: int) -> list[str]:
    """The first `count` numbers of an answer; it is right where they are the codes."""
    return re.findall(r"\d+", answer)[:count]


class Prompts:
    """Makes trials out of a text, for a model's tokenizer. digits: of a code."""

    def __init__(self, model: Path, text: Path, digits: int = 7) -> None:
        """Raises ConfigError where the tokenizer or the text cannot be read."""
        self.tokenizer = load_tokenizer(model)
        tokens, prefix = read_tokens(model, text, "--text")
        self.tokens = list(tokens)
        ends = {t for t in set(self.tokens) if self.tokenizer.decode([t]).rstrip(" ").endswith((".", "\n"))}
        self.sentences = [0, *(i + 1 for i, t in enumerate(self.tokens) if t in ends)]
        self.digits = digits
        mark = "<text>"
        before, after = "", "\n"
        if self.tokenizer.chat_template:
            prefix = []
            messages = [{"role": "user", "content": mark}]
            chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, after = chat.partition(mark)
        self.before = prefix + self.encode(before + INTRODUCTION)
        self.after = after
        self.other_question = self.encode(f"\n\n{OTHER_QUESTION}{after}")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer_tokens(self, task: Task) -> int:
        """Room for an answer."""
        one = max(len(self.encode(f" {'5' * self.digits}.\n{ANSWER.format(name)}")) for name in NAMES)
        return task.asked * one + SPARE_TOKENS

    def question(self, names: list[str]) -> list[int]:
        """Tokens from the end of the text to the start of the answer."""
        *others, last = names
        asked = QUESTIONS.format(f"{', '.join(others)} and {last}") if others else QUESTION.format(last)
        return self.encode(f"\n\n{asked}{self.after}{ANSWER.format(names[0])}")

    def place(self, filler: int, target: int) -> int:
        """Where a needle goes in the text that begins at token `filler`: `target`, or the start of its sentence."""
        at = self.sentences[bisect.bisect(self.sentences, filler + target) - 1] - filler
        return at if 0 <= target - at <= MAX_SENTENCE else target

    def trial(self, name: str, length: int, depth: float, margin: int, seed: str) -> Trial:
        """A prompt that is `length` tokens long together with the room for its answer.

        depth: of the first needle asked for, 0 at the start of the text, 1 at `margin` tokens before its end; the
        other needles are spread evenly from there, past 1 going on at 0. Raises ConfigError where the prompt or the
        text is too short, or a code is too few tokens.
        """
        task, rng = TASKS[name], random.Random(seed)
        names = rng.sample(task.names, task.needles)
        codes = [str(rng.randrange(10 ** (self.digits - 1), 10**self.digits)) for _ in names]
        shortest = min(len(self.encode(code)) for code in codes)
        if shortest < MIN_CODE_TOKENS:
            raise ConfigError(f"--digits {self.digits} makes codes of {shortest} tokens; {MIN_CODE_TOKENS} are needed")
        needles = [self.encode(NEEDLE.format(*needle)) for needle in zip(names, codes, strict=True)]
        question = self.question(names[: task.asked])
        size = length - self.answer_tokens(task) - sum(map(len, (self.before, question, *needles)))
        if size <= margin:
            raise ConfigError(f"--lengths {length} leaves {max(0, size)} tokens of text, and --chunk has {margin}")
        if size > len(self.tokens):
            raise ConfigError(f"--lengths {length} needs {size} tokens of text, and --text has {len(self.tokens)}")
        last = bisect.bisect(self.sentences, len(self.tokens) - size) - 1
        filler = self.sentences[rng.randint(0, last)]
        depths = [depth + k / task.needles for k in range(task.needles)]
        places = [self.place(filler, int((d if d <= 1 else d - 1) * (size - margin))) for d in depths]
        prompt, done, spans = list(self.before), 0, {}
        for k in sorted(range(task.needles), key=places.__getitem__):
            prompt += self.tokens[filler + done : filler + places[k]]
            spans[k] = (len(prompt), len(prompt) + len(needles[k]))
            prompt += needles[k]
            done = places[k]
        prompt += self.tokens[filler + done : filler + size]
        asked = [spans[k] for k in range(task.asked)]
        return Trial(
            prompt=prompt + question,
            codes=codes[: task.asked],
            depth=depth,
            start=min(start for start, _ in asked),
            end=max(end for _, end in asked),
            shared=len(prompt),
        )

    def trials(self, name: str, length: int, depths: list[float], count: int, margin: int, seed: int) -> list[Trial]:
        """`count` trials, each of the next depth; the same for the same arguments."""
        return [
            self.trial(name, length, depths[i % len(depths)], margin, f"{seed} {name} {length} {i}")
            for i in range(count)
        ]
