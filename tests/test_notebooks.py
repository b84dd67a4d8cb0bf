"""What a notebook shows: tables and pages, with everything escaped that people may have named."""

import html
from html.parser import HTMLParser

import torch
from torch import nn

import nin
from nin import report
from nin.display.tables import html_table
from nin.inference.classifier import Prediction
from nin.models.narrowing_plan import ChannelPruning, LayerPlan, Plan

NASTY = '<script>alert("1")</script> & co'


class Tags(HTMLParser):
    """Collects the tags, the text, and the attributes of the frames of a piece of HTML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.frames = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "iframe":
            self.frames.append(dict(attrs))

    def handle_data(self, data):
        self.text += data + "\n"


def shown(value):
    """Return what a notebook shows; nobody's name has become a tag."""
    found = Tags(value._repr_html_())
    assert set(found.tags) <= {"table", "tr", "th", "td", "p", "iframe"}
    return found


def test_a_table_escapes_its_cells():
    assert html_table([("a", "b"), (NASTY, "1")]).count("<") == html_table([("a", "b"), ("x", "1")]).count("<")


def test_costs():
    model = nn.Sequential()
    model.add_module("<b>", nn.Conv2d(3, 4, 1))
    found = shown(nin.cost(model, (1, 3, 5, 5)))
    assert "<b>" in found.text
    assert f"{4 * 3 * 25:,}" in found.text


def test_predictions():
    found = shown(Prediction(NASTY, 0.75, (0.25, 0.75), ("dog", NASTY)))
    assert found.text.index(NASTY) < found.text.index("75.0 %") < found.text.index("dog") < found.text.index("25.0 %")
    assert "12.5 %" in shown(Prediction("cat", 0.125, (0.125,))).text


def test_a_classifier_names_the_classes(tmp_path):
    nin.train("digits", nin.TrainConfig(epochs=1), out=tmp_path / "run")
    (prediction,) = nin.load(tmp_path / "run").predict(torch.zeros(8, 8))
    found = shown(prediction)
    assert len([tag for tag in found.tags if tag == "tr"]) == 6  # the head and the five best
    assert prediction.label in found.text
    assert "classes" not in repr(prediction)


def test_plans_and_narrowing_reports():
    plan = Plan(
        (LayerPlan(NASTY, "tucker", 8, 16, 32, 64, reason="a < b"),),
        (ChannelPruning("first", NASTY, (), 24, 32),),
        "macs",
        0.5,
    )
    found = shown(plan)
    for expected in (NASTY, "8, 16", "32 → 64", "a < b", "32 → 24", "0.5 of the original's macs"):
        assert expected in found.text
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))
    result = nin.narrow(model, [torch.randn(8, 3, 12, 12) for _ in range(4)], macs=0.5)
    found = shown(result.report)
    assert "MACs" in found.text
    assert shown(result.plan).tags.count("table") >= 1


def test_reports_come_in_a_frame_of_their_own(tmp_path):
    nin.train("digits", nin.TrainConfig(epochs=1), out=tmp_path / "run")
    collected = report.build_report(tmp_path / "run")
    object.__setattr__(collected, "data_name", NASTY)
    found = shown(collected)
    (frame,) = found.frames
    assert frame["sandbox"] == ""
    assert frame["srcdoc"] == report.render_report(collected)
    assert NASTY in html.unescape(frame["srcdoc"])
    assert NASTY not in frame["srcdoc"]
