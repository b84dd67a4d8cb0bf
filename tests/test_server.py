"""The web application: what it answers, what it refuses, and that many at once get what each would get alone."""

import asyncio
import base64
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

import nin
from nin import models, server
from nin.errors import UserError
from nin.ops import mlpconv
from nin.profiling import bottleneck_timing
from nin.runtime import listener
from nin.runtime.timer import time_interleaved
from nin.server import activations, static_files, uvicorn_server
from nin.server.batcher import Batcher, FullError, classify
from nin.server.middleware import SECURITY_HEADERS
from support.serving import Running, make_run, numbers, pictures, png, post

LIMITS = server.Limits(body_bytes=200_000, pixels=1_000_000, images=4, requests=64, seconds=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def running(run):
    served = Running(server.create_app(run, limits=LIMITS))
    yield served
    served.stop()


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client


def test_one_image_as_the_body(client, run):
    (file,) = pictures(1)
    answer = post(client, file)
    assert answer.status_code == 200
    (got,) = answer.json()["predictions"]
    (expected,) = nin.load(run).predict(file)
    assert got["label"] == expected.label
    assert got["confidence"] == pytest.approx(expected.confidence, abs=1e-5)
    assert list(got["probabilities"].values()) == pytest.approx(list(expected.probabilities), abs=1e-5)
    assert got["maps"] is None


def test_several_images_in_a_form_with_maps(client, run):
    files = pictures(3)
    answer = client.post("/api/predict?maps=true", files=[("images", ("x.png", f)) for f in files])
    assert answer.status_code == 200
    classifier = nin.load(run)
    for got, file in zip(answer.json()["predictions"], files, strict=True):
        maps = torch.tensor(got["maps"])
        torch.testing.assert_close(maps, classifier.confidence_maps(file)[0], atol=1e-5, rtol=1e-5)
        assert list(got["scores"].values()) == pytest.approx(maps.mean((1, 2)).tolist(), abs=1e-4)


def test_requests_of_many_clients_are_batched_and_get_their_own_numbers(running, run):
    files = pictures(40)
    expected = nin.load(run).scores(files)
    before = running.app.state.service.batcher.batches
    release, started = threading.Event(), threading.Event()
    running.app.state.service.batcher.compute(lambda: (started.set(), release.wait(10)))  # so that they pile up
    started.wait(10)
    with ThreadPoolExecutor(len(files)) as pool, running.client() as client:
        answers = [pool.submit(post, client, file) for file in files]
        deadline = time.monotonic() + 10
        while running.app.state.service.batcher.queued < len(files) and time.monotonic() < deadline:
            time.sleep(0.01)
        release.set()
        got = [list(a.result().json()["predictions"][0]["scores"].values()) for a in answers]
    torch.testing.assert_close(torch.tensor(got), expected, atol=1e-5, rtol=1e-5)
    assert running.app.state.service.batcher.batches - before == 1


def test_eight_clients_for_two_seconds(running):
    files = pictures(8)
    end = time.monotonic() + 2

    def ask(file):
        statuses = []
        with running.client() as client:
            while time.monotonic() < end:
                statuses.append(post(client, file).status_code)
        return statuses

    with ThreadPoolExecutor(8) as pool:
        statuses = [status for found in pool.map(ask, files) for status in found]
    assert len(statuses) > 20
    assert set(statuses) == {200}


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def lying_png(width, height):
    """Return a small PNG that says it is huge, or whose pixels are missing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


HOSTILE = {
    "empty": (b"", 400),
    "words": (b"this is no image", 415),
    "html": (b"<html><script>alert(1)</script>", 415),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "cut": (png(size=(64, 64))[:60], 422),
    "header only": (b"\x89PNG\r\n\x1a\n", (415, 422)),
    "lying about its size": (lying_png(900, 900), 422),
    "a decompression bomb": (lying_png(60_000, 60_000), 413),
    "just too many pixels": (png(size=(1001, 1000)), 413),
    "zero pixels": (lying_png(0, 0), (415, 422)),
    "too many bytes": (png() + b"x" * 200_001, 413),
    "many times too many bytes": (b"x" * 2_000_000, 413),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", [False, True], ids=["body", "form"])
@pytest.mark.filterwarnings("ignore")  # the upload that is cut off
def test_hostile_uploads_get_a_clear_refusal(client, name, form):
    content, status = HOSTILE[name]
    try:
        answer = client.post("/api/predict", files={"images": ("a.png", content)}) if form else post(client, content)
    except (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        assert name == "many times too many bytes"  # past four times the limit the connection is closed
        return
    allowed = status if isinstance(status, tuple) else (status,)
    assert answer.status_code in (*allowed, 415 if form and name == "empty" else 0), answer.text
    assert len(answer.json()["detail"]) > 10
    assert not {"body", "multipart", "form"} & set(answer.json()["detail"].split())
    assert post(client, png()).status_code == 200  # it still serves


def test_truncated_at_every_length_is_never_a_server_error(client):
    for whole in (png(size=(16, 16)), jpeg()):
        for length in range(1, len(whole), max(1, len(whole) // 25)):
            assert post(client, whole[:length]).status_code in (200, 415, 422)


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 0)).save(file, "JPEG")
    return file.getvalue()


def test_fields_beside_the_images_are_not_looked_at(client):
    fields = {"token": "abc", "caption": "a cat", "empty": ""}
    for files in ({"images": ("a.png", png())}, {"file": ("b", png(), "text/plain")}, {"": ("c.png", png())}):
        answer = client.post("/api/predict", data=fields, files=files)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"]) == 1
    answer = client.post("/api/predict", data={"images": "aGVsbG8="}, files={"x": (None, b"1")})
    assert answer.status_code == 400
    assert answer.json()["detail"] == (
        "send at least one image file; the form has only the fields images, x, which are no files"
    )
    assert client.post("/api/predict", data={f"f{i}": "1" for i in range(200)}, files={"i": png()}).status_code == 400


def test_a_damaged_image_does_not_take_the_others_answers(client):
    files = [("images", (name, content)) for name, content in (("a", b"no image"), ("b", png()), ("c", png()[:40]))]
    answer = client.post("/api/predict", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["predictions"]
    assert first["problem"].startswith("image 0: ")
    assert third["problem"].startswith("image 2: ")
    assert second["label"] == client.post("/api/predict", files=files[1:2]).json()["predictions"][0]["label"]
    assert client.post("/api/predict", files=files[::2]).status_code == 415
    activations = client.post("/api/layers/0/activations", files=files)
    assert activations.status_code == 422
    assert activations.json()["detail"].startswith("image 0: ")
    assert not post(client, b"no image").json()["detail"].startswith("image 0")  # there is only this one


def test_forms_that_are_none(client):
    for content, kind in (
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data; boundary=x"),
        (b"abc", "multipart/form-data"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n', "multipart/form-data; boundary=x"),
    ):
        assert post(client, content, kind).status_code == 400
    answer = post(client, b"a letter", "text/plain")  # as a browser sends a text file that was dropped
    assert (
        answer.status_code,
        answer.json()["detail"].startswith("this is no image, but text/plain; expected JPEG"),
    ) == (
        415,
        True,
    )
    too_many = client.post("/api/predict", files=[("images", ("x", png()))] * 5)
    assert too_many.status_code == 400
    assert "detail" in too_many.json()


@pytest.mark.parametrize(
    ("stated", "sent", "status"),
    [
        (b"-5", 0, b"400"),
        (b"many", 0, b"400"),
        (b"100000000", 0, b"408"),  # what was promised does not come
        (b"100000000", 4001, b"413"),  # four times the limit has come: the rest is not waited for
        (b"1001", 1001, b"413"),
        (b"100000000", 10, None),  # a client that goes away in the middle is no error
    ],
)
def test_a_stated_length_that_is_none_or_too_much(stated, sent, status):
    served = Running(server.create_app(limits=server.Limits(body_bytes=1000, seconds=1)))
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: image/png\r\nContent-Length: " + stated + b"\r\n\r\n" + b"x" * sent
        )
        if status is not None:
            assert connection.recv(100).split()[1] == status
    with served.client() as client:
        assert client.get("/api/health").status_code == 200
    served.stop()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_other_names_are_refused(client, host):
    for path in ("/", "/api/health"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code in (400, 403)
    assert client.post("/api/predict", content=png(), headers={"host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1", "[::1]:80", "192.168.1.2:8646"])
def test_addresses_and_localhost_are_let_in(client, host):
    assert client.get("/api/health", headers={"host": host}).status_code == 200


def test_the_name_that_was_given_as_host_is_let_in(run):
    served = Running(server.create_app(host="Lab.example"))
    with served.client() as client:
        assert client.get("/api/health", headers={"host": "lab.example:8646"}).json()["model"] is False
        assert client.get("/api/model").status_code == 404
        assert post(client, png()).status_code == 404
        assert client.get("/api/samples").json()["state"] == "none"
    served.stop()


def test_pages_of_other_sites_may_not_ask(client, running):
    for origin in ("https://evil.example", "null", f"http://localhost:{running.port + 1}"):
        answer = client.post("/api/predict", content=png(), headers={"origin": origin, "content-type": "image/png"})
        assert answer.status_code == 403
    assert client.get("/api/health", headers={"origin": running.url}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/health", "/none", "/style.css", "/api/layers/99/weights"])
def test_every_answer_has_the_security_headers(client, path):
    answer = client.get(path)
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_no_path_is_taken_from_a_request(client):
    for path in ("/../app.py", "/%2e%2e/app.py", "/page/../../nin/cli/app.py", "//etc/passwd", "/./x"):
        assert client.get(path).status_code in (400, 404)


def test_files_are_not_sent_twice(client):
    first = client.get("/main.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert client.get("/main.js", headers={"if-none-match": first.headers["etag"]}).status_code == 304
    assert client.head("/").status_code == 200


def test_the_first_view_is_small(client):
    total = sum(len(content) for _, content in static_files.read_page().values())
    assert total < 600_000


def test_too_many_waiting_get_503_and_when_to_come_again(run):
    served = Running(server.create_app(run, limits=server.Limits(requests=3, seconds=20)))
    release, started = threading.Event(), threading.Event()
    served.app.state.service.batcher.compute(lambda: (started.set(), release.wait(15)))
    started.wait(10)
    with ThreadPoolExecutor(6) as pool, served.client() as client:
        answers = [pool.submit(post, client, png()) for _ in range(6)]
        deadline = time.monotonic() + 10
        while sum(a.done() for a in answers) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("/api/health").status_code == 200
        release.set()
        found = [a.result() for a in answers]
    assert sorted(a.status_code for a in found) == [200, 200, 200, 503, 503, 503]
    assert all(a.headers["retry-after"] == "1" for a in found if a.status_code == 503)
    served.stop()


def test_a_request_that_takes_too_long(run):
    served = Running(server.create_app(run, limits=server.Limits(seconds=0.5)))
    release = threading.Event()
    served.app.state.service.batcher.compute(lambda: release.wait(10))
    with served.client() as client:
        answer = post(client, png())
        assert (answer.status_code, "0.5 seconds" in answer.json()["detail"]) == (504, True)
        release.set()
        assert post(client, png()).status_code == 200
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            connection.sendall(b"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
            assert connection.recv(100).split()[1] == b"408"
    served.stop()


def test_the_model_is_described(client):
    model = client.get("/api/model").json()
    assert (model["name"], model["size"], model["channels"], len(model["classes"])) == ("nin_digits", 8, 1, 10)
    assert model["macs"] == 2_023_424
    assert [layer["name"] for layer in model["layers"]][:3] == ["image", "block 1, 3×3", "block 1, 1×1 (1)"]


def test_layers_one_by_one_are_the_network(client, run):
    (file,) = pictures(1)
    layers = client.get("/api/model").json()["layers"]
    path = "/api/layers/{}/activations"
    before = None
    for index, layer in enumerate(layers):
        values = numbers(post(client, file, path=path.format(index)).json())
        assert values.shape[0] == layer["channels"]
        if layer["kind"] == "convolution":
            weights = client.get(f"/api/layers/{index}/weights").json()
            arguments = ([numbers(weights["weight"])], [numbers(weights["bias"])])
            options = {name: layer[name] for name in ("stride", "padding", "activation")}
            torch.testing.assert_close(values, mlpconv(before, *arguments, **options)[0], atol=1e-5, rtol=1e-5)
        before = values[None]
    torch.testing.assert_close(before, nin.load(run).confidence_maps(file), atol=1e-5, rtol=1e-5)
    assert post(client, file, path=path.format(99)).status_code == 404
    assert post(client, file, path=path.format(-1)).status_code == 422
    assert client.get("/api/layers/0/weights").status_code == 404
    assert client.get("/api/layers/4/weights").status_code == 404  # pooling


def test_dead_channels_are_found():
    model = models.nin_digits().eval()
    with torch.no_grad():
        model.blocks[0][0].convs[1].bias[5] = -1e6
    dead = activations.dead_channels(model, torch.rand(4, 1, 8, 8))
    assert 5 in dead[2]
    assert dead[0] == dead[4] == dead[-1] == []


def test_samples_decode_to_the_test_images(client, running):
    running.app.state.service.runs[0].samples.thread.join(timeout=60)
    answer = client.get("/api/samples").json()
    assert answer["state"] == "ready"
    assert [sample["label"] for sample in answer["samples"][:3]] == ["0", "1", "2"]
    file = base64.b64decode(answer["samples"][0]["image"].partition(",")[2])
    images = nin.data.load("digits").test
    first = images.images[int((images.labels == 0).nonzero()[0])]
    assert torch.equal(nin.data.decode(file, size=8, channels=1), first)
    assert client.get("/api/dead").json()["images"] == 256


def test_a_run_whose_images_are_gone_says_so(tmp_path):
    served = Running(server.create_app(make_run(tmp_path / "run", source=str(tmp_path / "gone"))))
    served.app.state.service.runs[0].samples.thread.join(timeout=60)
    with served.client() as client:
        answer = client.get("/api/samples").json()
        assert (answer["state"], "not here" in answer["reason"]) == ("none", True)
        assert client.get("/api/dead").status_code == 404
    served.stop()


def test_the_mistakes_are_the_surest_wrong_answers(running, client):
    run = running.app.state.service.runs[0]
    run.samples.thread.join(timeout=60)
    answer = client.get("/api/mistakes").json()
    pixels, labels = run.calibration_images()
    predictions = run.classifier.predict(pixels)
    wrong = [i for i, p in enumerate(predictions) if p.label != run.classifier.classes[labels[i]]]
    wrong.sort(key=lambda i: -predictions[i].confidence)
    assert (answer["images"], answer["wrong"]) == (256, len(wrong))
    assert [s["label"] for s in answer["samples"][:3]] == [run.classifier.classes[labels[i]] for i in wrong[:3]]
    assert len(answer["samples"]) == min(24, len(wrong))
    png_file = base64.b64decode(answer["samples"][0]["image"].split(",")[1])
    assert run.classifier.predict(png_file)[0].confidence == pytest.approx(predictions[wrong[0]].confidence, abs=1e-6)


def test_a_request_that_is_broken_off_loses_its_turn(running):
    batcher, release, started = running.app.state.service.batcher, threading.Event(), threading.Event()
    batcher.compute(lambda: (started.set(), release.wait(60)))
    started.wait(30)
    (file,) = pictures(1)
    options = {"headers": {"content-type": "image/png"}, "timeout": httpx.Timeout(30, read=1)}
    with running.client() as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/api/layers/1/activations", content=file, **options)
    deadline = time.monotonic() + 30
    while batcher.queued and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batcher.queued == 0
    release.set()


def test_the_bottleneck_is_measured_within_its_range(client, monkeypatch):
    monkeypatch.setattr(bottleneck_timing, "PIXELS", 4)
    monkeypatch.setattr(bottleneck_timing, "time_until_steady", lambda each: (time_interleaved(each), False))
    answer = client.post("/api/bottleneck?r=16").json()
    assert answer["narrow"]["median_ms"] > 0
    assert answer["shape"] == [1, 256, 4, 4]
    assert answer["is_steady"] is False
    for r in ("7", "257", "many", ""):
        assert client.post(f"/api/bottleneck?r={r}").status_code == 422
    with pytest.raises(ValueError, match="r must be from 8 to 256, got 4"):
        bottleneck_timing.measure(4)


def test_the_description_lists_every_operation(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/health",
        "/api/model",
        "/api/predict",
        "/api/samples",
        "/api/mistakes",
        "/api/layers/{index}/weights",
        "/api/layers/{index}/activations",
        "/api/layers/{index}/spectrum",
        "/api/layers/{index}/narrowed",
        "/api/dead",
        "/api/approximate-map",
        "/api/bottleneck",
        "/api/training",
    }
    assert set(paths["/api/predict"]["post"]["requestBody"]["content"]) == {"image/*", "multipart/form-data"}


def test_an_error_while_computing_reaches_those_who_wait_and_no_one_else():
    batcher = Batcher(max_queued=4)
    with pytest.raises(ZeroDivisionError):
        batcher.compute(lambda: 1 // 0).result(timeout=10)
    thread = batcher.compute(threading.current_thread).result(timeout=10)
    batcher.stop()
    assert not thread.is_alive()


def test_images_that_fail_in_a_batch_do_not_fail_the_others(run):
    batcher, classifier = Batcher(max_queued=4), nin.load(run)
    good = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    release = threading.Event()
    batcher.compute(lambda: release.wait(10))
    bad, fine = batcher.classify(classifier, good.new_zeros(1, 1, 9, 9)), batcher.classify(classifier, good)
    release.set()
    with pytest.raises(RuntimeError, match="9"):
        bad.result(timeout=10)
    torch.testing.assert_close(fine.result(timeout=10), classify(classifier, good))
    batcher.stop()


def test_those_who_have_gone_away_leave_their_place():
    batcher = Batcher(max_queued=1)
    release, started = threading.Event(), threading.Event()
    batcher.compute(lambda: (started.set(), release.wait(10)))
    started.wait(10)
    gone = batcher.compute(lambda: 1)
    with pytest.raises(FullError):
        batcher.compute(lambda: 2)
    assert gone.cancel()
    following = batcher.compute(lambda: 3)
    release.set()
    assert following.result(timeout=10) == 3
    batcher.stop()


def test_a_port_that_is_taken_is_a_users_error():
    with listener.listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1, port"):
            listener.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen"):
        listener.listen("127.0.0.1", 99999)


def test_serve_says_where_and_stops(monkeypatch):
    addresses = []

    monkeypatch.setattr(uvicorn_server.webbrowser, "open", addresses.append)
    original = uvicorn.Server.startup

    async def startup(self, sockets=None):
        await original(self, sockets)
        await asyncio.sleep(0.2)
        self.should_exit = True

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    server.serve(port=0, browser=True, on_start=addresses.append)
    assert addresses[0].startswith("http://127.0.0.1:")
    assert addresses[1] == addresses[0]


def test_json_answers_hold_no_markup_of_the_users(client):
    answer = client.post("/api/predict", files={"<script>": ("<img src=x onerror=alert(1)>.png", b"no image")})
    assert "<" not in json.dumps(answer.json())


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path):
    """A taken port and a missing run are told without PyTorch, which takes seconds to import."""
    with listener.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        script = (
            "import sys\nsys.modules['torch'] = None\nfrom nin.cli import app\n"
            "sys.exit(app.main(['serve', *sys.argv[1:]]))"
        )
        for arguments, words in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1, port {port}: Address already in use"),
            ([str(tmp_path / "gone")], "there is no folder"),
        ):
            command = [sys.executable, "-c", script, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert words in " ".join(done.stderr.split()), done.stderr
            assert done.returncode != 0
    with pytest.raises(UserError, match="is not a run folder"):
        server.serve(tmp_path, port=0, browser=False)
