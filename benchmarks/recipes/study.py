"""What helps a Network in Network to learn: one change at a time against the default recipe, at equal minutes.

    python benchmarks/recipes/study.py run DATA QUEUE       (DATA holds FashionMNIST/raw and cifar10-jpeg/train/CLASS)
    python benchmarks/recipes/study.py table                (writes README.md's tables from results.jsonl)
    python benchmarks/recipes/study.py curve NAME=RUN NAME=RUN … --out curve.svg

QUEUE is a text file, read again after each run: a line is VARIANT SET SEED, such as "muon-0.05 fashion-mnist 0"; what
stands in results.jsonl already is skipped, so the same command goes on where it was stopped. With --wait it waits for
more lines at the end.

A run trains on a part of the training images and is measured on another part of them; the test images are never
looked at. "Equal minutes": a step of a variant that is not as dear as the default's is timed in turn with it, and the
variant takes so many steps fewer or more. Times are processor time, as the machine is shared; where there is a GPU, it
trains, and its time counts.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tables import curve, write_tables
from torch import Tensor
from variants import VARIANTS, Variant, generator

from nin import checkpoint, data
from nin.config import ResolvedConfig, TrainConfig
from nin.data.sampler import stratified_holdout
from nin.inference import metrics
from nin.runtime.device import choose_device, keep_freed_memory, use_threads
from nin.runtime.files import write_atomically
from nin.training import batches
from nin.training.step import TrainStep

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.jsonl"
TEACHERS = FOLDER / "teachers"  # networks that others learn from; not kept in the repository
HELD_OUT = 5000


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much a run of a data set is.

    Attributes:
        source: for `nin.data.load`, below the folder of the data.
        images: that are trained on; None for all that are not held out.
        epochs: of the default recipe.
        settings: that keep a short training like a long one: as large a part of all steps in the EMA (0.995 is 200 of
            8,400), and enough steps for so few images.
    """

    source: str
    images: int | None
    epochs: int
    settings: dict[str, Any]


SHORT = {"batch_size": 64, "ema": 0.91}
BUDGETS = {
    "digits": Budget("digits", None, 100, {}),
    "fashion-mnist": Budget("fashion-mnist", 5000, 6, SHORT),
    "cifar10-jpeg": Budget("cifar10-jpeg", 5000, 6, SHORT),
    # the recipe as it is, some 45 minutes of a core or 20 seconds of a GPU: for what the short runs leave
    "fashion-mnist-full": Budget("fashion-mnist", None, 18, {}),
    "cifar10-jpeg-full": Budget("cifar10-jpeg", None, 18, {}),
}


def load(budget: Budget, folder: Path) -> data.Data:
    """Return the training images of a run, and in place of the test images others that are not trained on."""
    if budget.source == "cifar10-jpeg":
        images = data.load(folder / budget.source)
    else:
        images = data.load(budget.source, data_dir=None if budget.source == "digits" else folder)
    every = images.train
    labels = every.labels.tolist()
    names = list(every.names or map(str, range(len(labels))))

    def choose(kind: str, rows: list[int], count: int) -> Tensor:
        of_rows = [labels[row] for row in rows]
        chosen = stratified_holdout(
            (f"{kind}/{names[row]}" for row in rows), of_rows, fraction=count / len(rows), seed=0
        )
        return torch.tensor(rows)[torch.from_numpy(chosen)]

    held_out = choose("study", list(range(len(labels))), min(HELD_OUT, len(labels) // 4))
    left = sorted(set(range(len(labels))) - set(held_out.tolist()))
    trained = torch.tensor(left) if budget.images is None else choose("trained", left, budget.images)
    train, test = (data.to_device(every.select(rows), torch.device("cpu")) for rows in (trained, held_out))
    return dataclasses.replace(images, train=train, test=test)


def resolve(variant: Variant, budget: Budget, images: data.Data, seed: int) -> ResolvedConfig:
    """Return a variant's settings."""
    settings = {**budget.settings, **variant.settings, "seed": seed}
    about: Any = {"images": len(images.train), "image_size": images.size, "flip": images.flip, "shift": images.shift}
    config = TrainConfig(**settings).resolve(**about)
    changed: dict[str, Any] = {name: getattr(config, name) * factor for name, factor in variant.times.items()}
    if "ema" in changed:
        changed["ema"] = 1 - (1 - config.ema) / variant.times["ema"]
    if "batch_size" in changed:
        changed["batch_size"] = int(changed["batch_size"])
    return dataclasses.replace(config, **changed)


class Run:
    """A training of one variant."""

    def __init__(self, variant: Variant, budget: Budget, images: data.Data, seed: int) -> None:
        self.variant = variant
        self.config = resolve(variant, budget, images, seed)
        self.device = choose_device(self.config.device)
        self.images = batches.hold_images(images, self.config, self.device)
        shape = images.channels, len(images.classes), images.size
        self.train_step: TrainStep = variant.step(lambda: variant.network(self.config, *shape), self.config)
        if variant.teacher is not None:
            teacher = VARIANTS[variant.teacher].network(self.config, *shape)
            teacher.load_state_dict(load_file(teacher_file(variant.teacher, budget)))
            layout = {"memory_format": torch.channels_last}
            self.train_step.teacher = teacher.eval().to(self.device, **layout)  # type: ignore[attr-defined]
        self.batch_size = self.config.batch_size
        self.steps_per_epoch = batches.count_steps_per_epoch(len(images.train), self.batch_size)

    def take_step(self, x: Tensor, labels: Tensor, step: int, steps: int) -> None:
        """Take one step."""
        if self.variant.batch is not None:
            random = generator(self.config.seed, 0, step)
            x, labels = self.variant.batch(x, labels, step / steps, random)
        self.loss, _ = self.train_step(x, labels, step, steps)
        if self.device.type == "cpu":  # a GPU would be waited for
            self.check_loss(step)

    def check_loss(self, step: int) -> None:
        """Raise unless the loss of a step is a number."""
        if not torch.isfinite(self.loss):
            raise ValueError(f"the loss of step {step} is {float(self.loss)}")

    def clock(self) -> float:
        """Return the seconds of the processor, or of the clock when the GPU has done all it was given."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def epoch(self, number: int, first_step: int = 0) -> Any:
        """Return an iterator over the batches of an epoch."""
        return batches.epoch_batches(
            self.images,
            self.config,
            self.device,
            epoch=number,
            first_step=first_step,
            ahead=self.device.type != "cpu",
            on_lost=raise_lost,
        )

    def train(self, steps: int) -> float:
        """Train so many steps; return the seconds, see `clock`."""
        started, step = self.clock(), 0
        while step < steps:
            for x, labels in self.epoch(step // self.steps_per_epoch):
                self.take_step(x, labels, step, steps)
                step += 1
                if step == steps:
                    break
        seconds = self.clock() - started
        self.check_loss(step - 1)
        return seconds

    def seconds_per_image(self, done: float) -> float:
        """Return what an image takes in a step in the middle of a training, and spoil the network."""
        steps, started = 1000, self.clock()
        ((x, labels),) = self.epoch(0, self.steps_per_epoch - 1)  # the last batch, so that none is decoded ahead
        self.take_step(x, labels, int(done * steps), steps)
        return (self.clock() - started) / len(x)

    @torch.no_grad()
    def scores(self, *, flip: bool = False, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the averaged network's scores of the held-out images, in the precision of the training."""
        model, step = self.train_step.ema_model.eval(), self.train_step
        found = []
        for pixels in self.images.test.images.split(250):
            x = data.to_float(pixels, self.images.mean, self.images.std)
            if shift != (0, 0):
                down, right = shift
                x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, 2 - down :, 2 - right :]
                x = x[:, :, : pixels.shape[2], : pixels.shape[3]]
            with torch.autocast(self.device.type, dtype=step.dtype, enabled=step.dtype != torch.float32):
                found.append(model(x.flip(3) if flip else x).float())
        return torch.cat(found).cpu()


def teacher_file(name: str, budget: Budget) -> Path:
    """Return where the network of a variant lies that others learn from."""
    return TEACHERS / f"{name}-{budget.source}-{budget.images or 'all'}.safetensors"


def raise_lost(path: str, reason: str) -> None:
    raise OSError(f"{path}: {reason}")


def relative_cost(variant: Variant, budget: Budget, images: data.Data) -> float:
    """Return what an image takes with a variant, in times of the default's, over the whole training."""
    if not variant.cost:
        return 1.0
    both = [Run(v, budget, images, seed=0) for v in (VARIANTS["default"], variant)]
    ratios = []
    for done in (0.0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):  # in turn; some variants change as they go
        own, other = (min(run.seconds_per_image(done) for _ in range(2)) for run in both)
        ratios.append(other / own)
    return statistics.mean(ratios[1:])  # the first one warms up


def run_one(name: str, set_name: str, seed: int, images: data.Data) -> dict[str, Any]:
    """Train one variant and return its line of the results."""
    variant, budget = VARIANTS[name], BUDGETS[set_name]
    cost = relative_cost(variant, budget, images)
    run = Run(variant, budget, images, seed)
    image_passes = budget.epochs * len(images.train) * variant.length / cost
    steps = max(1, round(image_passes / run.batch_size))
    seconds = run.train(steps)
    if seed == 0 and name in {variant.teacher for variant in VARIANTS.values()}:
        TEACHERS.mkdir(exist_ok=True)
        weights = {key: value.contiguous() for key, value in run.train_step.ema_model.state_dict().items()}
        save_file(weights, teacher_file(name, budget))
    labels = images.test.labels
    plain = run.scores()
    line = {
        "variant": name,
        "set": set_name,
        "seed": seed,
        "images": len(images.train),
        "epochs": round(steps / run.steps_per_epoch, 2),
        "steps": steps,
        "cost": round(cost, 3),
        "processor_seconds" if run.device.type == "cpu" else "gpu_seconds": round(seconds, 1),
        **figures(plain, labels),
    }
    if images.flip:
        mirrored = plain + run.scores(flip=True)
        line |= {f"{key}_flip": value for key, value in figures(mirrored, labels).items()}
        if name == "default" and seed == 0:
            places = [(0, 1), (0, -1), (1, 0), (-1, 0)]
            more = sum((run.scores(flip=f, shift=p) for p in places for f in (False, True)), torch.zeros(()))
            line |= {f"{key}_10_views": value for key, value in figures(mirrored + more, labels).items()}
    machine = checkpoint.environment()
    line |= {"precision": str(run.train_step.dtype).removeprefix("torch."), "date": datetime.date.today().isoformat()}
    line |= {key: machine[key] for key in ("nin", "python", "torch", "processor", "threads")}
    return line if run.device.type == "cpu" else {**line, "processor": torch.cuda.get_device_name(run.device)}


def figures(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracy, and the cross entropy at the best temperature, which says more of few images."""
    loss = F.cross_entropy(scores / metrics.fit_temperature(scores, labels), labels)
    return {"accuracy": round(float((scores.argmax(1) == labels).float().mean()), 4), "loss": round(float(loss), 4)}


def read_results() -> list[dict[str, Any]]:
    """Return the lines of the results."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def next_run(queue: Path, results: list[dict[str, Any]]) -> tuple[str, str, int] | None:
    """Return the first run of the queue that has no result."""
    there = {(line["variant"], line["set"], line["seed"]) for line in results}
    for text in queue.read_text().splitlines():
        words = text.split("#")[0].split()
        if words and (words[0], words[1], int(words[2])) not in there:
            return words[0], words[1], int(words[2])
    return None


def run_queue(folder: Path, queue: Path, *, threads: int, wait: bool) -> None:
    """Run what stands in the queue and has no result."""
    keep_freed_memory()
    loaded: dict[str, data.Data] = {}
    with use_threads(threads):
        while True:
            following = next_run(queue, read_results())
            if following is None:
                if not wait:
                    return
                time.sleep(20)
                continue
            name, set_name, seed = following
            if set_name not in loaded:
                loaded[set_name] = load(BUDGETS[set_name], folder)
            try:
                line = run_one(name, set_name, seed, loaded[set_name])
            except ValueError as error:  # the loss is no number: that is a result
                line = {"variant": name, "set": set_name, "seed": seed, "failed": str(error)}
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("data", type=Path)
    run.add_argument("queue", type=Path)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--wait", action="store_true")
    verbs.add_parser("table")
    drawing = verbs.add_parser("curve")
    drawing.add_argument("runs", nargs="+", metavar="NAME=RUN")
    drawing.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(words)
    if arguments.verb == "table":
        write_tables(FOLDER / "README.md", read_results(), BUDGETS)
    elif arguments.verb == "curve":
        runs = dict(pair.split("=", 1) for pair in arguments.runs)
        write_atomically(arguments.out, curve({name: Path(folder) for name, folder in runs.items()}) + "\n")
    else:
        run_queue(arguments.data, arguments.queue, threads=arguments.threads, wait=arguments.wait)


if __name__ == "__main__":
    main()
