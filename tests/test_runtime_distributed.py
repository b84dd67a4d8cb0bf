"""Several processes: the results of one, one that writes, restarts after a death, and partitions."""

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent import futures

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from nin import checkpoint, data, epoch_metrics, training
from nin.config import TrainConfig
from nin.data import loader
from nin.errors import UserError
from nin.models.factory import create_external_model
from nin.narrowing import pipeline
from nin.narrowing.narrow_to_folder import narrow_run
from nin.narrowing.workflow_config import WorkflowConfig
from nin.runtime import distributed, torchrun

# 37 images in a batch: the parts of two processes have 19 and 18
CONFIG = TrainConfig(epochs=3, batch_size=37, threads=1, precision="fp32", flip=True)


def few_digits():
    images = data.load("digits")
    keep = torch.arange(200)
    train = data.ImageSet(images.train.fetch(keep), images.train.labels[keep])
    return dataclasses.replace(images, train=train)


# a network with BatchNorm, whose images are mixed
TUNE = TrainConfig(
    model="timm:mobilenetv3_small_050",
    recipe="finetune",
    epochs=1,
    batch_size=20,
    mixup=0.2,
    threads=1,
    precision="fp32",
)


def few_colour_digits():
    images, shape = few_digits(), {"channels": 3, "size": 32}
    parts = {}
    for name in ("train", "test"):
        part = getattr(images, name).select(torch.arange(60))
        pixels = part.fetch(torch.arange(60)).repeat_interleave(4, 2).repeat_interleave(4, 3)
        parts[name] = data.ImageSet(pixels.repeat(1, 3, 1, 1), part.labels)
    return dataclasses.replace(images, **parts, **shape, mean=images.mean * 3, std=images.std * 3)


def work(images, out, *, die_at=None, stop_at=None, config=CONFIG):
    """Train as one of the processes, or as the only one, and write down the losses; end as the shell would."""
    losses = []

    def show(p):
        if p.row is None and not p.phase:
            losses.append([p.step, p.loss])
        if p.step == die_at and distributed.rank() == 1 and not torchrun.is_restarted():
            os.kill(os.getpid(), signal.SIGKILL)

    def stop():
        return distributed.rank() == 1 and len(losses) == stop_at

    keeping = training.CheckpointOptions(steps=3, stop=stop)
    try:
        training.train(images, config, out=out, keeping=keeping, on_progress=show)
    except UserError as error:
        out.with_suffix(f".{distributed.rank()}.error").write_text(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if distributed.is_main_process():
        out.with_suffix(".json").write_text(json.dumps(losses))


def run_job(images, out, count, *, restart=0, **what):
    """Start processes with the environment that torchrun gives them; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restart}
    # they are forked from a process that has imported PyTorch and has no threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nin.training"])
    started = []
    for rank in range(count):
        environment = {name: str(value) for name, value in {**job, "RANK": rank, "LOCAL_RANK": rank}.items()}
        started.append(context.Process(target=begin, args=(environment, images, out), kwargs=what))
        started[-1].start()
    for process in started:
        process.join(120)
        process.kill()  # where it hangs
        process.join()
    return [process.exitcode for process in started]


def begin(environment, images, out, job=None, **what):
    os.environ.update(environment)
    (job or work)(images, out, **what)


def narrow(images, out, *, run):
    """Narrow as one of the processes, or as the only one."""
    torch.set_num_threads(1)
    config = WorkflowConfig({"macs": 0.5}, images=300)
    with distributed.process_group(torch.device("cpu")):
        result = narrow_run(run, images, config, out=out)
    out.with_suffix(f".{distributed.rank()}.json").write_text(json.dumps(result.report.to_dict()))
    save_file(result.model.state_dict(), out.with_suffix(f".{distributed.rank()}.safetensors"))


def losses_of(out):
    return torch.tensor(json.loads(out.with_suffix(".json").read_text()))


def assert_equal_runs(one, other):
    for name in (checkpoint.MODEL_FILE, epoch_metrics.METRICS_FILE):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_two_processes_train_as_one_does_and_a_death_changes_no_bit(tmp_path):
    images = few_digits()
    one, two, killed, stopped = (tmp_path / name for name in ("one", "two", "killed", "stopped"))
    assert run_job(images, one, 1) == [0]
    assert run_job(images, two, 2) == [0, 0]
    single, shared = losses_of(one), losses_of(two)
    assert shared[:, 0].tolist() == list(range(1, 16))
    torch.testing.assert_close(shared[:4], single[:4], rtol=1e-5, atol=0)
    torch.testing.assert_close(shared, single, rtol=0.02, atol=0)  # roundings grow
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert checkpoint.load_info(two).environment["processes"] == 2

    began = time.monotonic()
    assert run_job(images, killed, 2, die_at=8) == [2, -signal.SIGKILL]
    assert time.monotonic() - began < 60  # nobody waits for the dead one
    assert "process 0 of 2 lost the others" in killed.with_suffix(".0.error").read_text()
    assert run_job(images, killed, 2, restart=1) == [0, 0]  # without being told to resume
    assert losses_of(killed)[0, 0] == 7  # the last state was that of step 6
    assert_equal_runs(killed, two)

    assert run_job(images, stopped, 2, stop_at=8) == [130, 130]  # one is asked, both stop after the same step
    assert run_job(images, stopped, 2, restart=1) == [0, 0]
    assert losses_of(stopped)[0, 0] == 9
    assert_equal_runs(stopped, two)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"freeze": True}], ids=["all", "class layer"])
def test_two_processes_fine_tune_as_one_does(tmp_path, changes):
    images, one, two = few_colour_digits(), tmp_path / "one", tmp_path / "two"
    config = dataclasses.replace(TUNE, **changes)
    work(images, one, config=config)
    assert run_job(images, two, 2, config=config) == [0, 0]
    assert torch.allclose(losses_of(two), losses_of(one), rtol=1e-4)
    mine, theirs = (load_file(out / checkpoint.MODEL_FILE) for out in (one, two))
    fitted, expected = theirs["head.weight"], mine["head.weight"]
    assert torch.allclose(fitted, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())
    rows = [epoch_metrics.read_csv(out / "metrics.csv")[-1]["train_loss"] for out in (one, two)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


@pytest.mark.parametrize("balance", ["sampling", "weights"])
def test_two_processes_choose_and_balance_as_one_does(tmp_path, balance):
    images, one, two = few_digits(), tmp_path / "one", tmp_path / "two"
    config = dataclasses.replace(CONFIG, epochs=2, validation=0.25, patience=1, balance=balance)
    work(images, one, config=config)
    assert run_job(images, two, 2, config=config) == [0, 0]
    torch.testing.assert_close(losses_of(two), losses_of(one), rtol=2e-3, atol=0)
    mine, theirs = (epoch_metrics.read_csv(out / "metrics.csv") for out in (one, two))
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, other in zip(mine, theirs, strict=True):
        assert other["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-2)
    infos = [checkpoint.load_info(out) for out in (one, two)]
    assert infos[0].data == infos[1].data, "the same images are set apart"
    assert infos[0].result["validation_images"] == infos[1].result["validation_images"]


def train_until(images, out, *, config, step, reached):
    """Train, and stand still after a step, where the process is killed."""

    def show(p):
        if p.step == step:
            reached.touch()
            time.sleep(120)

    training.train(images, config, out=out, keeping=training.CheckpointOptions(steps=3), on_progress=show)


def test_a_killed_fine_tuning_of_mixed_images_goes_on_to_the_same_bits(tmp_path):
    images, weights = few_colour_digits(), tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    save_file(create_external_model(TUNE.model).model.state_dict(), weights)
    changes = {"weights": str(weights), "augment": "strong", "cutmix": 1.0, "epochs": 3, "dropout": 0.1}
    config = dataclasses.replace(TUNE, **changes)
    whole, killed, reached = tmp_path / "whole", tmp_path / "killed", tmp_path / "reached"
    training.train(images, config, out=whole)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nin.training"])
    what = {"config": config, "step": 8, "reached": reached}  # of 9; the last state is that of step 6
    process = context.Process(target=train_until, args=(images, killed), kwargs=what)
    process.start()
    deadline = time.monotonic() + 250
    while not reached.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (reached.exists(), process.exitcode) == (True, -signal.SIGKILL)
    assert (killed / checkpoint.STATE_FILE).exists()
    steps = []
    keeping = training.CheckpointOptions(resume=True)
    training.train(images, config, out=killed, keeping=keeping, on_progress=lambda p: steps.append(p.step))
    assert steps[0] == 7
    assert_equal_runs(killed, whole)


@pytest.mark.slow
def test_torchrun_starts_again_what_died(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import test_runtime_distributed as t\n"
        "t.work(t.few_digits(), pathlib.Path(sys.argv[2]), die_at=8)\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *torchrun, str(script), os.path.dirname(__file__), str(tmp_path / "run")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "run")[0, 0] == 7


@pytest.mark.slow
def test_torchrun_that_is_told_to_end_leaves_a_state_that_goes_on_exactly(tmp_path):
    def command(run, *more):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [sys.executable, *torchrun, "-m", "nin", "train", "digits", "--epochs", "20", "--out", str(run), *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run(command(whole), env=environment, capture_output=True, timeout=200, check=True)
    job = subprocess.Popen(command(stopped), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (stopped / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert "Go on with: the same torchrun command and --resume" in job.communicate(timeout=60)[1]
    assert (stopped / "state.safetensors").exists()
    subprocess.run(command(stopped, "--resume"), env=environment, capture_output=True, timeout=200, check=True)
    for name in ("metrics.csv", "model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_two_nodes_that_meet_by_rendezvous_are_as_one_with_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"localhost:{free.getsockname()[1]}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "nin", "--local-addr", "127.0.0.1"]

    def start(run, *torchrun):
        command = [sys.executable, "-m", "torch.distributed.run", *torchrun, "-m", "nin", "train", "digits"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, "--epochs", "2", "--out", str(run)], env=environment)

    one, two = tmp_path / "one", tmp_path / "two"
    nodes = [start(two, "--nnodes", "2", "--nproc-per-node", "1", *meeting) for _ in range(2)]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    assert start(one, "--standalone", "--nproc-per-node", "2").wait(timeout=200) == 0
    for name in ("metrics.csv", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_two_processes_narrow_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "count_passes", lambda *arguments: 0)  # function matching is for one process
    images = few_digits()
    training.train(images, dataclasses.replace(CONFIG, epochs=1), out=tmp_path / "run")
    narrow(images, tmp_path / "one", run=tmp_path / "run")
    (tmp_path / "run" / "narrowing.safetensors").unlink()
    # once with statistics of their own, once with those that the first time left
    for name in ("two", "again"):
        assert run_job(images, tmp_path / name, 2, job=narrow, run=tmp_path / "run") == [0, 0]
    one, first, second, again = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one.0", "two.0", "two.1", "again.0")
    )
    assert first == second
    assert (tmp_path / "two.0.safetensors").read_bytes() == (tmp_path / "two.1.safetensors").read_bytes()
    for found in (first, again):
        assert found["macs"] == one["macs"]
        assert [layer["after"] for layer in found["layers"]] == [layer["after"] for layer in one["layers"]]
        assert found["accuracy"] == pytest.approx(one["accuracy"], abs=0.01)
        assert found["calibration_error"] == pytest.approx(one["calibration_error"], rel=1e-3)
    for name, value in load_file(tmp_path / "one.0.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "two.0.safetensors")[name], value, atol=1e-3, rtol=1e-3)
    assert checkpoint.load_info(tmp_path / "two").result["test_images"] == len(images.test)


def test_fine_tuning_in_many_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--finetune and --control train in one process"):
        WorkflowConfig({"macs": 0.5}, finetune=1)


def test_a_job_that_starts_again_finds_a_part_of_the_store_without_the_addresses_of_the_dead():
    store = dist.HashStore()
    store.set("nin/1", "somebody who died")
    store.set("default_pg/0", "an address of the first start")
    with futures.ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda number: distributed._fresh_prefix_store(store, number, 3), range(3)))
    parts[0].set("here", "1")
    assert all(part.get("here") == b"1" and not part.check(["default_pg/0"]) for part in parts)


@pytest.mark.parametrize(("length", "batch", "count"), [(12, 4, 2), (10, 4, 3), (3, 5, 3), (22, 7, 4)])
def test_every_sample_goes_to_one_process(monkeypatch, length, batch, count):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    order, seen = torch.randperm(length), []
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        mine, size = distributed.local_part(order, batch)
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
    assert loader.usable_cores() == 1


def test_an_error_of_its_own_is_no_lost_process():
    assert not distributed._is_lost_process_error(RuntimeError("shapes cannot be multiplied"))
    assert distributed._is_lost_process_error(
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    )
