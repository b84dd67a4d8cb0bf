"""The worked examples: their numbers, and that the page for learners shows what they print."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


def example(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(name):
    """Return the output of a script as the page has it, and what the page says about it."""
    page = (DOCS / "one-by-one.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- output of {name}\.py(.*?) -->\n```text\n(.*?)\n```", page, re.DOTALL)
    return found[1], found[0]


def check_page(name, printed):
    """Compare the page with what was printed: every character, or every character but the numbers."""
    text, remark = shown(name)
    if remark:
        text, printed = NUMBER.sub("#", text), NUMBER.sub("#", printed)
    assert printed.strip() == text.strip()


def test_every_example_is_on_the_page_and_tested_here():
    names = {path.stem for path in (DOCS / "examples").glob("*.py")}
    page = (DOCS / "one-by-one.md").read_text(encoding="utf-8")
    assert (
        names == set(re.findall(r"<!-- output of (\w+)\.py", page)) == set(re.findall(r"\(examples/(\w+)\.py\)", page))
    )
    assert all(f'example("{name}")' in Path(__file__).read_text(encoding="utf-8") for name in names)


def test_one_channel(capsys):
    result = example("one_channel").main()
    assert result[0].tolist() == [2, 4, 6, 12, 10, 16]  # the row that the notes give
    assert result.tolist()[5] == [10, 8, 18, 16, 6, 10]
    check_page("one_channel", capsys.readouterr().out)


def test_many_channels(capsys):
    result, by_hand = example("many_channels").main()
    assert result.shape == (1, 8, 6, 6)
    assert result[0, 0, 0, 0] == by_hand > 0
    assert (result >= 0).all()
    printed = capsys.readouterr().out
    assert len(printed.split("32 products: ")[1].splitlines()[0].split()) == 32
    check_page("many_channels", printed)


def test_dense_at_every_pixel(capsys):
    assert example("dense_at_every_pixel").main() <= 8
    check_page("dense_at_every_pixel", capsys.readouterr().out)


def test_shrink_channels(capsys):
    costs = example("shrink_channels").main()
    assert [costs[filters].macs for filters in (32, 192)] == [28 * 28 * 192 * 32, 28 * 28 * 192 * 192]
    assert [costs[filters].parameters for filters in (32, 192)] == [192 * 32 + 32, 192 * 192 + 192]
    assert costs[32].layers[-1].output_shape == (1, 32, 28, 28)
    assert costs[192].layers[-1].output_shape == (1, 192, 28, 28)
    check_page("shrink_channels", capsys.readouterr().out)


def test_bottleneck(capsys):
    costs, timings = example("bottleneck").main(images=1, runs=3)
    narrow, wide = costs.values()
    assert narrow.macs == 28 * 28 * (256 * 64 + 64 * 256 * 16)
    assert wide.macs == 28 * 28 * 256 * 256 * 16
    assert wide.macs / narrow.macs == pytest.approx(64 / 17)
    assert timings.keys() == costs.keys()
    assert all(0 < t.low_ms <= t.median_ms <= t.high_ms for t in timings.values())
    counted, measured = capsys.readouterr().out.split("\n\n")
    check_page("bottleneck", counted)
    assert "float32, channels_last" in measured


def test_choose_colours(capsys, tmp_path):
    result = example("choose_colours").main(tmp_path / "picture.png")
    assert result.accuracy > 0.95
    assert result.influence["red"] > 0
    assert result.influence["green"] + result.influence["blue"] < 0
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (3 * 640, 427)
    # the answer is the flower: white in its middle, black in the leaves
    answer = result.picture[:, 2 * 640 :, 0].float() / 255
    assert answer[150:190, 290:330].mean() > 0.9
    assert answer[:60, :120].mean() < 0.1
    check_page("choose_colours", capsys.readouterr().out)


def test_choose_colours_is_the_same_twice():
    pictures = [example("choose_colours").main().picture for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(pictures))
