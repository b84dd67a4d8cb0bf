"""Classifiers on the Hugging Face Hub: save, load and push a run folder with a model card.

Importing this module imports ``huggingface_hub`` (``pip install 'network-in-network[hub]'``); nothing else of nin
does. Only loading from the Hub and pushing to it need the internet.
"""

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any, Self

from PIL import Image
from torch import nn

from nin import checkpoint, data, models
from nin.checkpoint import RunInfo
from nin.display.numbers import format_bytes, format_percent, format_percent_range
from nin.display.tables import escape_markdown, markdown_table
from nin.inference.classifier import Classifier
from nin.profiling.cost import Cost, cost
from nin.report import draw_image_grid, example_rows
from nin.report.settings import used_settings
from nin.runtime.files import write_atomically
from nin.version import install_command

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"nin.hub needs {error.name}: {install_command('hub')}", name=error.name) from error

PICTURE_FILE = "confidence-maps.png"
# rows of the model card's picture, one image of each
PICTURE_CLASSES = 4


class HubClassifier(Classifier, PyTorchModelHubMixin, library_name="nin", tags=["network-in-network"]):
    """A `nin.Classifier` with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    It saves a run folder, for `nin.load`, ``nin predict`` and ``nin serve`` too, with a model card.

    Args:
        model: as for `nin.Classifier`.
        info: as for `nin.Classifier`.
        device: where to compute.
        picture: some images with their confidence maps, for the model card.

    ``from_pretrained`` takes ``device`` and ``trust`` as `from_run` does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = nin.train("digits", nin.TrainConfig(epochs=1), out=f"{folder}/run")
        ...     _ = HubClassifier.from_run(f"{folder}/run").save_pretrained(f"{folder}/digits")
        ...     HubClassifier.from_pretrained(f"{folder}/digits").classes[:3]
        ('0', '1', '2')
    """

    def __init__(
        self, model: nn.Module, info: RunInfo, *, device: str = "cpu", picture: Image.Image | None = None
    ) -> None:
        super().__init__(model, info, device=device)
        self.picture = picture

    @classmethod
    def from_run(cls, run: str | Path, *, images: Any = None, device: str = "cpu", trust: bool = False) -> Self:
        """Return the classifier of a run folder.

        Args:
            run: the folder that `nin.train` made.
            images: what it was trained on, as for `nin.data.load`: its test images make the card's picture.
            device: where to compute.
            trust: import the module that the run says its network is made by, where that is somebody's own.

        Raises:
            UserError: the folder or the images cannot be read, or its network is made by a module that is not trusted.
        """
        with models.trust() if trust else contextlib.nullcontext():
            model, info = checkpoint.load_model(Path(run))
        picture = None
        if images is not None and not models.no_maps_reason(model):
            is_path = isinstance(images, str | Path)
            loaded = data.load_as_recorded(images, info.data, info.preprocessing) if is_path else data.load(images)
            rows = example_rows(Classifier(model, info), loaded, info.classes[:PICTURE_CLASSES])
            picture = draw_image_grid(rows, size=160) if rows else None
        return cls(model, info, device=device, picture=picture)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card: data, settings, accuracy with its interval, costs and picture."""
        p = self.info.preprocessing
        costs = cost(self.model, (1, p.channels, p.size, p.size))
        has_maps = not self.no_maps_reason
        return ModelCard(model_card_text(self.info, costs, picture=self.picture is not None, has_maps=has_maps))

    def _save_pretrained(self, save_directory: Path) -> None:
        info = self.info
        if info.model["kind"] == "nin":  # `Classifier` has folded its weight standardisation
            info = dataclasses.replace(info, model=checkpoint.model_description(self.model))
        checkpoint.save_model(save_directory, self.model, info)
        if self.picture is not None:
            content = io.BytesIO()
            self.picture.save(content, "PNG", optimize=True)
            write_atomically(save_directory / PICTURE_FILE, content.getvalue())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", trust: bool = False, **options: Any) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            # the mixin passes the fields of config.json too
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {name: options[name] for name in names}
            files = (checkpoint.CONFIG_FILE, checkpoint.MODEL_FILE)
            # both files come into one folder, that of the revision
            folder = [Path(hf_hub_download(model_id, file, **options)).parent for file in files][-1]
        with models.trust() if trust else contextlib.nullcontext():
            model, info = checkpoint.load_model(folder)
        return cls(model, info, device=device)


def model_card_text(info: RunInfo, cost: Cost, *, picture: bool, has_maps: bool = True) -> str:
    """Return the model card of a run as Markdown with YAML front matter."""
    result, recipe, trained_on = info.result, info.recipe, info.data
    used = used_settings(recipe, info.preprocessing.size)
    own_name = str(recipe.get("model", "network"))
    name = escape_markdown(own_name)
    kind = f"The network {name}" if models.is_external_name(own_name) else "A Network in Network"
    is_somebodys = models.is_external_name(own_name) and not own_name.startswith(("timm:", "torchvision:"))
    options = ", trust=True" if is_somebodys else ""  # the reader is told whose code that is, below
    maps = 'confidence_maps("new.png")' if has_maps else f'approximate_maps("new.png", [{info.classes[0]!r}])'
    source = escape_markdown(str(trained_on.get("name", "images")))
    size = f"{info.preprocessing.size}×{info.preprocessing.size}"
    colour = "grey" if info.preprocessing.channels == 1 else "colour"
    parts = [
        f"---\n{_card_metadata(info)}\n---\n\n# {name}, trained on {source}",
        f"Sorts {colour} images of {size} pixels into {len(info.classes)} classes: {_class_list(info.classes)}. "
        f"{kind}, of {cost.parameters:,} parameters and {cost.macs:,} multiply-accumulates an image.",
    ]
    if picture:
        parts.append(
            f"![Test images beside the maps of the answer and of the runner-up]({PICTURE_FILE})\n\n"
            "The score of a class is the mean of its map: orange speaks for the class, blue against it."
        )
    parts += [
        "## How good",
        _accuracy_table(info) if "test_accuracy" in result else "It was not tested.",
        "## Use it",
        "```python\nfrom nin.hub import HubClassifier\n\n"
        f'classifier = HubClassifier.from_pretrained("REPOSITORY OR FOLDER"{options})\n'
        f'classifier.predict("new.png")\nclassifier.{maps}\n```',
        *([f"`trust=True` lets it import the code that makes the network, {name}: look at it first."] * is_somebodys),
        "It names one of its classes for every image, also where the image shows none of them. How sure it is "
        "(`confidence`) was not calibrated.",
        "## Trained on",
        f"{source}: {trained_on.get('train_images', 0):,} images to train on, {trained_on.get('test_images', 0):,} to "
        f"test, {len(trained_on.get('skipped', []))} left out because they could not be read.",
        "## Recipe",
        markdown_table([("setting", "value"), *((k, str(v)) for k, v in used.items())]),
        "## Costs",
        f"For one image; one MAC is two floating-point operations. Activations {format_bytes(cost.activation_bytes)}.",
        markdown_table(cost.rows()),
        "## Made with",
        markdown_table([("what", "version"), *((k, str(v)) for k, v in info.environment.items())]),
    ]
    return "\n\n".join(parts) + "\n"


def _card_metadata(info: RunInfo) -> str:
    """Return the card's metadata for the Hub as YAML."""
    results = None
    if "test_accuracy" in info.result:
        dataset = str(info.data.get("name", "images"))
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="accuracy",
                metric_value=info.result["test_accuracy"],
            )
        ]
    card = ModelCardData(
        library_name="nin",
        pipeline_tag="image-classification",
        tags=["network-in-network", "pytorch_model_hub_mixin", "model_hub_mixin"],
        model_name=str(info.recipe.get("model", "network")) if results else None,
        eval_results=results,
    )
    return card.to_yaml()


def _accuracy_table(info: RunInfo) -> str:
    rows = [("test images", "accuracy", "95 % interval")]
    for key, what in (("test_accuracy", ""), ("test_accuracy_flip", ", and their mirror images")):
        if key in info.result:
            interval = f"{format_percent_range(info.result[f'{key}_interval'], 2)} %"
            rows.append((f"{info.result['test_images']:,}{what}", format_percent(info.result[key], 2), interval))
    return markdown_table(rows)


def _class_list(classes: tuple[str, ...]) -> str:
    shown = ", ".join(escape_markdown(name) for name in classes[:20])
    return shown if len(classes) <= 20 else f"{shown} and {len(classes) - 20} more"
