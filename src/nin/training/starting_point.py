"""Where a training begins: the network's name, and published weights, those of a file, or those of another run."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nin import checkpoint, data, given, models
from nin.config import ResolvedConfig, TrainConfig
from nin.errors import UserError
from nin.models.initial_weights import InitialWeights
from nin.models.input_config import InputConfig
from nin.runtime.weight_files import read_tensors
from nin.training.state import recorded_settings
from nin.training.step import make_model


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """What a training begins with, as far as it is known before the images are.

    Attributes:
        config: the settings, with the network's name where the weights say it.
        input_config: the images that the weights were trained with; None where there are none, or a file of nin's own.
        run: what the run folder of the weights says, or None.
        resumed: the data's record of the training that is resumed; empty for one that begins.
    """

    config: TrainConfig
    input_config: InputConfig | None = None
    run: checkpoint.RunInfo | None = None
    resumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load_options(
        self, source: Any, *, size: int | None, resize: Any = None, test_fraction: float | None = None
    ) -> dict[str, Any]:
        """Return the options of `nin.data.load` that make images as the weights know them.

        Of the data that the weights' run was trained on it is that run's test images that are held out again.

        Args:
            source: what is loaded; named sets and arrays have a size of their own.
            size: height and width that were asked for, or None.
            resize: the mode that was asked for. If None, that of the weights' run; and "squash" where a library's say
                "crop", which cuts a quarter and more off a photo of 3:4: the random crops that such weights were
                trained with change the proportions as much. Figures: docs/finetuning.md.
            test_fraction: share that was asked for, or None.
        """
        is_fixed = not isinstance(source, str | Path) or str(source) in data.DATASET_NAMES
        options: dict[str, Any] = {} if resize is None else {"resize": resize}
        if self.run is not None and not self.resumed and _is_source(source, self.run.data):
            options["seed"] = self.run.data.get("seed", 0)
            test_fraction = self.run.data.get("test_fraction") if test_fraction is None else test_fraction
        if test_fraction is not None:
            options["test_fraction"] = test_fraction
        if self.input_config is not None and not is_fixed:
            own = self.input_config.resize
            if resize is None:
                resize = "squash" if self.run is None and own.mode == "crop" else own.mode
            return options | {"size": size or self.input_config.size, "resize": own.with_mode(resize)}
        return {"size": size, **options}

    def validation_seed(self, images: data.Data, config: TrainConfig) -> int:
        """Return the seed that chooses the validation part: that of the training that is resumed, or of the weights."""
        records = [self.resumed]
        if self.run is not None and self.run.data.get("source") == images.origin.get("source"):
            records.append(self.run.data)
        return next((record["validation_seed"] for record in records if "validation_seed" in record), config.seed)

    def learned_note(self, images: data.Data) -> str:
        """Return which images that are to measure the network its weights have learned already; "" for none."""
        own = images.origin
        if self.run is None or self.resumed or own.get("source") != self.run.data.get("source"):
            return ""
        record = self.run.data
        usual = 0.25 if own.get("source") == "digits" else 0.2
        parts = []
        fractions = [values.get("test_fraction") or usual for values in (own, record)]
        if own.get("seed", 0) != record.get("seed", 0) or fractions[0] > fractions[1]:
            parts.append("test images")
        if "fold" in own and any(own.get(name) != record.get(name) for name in ("fold", "folds", "fold_seed")):
            parts.append("images of the fold")
        if "validation" in own and (
            own["validation"] > record.get("validation", 0) or own["validation_seed"] != record["validation_seed"]
        ):
            parts.append("images to choose by")
        if not parts:
            return ""
        return (
            f"Some of the {' and of the '.join(parts)} may be among those that the weights were trained on: their "
            "figures are then too good"
        )

    def normalised(self, images: data.Data) -> data.Data:
        """Return the images with the mean and standard deviation that the weights were trained with."""
        if self.input_config is None:
            return images
        config = self.input_config.with_channels(images.channels)
        return dataclasses.replace(images, mean=config.mean, std=config.std)

    def make_model(
        self, config: ResolvedConfig, images: data.Data, *, resumes: bool, on_note: Callable[[str], None]
    ) -> Callable[[], nn.Module]:
        """Return a function that makes the network for the images, with the weights that the training begins with.

        Args:
            config: the settings.
            images: of the training.
            resumes: whether a saved state takes the place of all weights.
            on_note: called once with a line that says what of the weights fits.

        Raises:
            UserError: the weights cannot be read.
        """
        sizes: dict[str, Any] = {"channels": images.channels, "classes": len(images.classes), "size": images.size}
        if resumes:
            random = dataclasses.replace(config, pretrained=False)
            return lambda: make_model(random, **sizes)
        weights = None if config.weights is None else self.read_weights(images.classes)
        notes: list[str] = []

        def make() -> nn.Module:
            model = make_model(config, **sizes, weights=weights, on_note=notes.append)
            if len(notes) == 1:  # where the size of the batch is found by trying, the network is made twice
                on_note(notes[0])
            return model

        return make

    def read_weights(self, classes: tuple[str, ...] = ()) -> InitialWeights:
        """Return the weights of the settings' file or run; their class layer counts where it is of these classes.

        Raises:
            UserError: they cannot be read.
        """
        path = self.config.weights
        assert path is not None
        folder = _run_folder(path)
        if folder is None:
            return InitialWeights.of_file(Path(path))
        assert self.run is not None
        tensors, _ = read_tensors(folder / checkpoint.MODEL_FILE)
        return InitialWeights(tensors, path, class_layer=self.run.classes == classes)


def starting_point(config: TrainConfig, *, resumed: Path | None = None) -> StartingPoint:
    """Return where a training begins, and check it, before the images are read.

    Args:
        config: the settings.
        resumed: the run folder of a training that goes on: its state has the weights, so those that it began with may
            be gone.

    Raises:
        UserError: there is no such network, or no such weights, or those are of another network.
    """
    start = _starting_point(config, resumed)
    return start if resumed is None else dataclasses.replace(start, resumed=recorded_settings(resumed)[1])


def _starting_point(config: TrainConfig, resumed: Path | None) -> StartingPoint:
    if config.model is not None:
        models.check_name(config.model)
    if config.pretrained:
        assert config.model is not None
        models.check_pretrained(config.model)
        return StartingPoint(config, models.input_config(config.model))
    if config.weights is None:
        return StartingPoint(config)
    if resumed is not None and not Path(config.weights).exists():
        return _resumed(config, resumed, config.weights)
    folder = _run_folder(config.weights)
    if folder is not None:
        return _from_run(config, folder)
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(f"weights: {path} does not exist; give a .safetensors file, a state_dict, or a run folder")
    if config.model is None:
        raise UserError(f"weights: give --model, the network that {path} holds the weights of")
    if config.model in models.MODELS:
        return StartingPoint(config)
    return StartingPoint(config, _file_config(path) or models.input_config(config.model))


def _is_source(source: Any, record: Mapping[str, Any]) -> bool:
    """Return whether images are loaded from where those of a record lie."""
    if not isinstance(source, str | Path):
        return False
    return record.get("source") in (str(source), str(Path(source).resolve()))


def _resumed(config: TrainConfig, folder: Path, weights: str) -> StartingPoint:
    """Return where a training goes on whose first weights are gone: its images are those of its record."""
    if not (folder / checkpoint.CONFIG_FILE).is_file():
        raise UserError(
            f"weights: {weights} does not exist, and {folder} was stopped before its first epoch ended: bring the file "
            "back, or begin again"
        )
    info = checkpoint.load_info(folder)
    p = info.preprocessing
    return StartingPoint(config, InputConfig(p.size, p.channels, p.mean, p.std, resize=p.resize), info)


def _run_folder(weights: str) -> Path | None:
    """Return the run folder that weights are of, by its own name or that of its file; None for another file."""
    path = Path(weights)
    if path.is_dir():
        return path
    is_of_run = path.name == checkpoint.MODEL_FILE and _read_json(path.with_name(checkpoint.CONFIG_FILE)).get("classes")
    return path.parent if is_of_run else None


def _file_config(path: Path) -> InputConfig | None:
    """Return what timm's ``config.json`` beside a file of weights says of them."""
    cfg = _read_json(path.with_name("config.json")).get("pretrained_cfg")
    return InputConfig.from_timm(cfg) if isinstance(cfg, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where there is no such file, or it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _from_run(config: TrainConfig, folder: Path) -> StartingPoint:
    info = checkpoint.load_info(folder)
    description, changes = info.model, dict[str, Any]()
    match description.get("kind"):
        case "nin":
            architecture = description["config"]
            name = architecture["name"]
            changes["last_activation"] = architecture.get("last_activation", "none")
            changes["normalisation"] = architecture.get("normalisation") or "none"
        case "googlenet":
            name = "googlenet"
        case "external":
            name = description["name"]
            if config.model is None and not name.startswith(("timm:", "torchvision:")):
                raise UserError(f"weights: {folder} is of {name}, code that is not nin's: name it with --model {name}")
        case _:
            raise UserError(f"weights: {folder} holds a narrowed network: give the run that it was narrowed from")
    if name != (config.model or name) or (name not in models.MODELS and not models.is_external_name(name)):
        raise UserError(f"weights: {folder} is of {name}, not of {config.model}: leave --model away")
    p = info.preprocessing
    input_config = InputConfig(p.size, p.channels, p.mean, p.std, resize=p.resize)
    return StartingPoint(given.replace(config, model=name, **changes), input_config, info)
