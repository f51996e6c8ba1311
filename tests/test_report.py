"""The page that a run leaves: it stands alone, has every part, and its perplexity is that of the whole model."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from models import save_text, tiny_model
from transformers import AutoModelForCausalLM

from vllm_wkvquant.quantize import report
from vllm_wkvquant.quantize.calibration import read_windows
from vllm_wkvquant.quantize.estimate import Estimate
from vllm_wkvquant.quantize.pipeline import quantize
from vllm_wkvquant.quantize.plan import Settings, Storage
from vllm_wkvquant.quantize.writer import PAGE_FILE

SAMPLES, SEQ_LEN, LAYERS = 4, 48, 2
UNCLOSED = ("meta", "!doctype")


class Balanced(HTMLParser):
    """Fails where a tag closes that is not the one opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=["rtn", "best"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Report, directory and page of a run, whose name has characters that HTML knows."""
    root = tmp_path_factory.mktemp("report")
    model, text = tiny_model(root / "model", num_layers=LAYERS), save_text(root / "calib.txt")
    out = root / "<a&b>"
    found = quantize(Settings(model, out, text, recipe=request.param, samples=SAMPLES, seq_len=SEQ_LEN))
    return found, root, (out / PAGE_FILE).read_text()


def test_the_page_stands_alone(made: tuple[dict[str, Any], Path, str]) -> None:
    page = made[2]
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.addresses == []
    assert "<script" not in page
    assert "&lt;a&amp;b&gt;" in page
    assert "$" not in page
    assert "nan" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 5 + LAYERS
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_page_has_what_the_run_found(made: tuple[dict[str, Any], Path, str]) -> None:
    found, _, page = made
    learned = found["recipe"]["name"] == "best"
    for row in (*found["candidates"].values(), *([found["weights"]] if learned else [])):
        assert report.plus_minus(row) in page
    for perplexity in found["perplexity"].values():
        assert report.number(perplexity, 5) in page
    for layer, block in enumerate(found["layers"]):
        for name, error in block["weight_error"].items():
            assert f"{name}, block {layer}: {report.number(error)}<" in page
        for name, count in block["shift_pairs"].items():
            assert f"{name}, block {layer}: {count}<" in page
        for name, clip in block.get("clip", {}).items():
            assert f"{name}, block {layer}: {report.number(clip['min'])}<" in page
        if learned:
            assert f"learned, block {layer}: {report.number(block['output_error']['learned'])}<" in page
            assert f"last epoch, block {layer}: {report.number(block['loss'][-1])}<" in page
    assert ("Clipping" in page) == learned
    assert page.count("before all of them were tuned together") == 2 * learned
    parts = ["load", "round", "reference", "search", "candidates"]
    for part in parts + ["learn", "clips", "targets", "exact"] * learned:
        assert f">{part}, block 1: " in page


def test_seconds_are_those_that_the_estimate_is_of() -> None:
    """Of blocks, what follows them, and nothing that was done before the run was resumed."""
    maxima = torch.ones(1, 64)
    blocks = [report.BlockDetail({"learn": 2.0**i, "load": 0.0}, *[maxima] * 5) for i in range(4)]
    estimated = Estimate(1e15, 77.0, 1.0, 0, 10**9, Storage(), 1, 1)
    for done, shown in ((0, "20"), (2, "17"), (3, "13")):
        page = report.costs(blocks, estimated, report.Took(done, {"logits": 2.0, "tuning": 3.0}, {"host": 10**9}))
        assert f"<td>77</td><td>{shown}</td>" in page
        assert (f"from block {done} on" in page) == bool(done)


def test_perplexity_is_the_whole_models(made: tuple[dict[str, Any], Path, str]) -> None:
    found, root, _ = made
    if "exact" not in found["perplexity"]:
        pytest.skip("16-bit weights are not run where nothing is learned")
    windows = read_windows(root / "model", root / "calib.txt", SAMPLES, SEQ_LEN, seed=0)
    tokens = windows.tokens[windows.statistics :]
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)(tokens, labels=tokens).loss
    assert found["perplexity"]["exact"] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_scales() -> None:
    scale = report.Scale([1.0, 100.0], 200, 0, log=True)
    assert [scale(v) for v in (0.0, 1.0, 10.0, 100.0)] == pytest.approx([200, 200, 100, 0])
    assert scale.ticks() == [1, 10, 100]
    scale = report.Scale([2.0, 4.0], 200, 0, log=False)
    assert [scale(v) for v in (0.0, 4.0)] == pytest.approx([200, 0])
    assert scale.ticks() == [0, 1, 2, 3, 4]
    for same in ([5.0, 5.0], [0.0], []):
        for log in (False, True):
            assert report.Scale(same, 10, 0, log).ticks()
