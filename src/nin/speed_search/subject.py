"""What `nin.speed` is asked about: a network, the images that calibrate it, and the images that test it."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nin import checkpoint, data, models, names
from nin.data.findings import Finding
from nin.data.folder_entries import FolderWalk
from nin.errors import UserError
from nin.models.factory import create_external_model
from nin.models.package_networks import check_library_name, input_config
from nin.models.trained_network import load_trained
from nin.names import EXPECTED_FOLDER, SHARD_SUFFIXES
from nin.narrowing.narrow_to_folder import choose_preprocessing, count_scores
from nin.runtime.model_copy import keep_computed_weights
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.speed_search.networks import save_named, save_run
from nin.value_checks import check_mean_std, check_value

# of the images of a folder without classes, one in so many tests, the others calibrate
TEST_EVERY = 2


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network and its images.

    Attributes:
        name: of the network, as it was given.
        model: in evaluation mode, on the CPU, folded.
        info: of a run; None for a network of another package.
        images: all of them; ``test`` is what the answers are compared on, ``train`` what calibrates.
        preprocessing: from an image to the network's input.
        labelled: whether the network's scores are for the classes of the images.
        trust: whether somebody's module may be imported to make the network.
        made_for: numbers of classes and channels with which another package made the network, where they are not its
            usual ones.
    """

    name: str
    model: nn.Module
    info: checkpoint.RunInfo | None
    images: data.Data
    preprocessing: checkpoint.Preprocessing
    labelled: bool
    trust: bool = False
    made_for: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.preprocessing.channels, self.preprocessing.size, self.preprocessing.size

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the scores; none where they are not known."""
        if self.info is not None:
            return self.info.classes
        return self.images.classes if self.labelled else ()

    def save(self, folder: Path, model: nn.Module, plan: Any = None) -> None:
        """Write the network, or a narrowed form and its plan, into a folder for `networks.load_network`."""
        if self.info is None:
            save_named(folder, model, self.name, plan, made_for=self.made_for)
        else:
            save_run(folder, model, self.info, plan)

    def calibration_pixels(self, count: int, seed: int) -> Tensor:
        """Return images of the training part, uint8 (N, C, H, W), as `nin narrow` draws them."""
        order = data.epoch_order(len(self.images.train), seed=seed, epoch=0)[:count]
        return torch.cat([pixels for pixels, _, _ in data.batches(self.images.train, order, 64)])

    def test_pixels(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Return test images, uint8 (N, C, H, W), evenly spaced, and their labels where there are any."""
        total = len(self.images.test)
        order = torch.arange(total) if total <= count else torch.linspace(0, total - 1, count).round().long()
        batches = list(data.batches(self.images.test, order, 64))
        labels = torch.cat([labels for _, labels, _ in batches])
        return torch.cat([pixels for pixels, _, _ in batches]), labels if self.labelled else None


def load_subject(
    network: str | Path,
    source: str | Path | data.Data,
    *,
    weights: Path | None = None,
    size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    data_dir: Path | None = None,
    trust: bool = False,
    on_progress: ProgressCallback = ignore_progress,
) -> Subject:
    """Load a network and its images.

    Args:
        network: a run folder, or ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``.
        source: images as for `nin.data.load`, or a folder of images without classes.
        weights: of a network that is given by its name, see `nin.models.trained_network`; random ones if not given.
        size: height and width that images are brought to, in pixels; what the network is meant for if not given.
        mean: of each channel; that of the network's published weights if not given.
        std: the same.
        data_dir: where the files of the named data sets lie.
        trust: import the module that a run says its network is made by.
        on_progress: called while images are read.

    Raises:
        UserError: there is no such network, it does not take the images, or the arguments contradict each other.
    """
    check_has_images(source)
    options: dict[str, Any] = {"data_dir": data_dir, "photos": False, "on_progress": on_progress}
    if Path(network).is_dir():
        if weights is not None or size is not None or mean or std:
            raise UserError("--weights, --size, --mean and --std go with the name of a network: a run has its own")
        return _of_run(Path(network), source, options, trust)
    names.check_external(str(network))
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights: {weights} does not exist")
    check_mean_std(mean, std)
    if size is not None:
        check_value("size", size, int, lambda x: x >= 1, "at least 1")
    return _of_name(str(network), source, options, weights, size, mean, std)


def _of_run(run: Path, source: str | Path | data.Data, options: dict[str, Any], trust: bool) -> Subject:
    with models.trust() if trust else contextlib.nullcontext():
        model, info = checkpoint.load_model(run)
    p = info.preprocessing
    if is_unlabelled(source):
        images = load_unlabelled(Path(str(source)), **p.decoding)
    else:
        if isinstance(source, data.Data):
            images = data.with_recorded_parts(source, info.data)
        else:
            images = data.load_as_recorded(source, info.data, p, **options)
        if mismatch := info.mismatch(images):
            raise UserError(f"the images do not fit {run}: {mismatch}")
        images = dataclasses.replace(images, **{k: info.recipe[k] for k in ("flip", "shift") if k in info.recipe})
    return Subject(run.name, _as_it_answers(model), info, images, p, not is_unlabelled(source), trust)


def _of_name(
    name: str,
    source: str | Path | data.Data,
    options: dict[str, Any],
    weights: Path | None,
    size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Subject:
    library, _, own = name.partition(":")
    if library in names.LIBRARIES:
        check_library_name(library, own)
    config = input_config(name)
    if weights is None and library in names.LIBRARIES:
        check_mean_std(mean, std, config.channels)  # before the network is made, and below before images are read
    external = create_external_model(name) if weights is None else load_trained(name, weights)
    if library in names.LIBRARIES:
        check_mean_std(mean, std, external.channels)
    model = external.model.eval()
    named = source in data.DATASET_NAMES
    size = size or (None if named or isinstance(source, data.Data) else external.height)
    if is_unlabelled(source):
        images = load_unlabelled(
            Path(str(source)), size=size or external.height, channels=external.channels, resize=config.resize
        )
    elif named or isinstance(source, data.Data):
        images = data.load(source, **{**options, "size": size})
    else:
        images = data.load(source, **{**options, "size": size, "resize": config.resize})
    preprocessing = choose_preprocessing(images, config, mean, std)
    scores = count_scores(model, images, preprocessing)
    if scores is None:
        raise UserError(f"{name} gives no table of scores (images, classes): nin speed compares classifiers")
    labelled = not is_unlabelled(source) and scores == len(images.classes)
    return Subject(name, _as_it_answers(model), None, images, preprocessing, labelled, made_for=external.made_for)


def _as_it_answers(model: nn.Module) -> nn.Module:
    """Return the network with its weights as they are used: standardised ones folded, computed ones kept."""
    if isinstance(model, models.NiN):
        model.fold()
    keep_computed_weights(model)
    return model.eval().requires_grad_(False)


def is_unlabelled(source: object) -> bool:
    """Return whether a source is a folder with images in it and no folders that may hold some: without classes."""
    if not isinstance(source, str | Path) or str(source) in data.DATASET_NAMES or not Path(source).is_dir():
        return False
    walk = FolderWalk(Path(source))
    return not walk.subfolders(walk.root) and bool(walk.direct_images(walk.root))


def check_has_images(source: object) -> None:
    """Check that a folder is not without any image: what `nin.data.load` says of it is for training.

    Raises:
        UserError: it is.
    """
    if not isinstance(source, str | Path) or str(source) in data.DATASET_NAMES or not Path(source).is_dir():
        return
    if next(data.find_images(Path(source)), None) is None and not any(
        path.name.endswith(SHARD_SUFFIXES) for path in Path(source).rglob("*")
    ):
        raise UserError(f"{source}: {EXPECTED_FOLDER}, or a folder of images without classes, got no images")


def load_unlabelled(folder: Path, *, size: int, channels: int, **decoding: Any) -> data.Data:
    """Return the images of a folder without classes: a part to calibrate with, and another to compare answers on.

    Raises:
        UserError: there are fewer than two images.
    """
    findings: list[Finding] = []
    root = folder.resolve()  # a name for a folder that is given as ".", and the same one from wherever it is read
    files = sorted(os.path.relpath(path, root) for path in data.find_images(root, findings=findings))
    if len(files) < TEST_EVERY:
        raise UserError(
            f"{folder}: at least {TEST_EVERY} images are needed, to calibrate with and to compare answers on"
        )

    def part(chosen: list[str]) -> data.FileSet:
        labels = torch.zeros(len(chosen), dtype=torch.int64)
        return data.FileSet(
            labels=labels, names=data.PathList(chosen), channels=channels, size=size, root=root, **decoding
        )

    order = data.epoch_order(len(files), seed=0, epoch=0).tolist()  # neighbours are often nearly the same photo
    cut = len(files) // TEST_EVERY
    test, train = ([files[i] for i in sorted(some)] for some in (order[:cut], order[cut:]))
    return data.Data.from_sets(root.name, part(train), part(test), ("image",), findings=tuple(findings))
