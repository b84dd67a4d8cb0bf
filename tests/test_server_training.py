"""The page that follows a training, from what lies in its run folder."""

import dataclasses
import json
import shutil
import time

import pytest
import torch
from starlette.testclient import TestClient

import nin
from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.server import create_app
from nin.server.training_status import training_status
from support.browser import CHROMIUM
from support.serving import png, post


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run folder of a training that was stopped in its third epoch of four."""
    out, images, steps = tmp_path_factory.mktemp("training") / "run", data.load("digits"), []
    few = dataclasses.replace(images, train=images.train.select(torch.arange(0, len(images.train), 6)))

    def stop():
        steps.append(1)
        return len(steps) == 8

    config = TrainConfig(epochs=4, batch_size=64, threads=1, precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        training.train(few, config, out=out, keeping=training.CheckpointOptions(stop=stop))
    return out


def write_progress(folder, **changes):
    values = {"step": 8, "steps": 12, "epoch": 3, "epochs": 4, "loss": 1.25, "seconds_left": 90.0, "note": ""}
    (folder / "progress.json").write_text(json.dumps({**values, "updated": time.time(), **changes}))


def client(run):
    return TestClient(create_app(run), base_url="http://127.0.0.1:8646")


def test_status_of_a_training_that_runs_is_silent_or_has_ended(unfinished, run):
    write_progress(unfinished)
    status = training_status(unfinished)
    assert (status.state, status.text) == ("training", "Training, epoch 3 of 4, loss 1.250, 90 s left")
    assert (status.step, status.steps, status.epochs_done) == (8, 12, 2)
    assert all(svg.startswith("<svg") for svg in status.charts.values())
    assert len(status.charts) == 2
    write_progress(unfinished, updated=time.time() - 3600)
    assert training_status(unfinished).state == "interrupted"
    for damaged in ("{", "[]", '{"step": "x"}'):
        (unfinished / "progress.json").write_text(damaged)
        assert training_status(unfinished).state == "interrupted"
    status = training_status(run)
    assert status.state == "finished"
    assert status.text.startswith("Finished after 4 epochs: test accuracy 9")


def test_a_training_in_its_first_epoch_is_served_without_a_network(tmp_path, unfinished):
    write_progress(tmp_path, epoch=1, seconds_left=None)
    served = client(tmp_path)
    assert served.get("/api/training").json()["text"] == "Training, epoch 1 of 4, loss 1.250"
    assert served.get("/api/health").json()["model"] is False
    assert served.get("/training").status_code == 200
    # after the first epoch there is a network
    write_progress(unfinished)
    both = client(unfinished)
    assert both.get("/api/health").json()["model"] is True
    assert both.get("/api/training").json()["state"] == "training"
    assert client(None).get("/api/training").json()["state"] == "none"


def test_the_network_is_that_of_the_last_epoch_until_the_training_has_ended(tmp_path):
    images = data.load("digits")
    few = dataclasses.replace(images, train=images.train.select(torch.arange(0, len(images.train), 6)))
    config, out, steps = TrainConfig(epochs=3, batch_size=64, threads=1, precision="fp32"), tmp_path / "run", []
    write_progress(tmp_path, epoch=1)
    out.mkdir()
    (tmp_path / "progress.json").rename(out / "progress.json")
    served, seen = client(out), []
    picture = png(200)

    def ask():
        answers = served.get("/api/training").json()["answers"]
        model = served.get("/api/model")
        if model.status_code == 404:
            return answers, None, None
        return answers, model.json()["unfinished"], post(served, picture).json()["predictions"][0]["scores"]

    def stop():
        steps.append(1)
        if len(steps) % 3 == 1:  # the first step of each epoch
            seen.append(ask())
        return len(steps) == 5

    with pytest.raises(KeyboardInterrupt):
        training.train(few, config, out=out, keeping=training.CheckpointOptions(stop=stop))
    assert seen[0] == ("", None, None)
    assert seen[1][:2] == ("epoch 1 of 3", "epoch 1 of 3")
    assert ask() == seen[1], "nothing was written since"
    samples = served.app.state.service.runs[0].samples
    training.train(few, config, out=out, keeping=training.CheckpointOptions(stop=stop, resume=True))
    assert seen[2][:2] == ("epoch 2 of 3", "epoch 2 of 3")
    assert ask()[:2] == ("", "")
    run = served.app.state.service.runs[0]
    assert run.samples is samples, "the test images are read once"
    finished = ask()[2]
    assert finished == {
        name: pytest.approx(score, abs=1e-5)
        for name, score in zip(run.classifier.classes, nin.load(out).scores(picture)[0].tolist(), strict=True)
    }
    assert len({json.dumps(scores) for scores in (seen[1][2], seen[2][2], finished)}) == 3
    # what is finished is not read again
    (out / "config.json").write_text("{")
    assert post(served, picture).json()["predictions"][0]["scores"] == finished


def test_an_unreadable_network_of_a_training_does_not_end_the_server(unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "run")
    served = client(out)
    before = served.get("/api/model").json()
    (out / "config.json").write_text("{")
    assert served.get("/api/model").json() == before
    assert "epoch 2 of 4" in before["unfinished"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_shows_the_curves_and_refreshes_itself(unfinished, browser, tmp_path):
    import threading

    import uvicorn

    from nin.server.uvicorn_server import listen

    write_progress(unfinished)
    listener = listen("127.0.0.1", 0)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(create_app(unfinished), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        page = browser.new_page(viewport={"width": 390, "height": 800})
        wrong = []
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/training")
        page.get_by_text("Training, epoch 3 of 4").wait_for()
        assert page.locator("#charts svg").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        write_progress(unfinished, epoch=4, note="It has stopped learning: for ten epochs.")
        page.get_by_text("Training, epoch 4 of 4").wait_for()
        page.get_by_text("It has stopped learning").wait_for()
        page.get_by_text("The network that answers is that of epoch 2 of 4.").wait_for()
        assert not wrong
        page.close()
    finally:
        server.should_exit = True
        thread.join()
    assert checkpoint.load_info(unfinished).result == {}
