"""The documentation: every block of code in it runs, every verb in it is understood, and the site has no dead link."""

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from starlette.testclient import TestClient
from torch import nn

import nin
from nin import server
from nin.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"", "text", "python", "sh", "json"}


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def verbs(text):
    """Return the nin commands in a block of a shell, as lists of words."""
    lines = [line for line in text.splitlines() if line.startswith("nin ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def serve(monkeypatch, run):
    """Let httpx reach the application without a socket."""
    client = TestClient(server.create_app(run), base_url="http://127.0.0.1:8646")
    monkeypatch.setattr(httpx, "post", client.post)
    Image.new("L", (8, 8), 90).save("a.png")
    Image.new("L", (8, 8), 20).save("b.jpg")


def small_network(monkeypatch, run):
    """Put a network that takes a moment, and no download, in ResNet-18's and in mypackage's place, and narrow it."""

    def make(**_):
        convs = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))

    monkeypatch.setattr(torchvision.models, "resnet18", make)
    package, models = types.ModuleType("mypackage"), types.ModuleType("mypackage.models")
    package.models, models.make = models, make
    monkeypatch.setitem(sys.modules, "mypackage", package)
    monkeypatch.setitem(sys.modules, "mypackage.models", models)
    batches = [torch.randn(16, 3, 16, 16) for _ in range(4)]
    narrowed = nin.narrow(make().eval(), batches, macs=0.6)
    Path("narrow").mkdir()
    Path("narrow/plan.json").write_text(narrowed.plan.to_json())
    save_file(narrowed.model.state_dict(), "narrow/model.safetensors")
    return {"batches": batches}


# what a page's code finds where it runs
SURROUNDINGS = {"page.md": serve, "narrowing.md": small_network}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    if page.name in SURROUNDINGS:
        names |= SURROUNDINGS[page.name](monkeypatch, run) or {}
    for language, text in blocks(page):
        assert language in LANGUAGES, f"{page.name}: a block must be one of {LANGUAGES}, got {language}"
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "sh":  # run; a block without a language is only read
            for words in verbs(text):
                app.main(words)
        elif language == "json":
            json.loads(text)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_verb_is_understood(page):
    for language, text in blocks(page):
        for words in verbs(text) if language in ("", "sh") else []:
            if words != ["--help"]:
                app.app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_verb_that_is_wrong_is_found():
    (words,) = verbs("nin train photos --colour  # no such option\nnin_other\n")
    with pytest.raises(app.CycloptsError):
        app.app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert set(nin.__all__) - {"data", "models"} <= described


def test_the_site_is_built_without_a_warning_and_a_dead_link():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "build_site.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no dead link" in result.stdout


def test_dead_links_are_found(tmp_path):
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from build_site import dead_links
    finally:
        sys.path.pop(0)
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html">b</a><a href="#top"></a><a href="c.html#no"></a>'
    )
    (tmp_path / "c.html").write_text(
        '<script src="https://example.org/x.js"></script><a href="https://example.org"></a>'
    )
    assert sorted(dead_links(tmp_path)) == [
        "a.html links to b.html: there is no such file",
        "a.html links to c.html#no: there is no such place in that page",
        "c.html loads https://example.org/x.js from another host",
    ]
