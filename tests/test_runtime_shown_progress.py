"""Progress of work that is started from Python: shown in a notebook and on a terminal, and nowhere else."""

import sys
import types

import pytest
import torch
from rich.console import Console
from torch import nn

import nin
from nin.runtime import shown_progress


@pytest.fixture
def notebook(monkeypatch):
    """Pretend to be a notebook; return what its cell shows, one after the other."""
    shown = []
    handle = types.SimpleNamespace(update=lambda content: shown.append(content))
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = (lambda text: text), (lambda content, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr(Console, "__init__", quiet(Console.__init__))
    monkeypatch.setattr(shown_progress, "SECONDS_BETWEEN_UPDATES", 0)
    return shown


def quiet(init):
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.is_jupyter = True

    return made


def test_narrowing_shows_a_bar_in_a_notebook(notebook):
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten())
    options = nin.NarrowOptions(measure_latency=False)
    nin.narrow(model, [torch.randn(32, 4, 8, 8)], macs=0.6, options=options)
    assert len(notebook) > 2
    assert all("<progress" in text for text in notebook[:-1])
    assert notebook[-1] == ""  # nothing is left


def test_names_are_escaped_and_counts_are_shown(notebook):
    with shown_progress.shown_progress("Working", None) as on_progress:
        on_progress("<b> & co", 3, 10)
        on_progress("unknown", 3, 0)
    assert "&lt;b&gt; &amp; co 3 of 10" in notebook[0]
    assert 'max="10" value="3"' in notebook[0]
    assert "max=" not in notebook[1]


def test_it_is_silent_elsewhere_and_where_somebody_else_shows_it(notebook, capsys):
    told = []
    with shown_progress.shown_progress("Working", lambda *progress: told.append(progress)) as on_progress:
        on_progress("x", 1, 2)
    assert (told, notebook) == ([("x", 1, 2)], [])


def test_a_pipe_gets_nothing(capsys):
    with shown_progress.shown_progress("Working", None) as on_progress:
        on_progress("x", 1, 2)
    assert capsys.readouterr() == ("", "")
