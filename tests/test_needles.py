"""benchmarks/needles.py: its prompts, scores and statistics, a real engine, and that it goes on where it stopped."""

import json
import math
import re
from pathlib import Path
from typing import Any

import needle_prompts
import needles
import pytest
from models import tiny_model
from needle_prompts import TASKS, Prompts, Trial, numbers
from transformers import AutoTokenizer

from vllm_wkvquant import cli, ops
from vllm_wkvquant.config import ConfigError

LENGTH, CHUNK = 1500, 64
WORD = "abcdefg hijkl mnopqrs. "  # a sentence of the text, one token a character


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its checkpoint and a text."""
    path = tmp_path_factory.mktemp("needles")
    tiny_model(path / "model", num_layers=2, max_position_embeddings=4096)
    (path / "text.txt").write_text(WORD * 200)
    command = ["quantize", path / "model", path / "ckpt", "--calib-text", path / "text.txt"]
    command += ["--samples", 4, "--seq-len", 64, "--recipe", "rtn"]
    assert cli.main([str(x) for x in command]) == 0
    return path


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Prompts:
    return Prompts(folder / "model", folder / "text.txt")


def decode(tokens: list[int]) -> str:
    """What the tiny tokenizer's own decoder would put blanks into."""
    return "".join(map(chr, tokens))


def made(prompts: Prompts, task: str, depths: tuple[float, ...] = (0.5,), count: int = 4, seed: int = 0) -> list[Trial]:
    return prompts.trials(task, LENGTH, list(depths), count, CHUNK, seed)


@pytest.mark.parametrize("task", TASKS)
def test_length_is_exact(prompts: Prompts, task: str) -> None:
    for trial in made(prompts, task):
        assert len(trial.prompt) + prompts.answer_tokens(TASKS[task]) == LENGTH


@pytest.mark.parametrize("task", TASKS)
def test_needles_are_in_the_prompt_and_past_when_the_question_is_read(prompts: Prompts, task: str) -> None:
    for trial in made(prompts, task, (0.0, 0.3, 1.0), 12):
        text = decode(trial.prompt)
        said = re.findall(r"\d+", text)
        assert len(set(said)) == TASKS[task].needles
        assert len(trial.codes) == TASKS[task].asked
        assert all(len(prompts.encode(code)) == 7 for code in trial.codes)
        asked = decode(trial.prompt[trial.start : trial.end])
        assert set(trial.codes) <= set(re.findall(r"\d+", asked))
        assert asked.startswith(needle_prompts.NEEDLE.partition("{")[0])
        assert asked.endswith(".")
        assert trial.shared - trial.end >= CHUNK
        assert not re.search(r"\d", decode(trial.prompt[trial.shared :]))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needle_is_at_its_depth_between_sentences(prompts: Prompts, depth: float) -> None:
    for task in ("passkey", "multi"):
        for trial in made(prompts, task, (depth,)):
            before = decode(trial.prompt[len(prompts.before) : trial.start])
            assert before == "" or before.endswith((".", "\n"))
            # other needles stand in proportion before it
            text = trial.shared - len(prompts.before) - CHUNK
            assert (trial.start - len(prompts.before)) / text == pytest.approx(depth, abs=0.1)


def test_filler_is_the_text(prompts: Prompts) -> None:
    (trial,) = made(prompts, "passkey", count=1)
    needle = trial.prompt[trial.start : trial.end]
    filler = trial.prompt[len(prompts.before) : trial.start] + trial.prompt[trial.end : trial.shared]
    assert decode(filler) in WORD * 200
    assert trial.codes[0] in decode(needle)


def test_other_question_follows_the_same_text(prompts: Prompts, folder: Path) -> None:
    """The template is around both."""
    (trial,) = made(prompts, "passkey", count=1)
    question = decode(trial.prompt[trial.shared :])
    assert "?" in question
    assert needle_prompts.OTHER_QUESTION in decode(prompts.other_question)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "<{{ messages[0].content }}>{% if add_generation_prompt %}:{% endif %}"
    tokenizer.save_pretrained(folder / "chat")
    chat = Prompts(folder / "chat", folder / "text.txt")
    (trial,) = made(chat, "passkey", count=1)
    assert decode(trial.prompt).startswith("<")
    assert "?>:" in decode(trial.prompt[trial.shared :])
    assert decode(chat.other_question).endswith(">:")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    (trial,) = made(Prompts(folder / "plain", folder / "text.txt"), "passkey", count=1)
    assert decode(trial.prompt).startswith(needle_prompts.INTRODUCTION)


def test_trials_are_of_the_seed_and_differ(prompts: Prompts) -> None:
    first = made(prompts, "multi", (0.0, 0.5), 6)
    assert made(prompts, "multi", (0.0, 0.5), 6) == first
    assert made(prompts, "multi", (0.0, 0.5), 3) == first[:3]
    assert [trial.depth for trial in first] == [0.0, 0.5] * 3
    assert len({tuple(trial.codes) for trial in first}) == 6
    assert made(prompts, "multi", (0.0, 0.5), 6, seed=1)[0].codes != first[0].codes


def test_codes_of_few_tokens_are_refused(folder: Path) -> None:
    made(Prompts(folder / "model", folder / "text.txt", digits=5), "passkey")
    with pytest.raises(ConfigError, match="--digits 4 makes codes of 4 tokens"):
        made(Prompts(folder / "model", folder / "text.txt", digits=4), "passkey")


def test_right_are_the_first_numbers() -> None:
    assert numbers(" 4821337.", 1) == ["4821337"]
    assert numbers(" 4821337. Remember it: 17", 1) == ["4821337"]
    assert numbers(" 482133", 1) != ["4821337"]
    assert numbers(" 12 or 4821337", 1) != ["4821337"]
    assert numbers(" 12. That of the candle is 34.", 2) == ["12", "34"]
    assert numbers(" none", 1) == []


def test_paired_interval_by_hand() -> None:
    """n = 98, 5 gained, 13 lost: g' = 0.06, l' = 0.14, n' = 100; se = sqrt((0.2 - 0.0064) / 100) = 0.044."""
    difference, low, high = needles.paired(5, 13, 98)
    assert difference == pytest.approx(-100 * 8 / 98)
    assert (low, high) == (pytest.approx(-8 - 1.96 * 4.4), pytest.approx(-8 + 1.96 * 4.4))
    assert needles.paired(13, 5, 98) == pytest.approx((-difference, -high, -low))
    difference, low, high = needles.paired(0, 0, 398)
    assert difference == 0
    assert high == -low == pytest.approx(196 * math.sqrt(2 / 400 / 400))


def test_lengths_count_where_fp16_is_right(folder: Path) -> None:
    """9 of 10 count, 8 do not; differences are over what counts and what both have."""
    trials = [Trial([1], ["1"], 0.5, 0, 1, 1)] * 10
    points = [needles.Point("passkey", length, "chunked", trials, None, 4) for length in (100, 200)]

    def row(right: int) -> dict[str, Any]:
        answers = ["1"] * right + ["2"] * (10 - right)
        return points[0].score({"answers": answers, "cached": [0] * 10})

    rows = {"fp16": [row(9), row(8)], "w4": [row(7), row(10)], "w4kv4": [row(8), {"error": "no"}]}
    found = needles.outcomes(points, rows)
    assert [trial.counts for trial in found] == [True] * 10 + [False] * 10
    assert found[9].right == {"fp16": 0, "w4": 0, "w4kv4": 0}
    assert found[19].right == {"fp16": 0, "w4": 1}
    assert needles.percent(found[:10], "w4kv4") == "80.0"
    differences = {r[0]: r[1:] for r in needles.difference_rows(found[:10], list(rows))}
    assert set(differences) == {"w4 - fp16", "w4kv4 - w4", "w4kv4 - fp16"}
    assert (differences["w4kv4 - w4"][0], *differences["w4kv4 - w4"][2:]) == ("+10.00", 1, 0, 10)
    assert (differences["w4kv4 - fp16"][0], *differences["w4kv4 - fp16"][2:]) == ("-10.00", 0, 1, 10)


def arguments(folder: Path, out: Path, *more: Any) -> list[str]:
    common = [folder / "model", folder / "ckpt", "--text", folder / "text.txt", "--output", out, "--trials", 4]
    common += ["--lengths", LENGTH, "--depths", "0,1", "--chunk", CHUNK, "--kv-cache-gb", "0.02", "--enforce-eager"]
    return [str(x) for x in [*common, "--max-num-batched-tokens", 256, *more]]


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_through_an_engine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights find nothing, but needles come from the prefix cache where they should and only there."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # half the processes to start
    out = tmp_path / "rows.jsonl"
    assert needles.main(arguments(folder, out, "--variants", "w4,w4kv4", "--tasks", "passkey")) == 0
    rows = read(out)
    modes = [("w4", "chunked"), ("w4", "cached"), ("w4kv4", "chunked"), ("w4kv4", "cached")]
    assert [(row["variant"], row["mode"]) for row in rows] == modes
    trials = made(Prompts(folder / "model", folder / "text.txt"), "passkey", (0.0, 1.0))
    for row in rows:
        assert "error" not in row
        assert len(row["answers"]) == len(row["correct"]) == 4
        assert row["depths"] == [0, 1, 0, 1]
        expected = [trial.end if row["mode"] == "cached" else 0 for trial in trials]
        assert all(cached >= end for cached, end in zip(row["cached"], expected, strict=True))
        assert row["mode"] == "cached" or not any(row["cached"])
        kernels = ops.default_variant(row["device"], 64) if row["variant"] == "w4kv4" else None
        assert row.get("kernels") == kernels
    assert rows[2]["kv_cache_tokens"] > 3 * rows[0]["kv_cache_tokens"]


class Fake:
    """Stands in for run_cell: right answers but for the last `wrong` prompts, and prefixes that were cached."""

    def __init__(self, wrong: int = 0, cached: int = LENGTH, error: str | None = None) -> None:
        self.wrong, self.cached, self.error = wrong, cached, error
        self.specs: list[dict[str, Any]] = []

    def __call__(self, spec: dict[str, Any], *_: Any) -> tuple[list[dict[str, Any]], str | None]:
        self.specs.append(spec)
        rows = []
        for point in spec["points"]:
            # a passkey is the only number of its prompt
            answers = [re.findall(r"\d+", decode(p))[0] for p in point["prompts"]]
            answers[len(answers) - self.wrong :] = ["no"] * self.wrong
            rows.append({"answers": answers, "cached": [self.cached] * len(answers), "seconds": 1.0})
        return (rows[:1], self.error) if self.error else (rows, None)


def run(monkeypatch: pytest.MonkeyPatch, fake: Fake, command: list[str]) -> list[dict[str, Any]]:
    """The specifications of the cells."""
    monkeypatch.setattr(needles, "run_cell", fake)
    assert needles.main(command) == 0
    return fake.specs


def test_variants_have_the_same_prompts_and_their_caches(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    command = arguments(folder, tmp_path / "rows.jsonl", "--tasks", "passkey")
    fp16, w4, w4kv4 = run(monkeypatch, Fake(), command)
    assert fp16["points"] == w4["points"] == w4kv4["points"]
    assert [Path(spec["engine"]["model"]).name for spec in (fp16, w4, w4kv4)] == ["model", "ckpt", "ckpt"]
    assert [spec["engine"]["kv_cache_dtype"] for spec in (fp16, w4, w4kv4)] == ["bfloat16", "bfloat16", "auto"]
    assert {spec["engine"]["long_prefill_token_threshold"] for spec in (fp16, w4, w4kv4)} == {CHUNK}
    chunked, cached = fp16["points"]
    assert chunked["others"] is None
    for prompt, other in zip(cached["prompts"], cached["others"], strict=True):
        assert prompt not in cached["others"]
        assert len(prompt) + cached["max_tokens"] == fp16["engine"]["max_model_len"] == LENGTH
        assert len(other) <= LENGTH
    printed = capsys.readouterr().out
    assert re.search(r"passkey \| cached +\| 1500 +\| 4 +\| yes +\| 100.0 \| 100.0 \| 100.0", printed)
    assert re.search(r"all +\| cached +\| w4kv4 - w4 +\| \+0.00", printed)


def test_rows_of_the_file_are_not_computed_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "rows.jsonl"
    command = arguments(folder, out, "--tasks", "passkey", "--modes", "chunked", "--variants", "fp16")
    run(monkeypatch, Fake(), command)
    before = read(out)
    assert run(monkeypatch, Fake(), command) == []
    more = arguments(folder, out, "--tasks", "passkey", "--variants", "fp16", "--lengths", f"{LENGTH},1700")
    (spec,) = run(monkeypatch, Fake(), [*more, "--trials", "8", "--gpu-memory-utilization", "0.5"])
    assert [len(point["prompts"]) for point in spec["points"]] == [4, 4, 4]
    assert read(out)[:1] == before
    assert [(row["length"], row["mode"]) for row in read(out)[1:]] == [
        (LENGTH, "cached"),
        (1700, "chunked"),
        (1700, "cached"),
    ]
    assert len(run(monkeypatch, Fake(), [*command, "--seed", "1"])) == 1


def test_errors_are_kept_and_measured_again(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A cell that ended early, and needles that were not in the prefix cache."""
    out = tmp_path / "rows.jsonl"
    command = arguments(folder, out, "--tasks", "passkey", "--variants", "w4kv4")
    run(monkeypatch, Fake(error="ended by SIGKILL"), command)
    assert [row.get("error") for row in read(out)] == [None, "ended by SIGKILL"]
    (spec,) = run(monkeypatch, Fake(cached=200), command)
    assert len(spec["points"]) == 1
    assert re.match(r"prompt \d: 200 tokens from the prefix cache, its needles end at", read(out)[1]["error"])
    run(monkeypatch, Fake(wrong=1), command)
    assert [row["accuracy"] for row in read(out)] == [1, 0.75]
    assert read(out)[1]["correct"] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", 5000], "more than the 4096 positions"),
        (["--lengths", 4000, "--text", "short.txt"], "--text has 23"),
        (["--lengths", 300], "of text, and --chunk has 64"),
        (["--depths", "0,1.5"], r"must be in 0 \.\. 1"),
        (["--trials", 0], "must be positive"),
        (["--digits", 3], "--digits 3 makes codes of 3 tokens"),
        (["--text", "/no/such.txt"], "does not exist"),
        (["--output", "/no/such/out.jsonl"], "is not a directory"),
    ],
)
def test_bad_arguments_are_refused(
    folder: Path, tmp_path: Path, monkeypatch, capsys, more: list[Any], message: str
) -> None:
    (tmp_path / "short.txt").write_text(WORD)
    monkeypatch.chdir(tmp_path)
    assert needles.main(arguments(folder, tmp_path / "out.jsonl", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error
