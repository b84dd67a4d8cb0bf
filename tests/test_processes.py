"""Many processes: they do what one does, one of them writes, and none that dies is waited for."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nin import checkpoint, data, processes, training
from nin.errors import UserError
from nin.recipe import TrainConfig

# trains, and writes down the losses; told so, process 1 kills itself the first time it comes to step 8
JOB = """
import dataclasses, json, os, pathlib, signal, sys
import torch
from nin import data, processes, training
from nin.recipe import TrainConfig

out, die = pathlib.Path(sys.argv[1]), sys.argv[2] == "die"
images = data.load("digits")
keep = torch.arange(0, 200)
images = dataclasses.replace(images, train=data.ImageSet(images.train.fetch(keep), images.train.labels[keep]))
losses = []

def show(p):
    if p.row is None:
        losses.append([p.step, p.loss])
    if die and p.step == 8 and processes.rank() == 1 and not processes.is_restarted():
        os.kill(os.getpid(), signal.SIGKILL)

config = TrainConfig(epochs=3, batch_size=37, threads=1, precision="fp32", flip=True)
training.train(images, config, out=out, keeping=training.Keeping(steps=3), on_progress=show)
if processes.is_first():
    out.with_suffix(".json").write_text(json.dumps(losses))
"""


def run_job(folder, count, what):
    script, out = folder / "job.py", folder / f"{what}{count}"
    script.write_text(JOB)
    launch = [sys.executable, str(script)]
    if count > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        launch = [sys.executable, *torchrun, "--max-restarts", "1" if what == "die" else "0", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(out), what], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(out.with_suffix(".json").read_text())


def test_two_processes_train_as_one_does_and_a_death_changes_no_bit(tmp_path):
    # 37 images in a batch: the processes' parts have 19 and 18
    one, losses = run_job(tmp_path, 1, "live")
    two, shared = run_job(tmp_path, 2, "live")
    assert [step for step, _ in shared] == list(range(1, 16))
    torch.testing.assert_close(torch.tensor(shared)[:6], torch.tensor(losses)[:6], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(losses), rtol=0.02, atol=0)  # roundings grow
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert checkpoint.load_info(two).environment["processes"] == 2
    again, last = run_job(tmp_path, 2, "die")
    assert last[0][0] == 7  # the last state was that of step 6
    for name in (checkpoint.MODEL_FILE, checkpoint.METRICS_FILE):
        assert (again / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(("length", "batch", "count"), [(12, 4, 2), (10, 4, 3), (3, 5, 3), (22, 7, 4)])
def test_every_sample_goes_to_one_process(monkeypatch, length, batch, count):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    order, seen = torch.randperm(length), []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        mine, size = processes.share(order, batch)
        seen.append(mine.split(size))
    assert torch.equal(torch.cat([piece for pieces in seen for piece in pieces]).sort().values, torch.arange(length))
    for number, whole in enumerate(order.split(batch)):  # and in the same step as with one process
        parts = [pieces[number] for pieces in seen if number < len(pieces)]
        assert torch.equal(torch.cat(parts).sort().values, whole.sort().values)


def test_a_batch_for_too_few_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 processes cannot share 4 images"):
        training.train("digits", TrainConfig(batch_size=4, epochs=1))


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert data.batching.usable_cores() == 1


def test_an_error_of_its_own_is_no_lost_process():
    assert not processes._tells_of_a_lost_process(RuntimeError("shapes cannot be multiplied"))
    assert processes._tells_of_a_lost_process(
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    )
