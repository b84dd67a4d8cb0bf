"""A web application that runs, a run folder for it, images to send and tensors that come back."""

import base64
import io
import threading
import time

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from nin import checkpoint, models
from nin.runtime.listener import listen


def make_run(folder, *, classes=tuple("0123456789"), source="digits"):
    """Write a run folder with an untrained network."""
    folder.mkdir()
    torch.manual_seed(1)
    info = checkpoint.RunInfo(
        model=checkpoint.model_description(network := models.nin_digits(normalisation="weight_standardisation")),
        classes=classes,
        preprocessing=checkpoint.Preprocessing(size=8, channels=1, mean=(0.3,), std=(0.4,)),
        recipe={"model": "nin_digits"},
        data={"name": "digits", "source": source, "data_dir": None, "size": None, "test_fraction": None, "seed": 0},
        result={"test_accuracy": 0.1},
        environment={},
    )
    checkpoint.save_model(folder, network, info)
    return folder


class Running:
    """An application on a free port of the loopback address, until `stop`."""

    def __init__(self, app):
        self.app = app
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.server.started

    def client(self):
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.listener.close()


def png(shade=128, size=(8, 8), mode="L"):
    file = io.BytesIO()
    Image.new(mode, size, shade).save(file, "PNG")
    return file.getvalue()


def pictures(count):
    """Return PNG files of random images."""
    files = []
    for i in range(count):
        file = io.BytesIO()
        array = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(array).save(file, "PNG")
        files.append(file.getvalue())
    return files


def numbers(answer):
    values = np.frombuffer(base64.b64decode(answer["values"]), dtype="<f4").copy()
    return torch.from_numpy(values).view(answer["shape"])


def post(client, content, kind="image/png", path="/api/predict"):
    return client.post(path, content=content, headers={"content-type": kind})
