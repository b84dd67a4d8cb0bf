"""TrainConfig: every training setting with its unit and its reason. Importing it does not import PyTorch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from nin import given
from nin.errors import UserError
from nin.given import remembers_given
from nin.recipes import FINETUNE_STEPS, RECIPES, learning_rate_by_batch, optimizer_by_network
from nin.value_checks import check_value

# Images of at least so many pixels a side are photos: they are augmented by random crops of the whole photo. Smaller
# ones are moved by a pixel or two, as what they show fills them.
PHOTO_SIZE = 96

# Below so many photos a training from nothing learns them by heart before it knows enough: smaller images, a network of
# fewer weights and stronger augmentation, see benchmarks/photos/README.md.
FEW_PHOTOS = 5000

# PyTorch's generators take 64 bits, of which `step_seed` needs the rest.
LARGEST_SEED = 2**32 - 1

# More than any machine has; PyTorch fails to start many more in a way that ends the program.
MOST_THREADS = 1024


def check_seed(seed: int) -> None:
    """Check that a seed is in range.

    Raises:
        UserError: it is not 0 to `LARGEST_SEED`.
    """
    check_value("seed", seed, int, lambda x: 0 <= x <= LARGEST_SEED, f"0 to {LARGEST_SEED}")


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one training step's dropout, so that a resumed training draws what it would have drawn.

    Trainings with different seeds have no step's seed in common before step 1,000,003, a prime that few reach.
    """
    return seed * 1_000_003 + step


@remembers_given
@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of `nin.train`. What is None is chosen from the data by `resolve`, and recorded in the run folder.

    Attributes:
        recipe: defaults of the other settings: "default", "speed" for a GPU (few, large steps), or "finetune"; if not
            given, the last one where the training begins with weights, or only the class layer is trained.
        model: nin_digits, nin_cifar, nin_imagenet, googlenet, or timm:NAME, torchvision:NAME, package.module:factory;
            if not given, that of ``weights`` where they are a run's, else chosen by the size of the images.
        pretrained: begin with the weights that timm or torchvision publish for the network. They are downloaded once.
        weights: begin with these: a .safetensors file, a state_dict that torch.save wrote (read without running code),
            or a run folder. The class layer is a new one where the classes are not as many.
        freeze: train the class layer alone, on the features that the network has from its weights.
        epochs: passes over the training images; if not given, 18 (finetune: 12), and more where there are few images.
        batch_size: images per step, of all processes together; if not given, 128, and less where there are few images;
            "auto" takes the largest power of two that fits into a GPU's memory and leaves 20 steps an epoch.
        learning_rate: at the peak of the one-cycle schedule; taken as it is given, whatever the batch size. If not
            given, 0.025 for batches of 128 and more or less with the root of the batch, 0.05 at most (SGD: 0.1 and
            0.2; AdamW: 0.002). "auto" finds one by a range test of less than a minute (docs/finetuning.md).
        body_rate: factor of the learning rate for all layers before the class layer; 1 unless the recipe says another.
        optimizer: "muon", whose steps are orthogonal matrices (for weights with weight standardisation; the others
            have SGD with twice the learning rate), "sgd" or "adamw". Unless the recipe says another, Muon for networks
            with weight standardisation and SGD for others.
        warmup: fraction of all steps in which the learning rate rises from zero; it falls to zero in the rest. 0.2
            unless the recipe says another.
        schedule: how it falls: "cosine" unless the recipe says another, or "triangle" (in a straight line).
        momentum: of Muon and SGD, in Nesterov's form; of AdamW's gradients it is 0.9.
        weight_decay: per step, on weights only (not on biases and gains); 0.0005 unless the recipe says another.
        batch_norm: "train", unless the recipe says another, takes the mean and variance of each batch; "frozen" takes
            the running ones that the weights came with, and leaves them. Scales and shifts are trained in either case.
        label_smoothing: probability of the target that is spread evenly over all classes; 0.1 unless the recipe says
            another.
        gradient_clip: maximum norm of the gradient of all parameters together.
        ema: decay per step of the averaged weights, which are the ones that are tested and saved; 0.995 unless the
            recipe says another.
        dropout: probability, after each pooling; if not given, 0.2 for nin_digits and 0 for others. The paper's 0.5 is
            for hundreds of epochs.
        normalisation: "weight_standardisation" keeps the 1×1 chains in one piece, "none" is the paper's network; if
            not given, the first for networks of mlpconv layers (nin_…), and "none" for googlenet, which has no other.
        last_activation: "relu" is the paper's; it stops many runs at a loss of ln(classes). googlenet has "none".
        flip: mirror half of the images; if not given, where neither the names of the classes (left and right, digits,
            angles) nor a look at the images say that a mirrored one is of another class.
        shift: maximum random translation, in pixels, of images below 96 pixels; if not given, about a fifteenth of the
            image. Larger images are cropped at random instead.
        augment: "none"; "light", which mirrors (see flip) and crops or translates; or "strong", which also changes
            colours, turns, shears and erases parts (TrivialAugment, colour jitter, random erasing); if not given, the
            recipe's, else "strong" for less than 5,000 photos and "light" for others.
        train_size: height and width of the random crops of photos, in pixels; if not given, those of the images, or
            two thirds of it where nin_cifar learns from less than 5,000. Smaller ones make an epoch shorter, and
            need cost no accuracy: objects look larger in a random crop than in the whole photo that is tested. Touvron
            et al. 2019, arXiv 1906.06423.
        mixup: alpha of the Beta distribution of the shares in which images are mixed in pairs, 0 for none; 0.2 and 0.8
            are usual. Zhang et al. 2018, arXiv 1710.09412.
        cutmix: likewise for a box of one image pasted into another, 0 for none; 1 is usual. With both, each step draws
            which of the two it takes. Yun et al. 2019, arXiv 1905.04899.
        validation: fraction of the training images of each class that is set apart to choose by. The epochs are then
            measured on it, and the test images are looked at once, at the end. If not given, all are trained on. A data
            set with a validation part of its own (a val folder beside test) takes none.
        patience: end the training after so many epochs without a better one on the validation images, and keep the
            best by them; if not given, the last epoch is kept. Of equal accuracy the lower loss is better.
        balance: what makes up for classes of unequal size: "sampling" draws as many images of each class in an epoch,
            "weights" counts the loss of an image by the inverse of its class's size; if not given, nothing.
        seed: of the weights, the order, the augmentation and the dropout, below 2³². Two runs on one machine are
            equal.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        precision: "auto" takes "bf16" where the processor multiplies in it, else "fp32".
        threads: of the CPU; if not given, one for each core.
        given: the names of the settings that were given. A training that is resumed has its own in place of the others.
    """

    given: ClassVar[frozenset[str]]
    recipe: Literal["default", "speed", "finetune"] | None = None
    model: str | None = None
    pretrained: bool = False
    weights: str | None = None
    freeze: bool = False
    epochs: int | None = None
    batch_size: int | Literal["auto"] | None = None
    learning_rate: float | Literal["auto"] | None = None
    body_rate: float | None = None
    optimizer: Literal["sgd", "adamw", "muon"] | None = None
    warmup: float | None = None
    schedule: Literal["cosine", "triangle"] | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    batch_norm: Literal["train", "frozen"] | None = None
    label_smoothing: float | None = None
    gradient_clip: float = 1.0
    ema: float | None = None
    dropout: float | None = None
    normalisation: Literal["weight_standardisation", "none"] | None = None
    last_activation: Literal["none", "relu"] = "none"
    flip: bool | None = None
    shift: int | None = None
    augment: Literal["none", "light", "strong"] | None = None
    train_size: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    validation: float | None = None
    patience: int | None = None
    balance: Literal["sampling", "weights"] | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges, before any data are loaded, and turn NumPy's numbers into Python's for JSON."""
        if self.weights is not None and hasattr(self.weights, "__fspath__"):
            object.__setattr__(self, "weights", str(self.weights))
        if type(self.device).__name__ == "device":  # of PyTorch, without importing it
            object.__setattr__(self, "device", str(self.device))
        for names, kind, is_valid, requirement in _CHECKS:
            for name in names:
                value = getattr(self, name)
                if not (value is None and name in _OPTIONAL) and not (value == "auto" and name in _FOUND):
                    object.__setattr__(self, name, check_value(name, value, kind, is_valid, requirement))
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words and not (value is None and name in _OPTIONAL):
                raise UserError(f"{name} must be one of {', '.join(words)}, got {value!r}")
        check_seed(self.seed)
        if self.pretrained and self.weights is not None:
            raise UserError("give --pretrained or --weights, not both")
        if self.freeze and not (self.pretrained or self.weights or self.recipe == "finetune"):
            raise UserError(
                "freeze trains the class layer on what weights have learned: give --pretrained or --weights"
            )
        if self.freeze and self.recipe not in (None, "finetune"):
            raise UserError(f"freeze goes with the recipe finetune, got {self.recipe}")
        if self.freeze and self.balance == "sampling":
            raise UserError('freeze takes each image once, so there is nothing to sample: give balance="weights"')
        if self.pretrained and ":" not in (self.model or ""):
            raise UserError(f"--pretrained goes with --model timm:NAME or torchvision:NAME, got model={self.model}")
        if self.augment == "none" and (self.flip or self.shift):
            raise UserError('augment "none" changes no image: leave flip and shift away, or give augment="light"')

    def crops(self, image_size: int) -> bool:
        """Return whether images of this size, in pixels, are cropped at random."""
        return self.augment != "none" and image_size >= PHOTO_SIZE

    def unused_note(self) -> str:
        """Return which of the given settings have no part in the fit of the class layer alone; "" for none."""
        names = sorted(self.given & _OF_STEPS) if self.freeze else []
        if self.freeze and self.augment == "strong":
            names.append("augment")
        if not names:
            return ""
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        return (
            f"--freeze fits the class layer once, without steps and random changes of images: {options} change nothing"
        )

    def finds(self, name: str) -> bool:
        """Return whether a setting is to be found by trying."""
        return bool(getattr(self, name) == "auto")

    def resolve(self, *, images: int, image_size: int, flip: bool, shift: int) -> "ResolvedConfig":
        """Return the settings with every None replaced, apart from those of the machine.

        Args:
            images: number of training images.
            image_size: their height and width, in pixels.
            flip: whether a mirrored image keeps its label.
            shift: maximum translation that suits the images, in pixels.

        Raises:
            UserError: a setting does not fit the images.
        """
        if self.shift and self.crops(image_size):
            raise UserError(
                f"shift is for images below {PHOTO_SIZE} pixels, got {image_size}: larger ones are cropped at random; "
                'leave it away, or give augment="none"'
            )
        if self.shift is not None and self.shift >= image_size:
            raise UserError(f"shift must be below the {image_size} pixels of the images, got {self.shift}")
        if self.train_size is not None and not (self.crops(image_size) and self.train_size <= image_size):
            raise UserError(
                f"train_size is for random crops of photos, of {PHOTO_SIZE} pixels or more, and at most their size: "
                f"got {self.train_size}, images of {image_size} pixels and augment={self.augment or 'light'}"
            )
        if self.freeze:  # one fit, without steps: nothing of a step's is to be found by trying
            self = given.replace(self, epochs=1, learning_rate=None, batch_size=None)
        recipe = self.recipe or ("finetune" if self.pretrained or self.weights else "default")
        few_photos = recipe != "finetune" and image_size >= PHOTO_SIZE and images < FEW_PHOTOS
        takes_crops = self.crops(image_size)
        # about 400,000 images seen, at least 18 times each (60,000 images: 18 epochs; 660 photos: 100); from weights
        # about 26,000, at least 12 times each (660 photos: 40 epochs), as the features are there already
        seen, least = (26_000, 12) if recipe == "finetune" else (400_000, 18)
        # steps of the smallest network are so short that Muon's are a third longer than SGD's, which took 100 epochs
        most = 75 if image_size <= 16 else 100
        epochs = 1 if self.freeze else min(most, max(least, math.ceil(seen / images)))
        # at least 20 steps an epoch, so that a few hundred images still make a thousand steps
        batch_size = max(16, min(128, 2 ** int(math.log2(max(16, images / 20)))))
        # nin_cifar up to the size at which it costs what nin_imagenet does at 224 pixels; at 96 it costs twice that.
        # It has an eighth of the weights, which is worth more than the time where there are few photos
        largest = 128 if few_photos else 70
        by_size = "nin_digits" if image_size <= 16 else "nin_cifar" if image_size <= largest else "nin_imagenet"
        model = self.model or by_size
        is_standardised = self.normalisation == "weight_standardisation" or (
            self.normalisation is None and model.startswith("nin_")
        )
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {**RECIPES["default"], **RECIPES[recipe]}
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        chosen = {
            "recipe": recipe,
            "body_rate": 1.0,
            "optimizer": optimizer_by_network(is_standardised=is_standardised),
            "batch_norm": "train",
            "augment": "strong" if few_photos else "light",
            "train_size": image_size * 2 // 24 * 8 if few_photos and model == "nin_cifar" and takes_crops else None,
            "model": model,
            "epochs": epochs,
            "batch_size": batch_size,
            "dropout": 0.2 if model == "nin_digits" else 0.0,
            "normalisation": "weight_standardisation" if is_standardised else "none",
            "flip": flip and self.augment != "none",
            "shift": shift if self.augment != "none" else 0,
            # a step on such small images is shorter than what it takes two threads to wait for each other
            "threads": 1 if image_size <= 16 else None,
        }
        values |= {name: value for name, value in chosen.items() if values[name] is None}
        if values["optimizer"] == "muon" and values["normalisation"] != "weight_standardisation":
            raise UserError(
                f"optimizer muon is for networks with weight standardisation (nin_…), got {model} with "
                f"normalisation={values['normalisation']}"
            )
        if values["learning_rate"] is None:
            size = 128 if values["batch_size"] == "auto" else min(values["batch_size"], images)
            values["learning_rate"] = learning_rate_by_batch(values["optimizer"], size)
        if recipe == "finetune" and not self.freeze and values["batch_size"] != "auto":
            share = values["epochs"] * max(1, images // values["batch_size"]) / FINETUNE_STEPS
            if share < 1 and self.learning_rate is None:
                values["learning_rate"] *= share
            if share < 1 and self.batch_norm is None:
                values["batch_norm"] = "frozen"
        return ResolvedConfig(**values)


# settings whose None means that they are chosen
_OPTIONAL = {"model", "epochs", "batch_size", "dropout", "normalisation", "flip", "shift", "threads"}
_OPTIONAL |= {"recipe", "body_rate", "optimizer", "batch_norm", "augment", "weights", "validation", "patience"}
_OPTIONAL |= {"learning_rate", "warmup", "schedule", "weight_decay", "label_smoothing", "ema", "balance", "train_size"}

# settings of the steps, which a frozen body does not take
_OF_STEPS = {"epochs", "batch_size", "learning_rate", "body_rate", "optimizer", "warmup", "schedule", "momentum"}
_OF_STEPS |= {"weight_decay", "batch_norm", "gradient_clip", "ema", "dropout", "shift", "train_size", "mixup", "cutmix"}
_OF_STEPS |= {"patience"}

# settings whose "auto" means that they are found by trying
_FOUND = {"learning_rate", "batch_size"}

# for the settings: the type, which values are in range, and that in words
_CHECKS: tuple[tuple[tuple[str, ...], type, Callable[[Any], bool], str], ...] = (
    (("epochs", "batch_size", "patience"), int, lambda x: x >= 1, "at least 1"),
    (("train_size",), int, lambda x: x >= 16, "at least 16"),
    (("threads",), int, lambda x: 1 <= x <= MOST_THREADS, f"at least 1 and at most {MOST_THREADS}"),
    (("warmup", "momentum", "label_smoothing", "ema"), float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    (("validation",), float, lambda x: 0 < x < 1, "above 0 and below 1"),
    (("dropout",), float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    (("learning_rate", "gradient_clip"), float, lambda x: 0 < x < math.inf, "above 0 and finite"),
    (("mixup", "cutmix"), float, lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    (("body_rate",), float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    (("weight_decay",), float, lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    (("shift",), int, lambda x: x >= 0, "at least 0 and finite"),
    (("flip", "pretrained", "freeze"), bool, lambda x: True, ""),
    (("model", "weights", "device"), str, lambda x: True, ""),
)

# for settings that are words: which
_WORDS = {
    "recipe": ("default", "speed", "finetune"),
    "optimizer": ("sgd", "adamw", "muon"),
    "batch_norm": ("train", "frozen"),
    "schedule": ("cosine", "triangle"),
    "normalisation": ("weight_standardisation", "none"),
    "last_activation": ("none", "relu"),
    "augment": ("none", "light", "strong"),
    "precision": ("auto", "bf16", "fp32"),
    "balance": ("sampling", "weights"),
}


@remembers_given
@dataclasses.dataclass(frozen=True)
class ResolvedConfig(TrainConfig):
    """`TrainConfig` after `resolve`: settings that depend on the data are no longer None."""

    recipe: Literal["default", "speed", "finetune"] = "default"
    model: str = "nin_cifar"
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.1
    body_rate: float = 1.0
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    warmup: float = 0.2
    schedule: Literal["cosine", "triangle"] = "cosine"
    weight_decay: float = 5e-4
    batch_norm: Literal["train", "frozen"] = "train"
    label_smoothing: float = 0.1
    ema: float = 0.995
    augment: Literal["none", "light", "strong"] = "light"
    dropout: float = 0.0
    normalisation: Literal["weight_standardisation", "none"] = "weight_standardisation"
    flip: bool = False
    shift: int = 0
