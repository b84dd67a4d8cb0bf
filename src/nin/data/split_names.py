"""The names of folders that hold the parts of a set: train, test, val, in the words that people use; and of masks."""

import re
import unicodedata
from collections.abc import Iterable

_TRAIN, _TEST, _VAL = "train", "test", "val"
_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainset", "traindata", "learning"), _TRAIN),
    **dict.fromkeys(("trainval", "trainvalid", "训练", "训练集"), _TRAIN),
    **dict.fromkeys(("lernen", "entrenamiento", "entrainement", "treino", "addestramento"), _TRAIN),
    **dict.fromkeys(("test", "testing", "tst", "testset", "testdata", "holdout"), _TEST),
    **dict.fromkeys(("prueba", "teste", "prova", "测试", "测试集"), _TEST),
    **dict.fromkeys(("val", "valid", "validate", "validation", "valset", "dev", "devset"), _VAL),
    **dict.fromkeys(("eval", "evaluation", "evaluate", "validacion", "validierung", "验证", "验证集"), _VAL),
}

# They may stand beside such a word without meaning anything: seg_train, training_set, train_images, test1.
_FILLERS = {
    *("set", "data", "dataset", "subset", "split", "part", "folder", "dir", "files", "full", "all", "seg", "the"),
    *("images", "image", "imgs", "img", "pictures", "photos", "pics", "jpg", "jpeg", "png", "final", "new"),
}
_MASK_WORD = r"(?:masks?|seg(?:mentations?)?|ground[ _-]?truth|gt|annotations?)"
_MASK = re.compile(rf"(?:(.+?)[ _.-]+)?{_MASK_WORD}(?:[ _-]?\d+)?", re.IGNORECASE)
_UNLABELLED = {"unknown", "unlabelled", "unlabeled", "unsorted", "pred", "predict", "prediction", "submission"}


def find_splits(names: Iterable[str]) -> dict[str, str]:
    """Return which of the folders of these names hold which part of a set: "train", "test" or "val" by name.

    A name must have one word for a part. The other words must be such as "set" or "images", or the same as in the
    name of another part: asl_alphabet_train and asl_alphabet_test.
    """
    parsed = {name: _parse(name) for name in names}
    stems = [(part, stem) for part, stem in parsed.values() if part]
    return {
        name: part
        for name, (part, stem) in parsed.items()
        if part and (not stem or any(stem == other and part != other_part for other_part, other in stems))
    }


def is_unlabelled(name: str) -> bool:
    """Return whether a folder is called as people call one of images without labels."""
    return bool(_UNLABELLED & set(_words(name)))


def is_mask_name(name: str) -> bool:
    """Return whether a file or folder is called as people call masks: masks, cat_mask, Cat GT, image_1_seg_2."""
    return _MASK.fullmatch(name) is not None


def masked_name(name: str) -> str | None:
    """Return the name of the image that a mask of this name belongs to, or None where it has none."""
    found = _MASK.fullmatch(name)
    return found[1] if found else None


def folded_name(name: str) -> str:
    """Return what is left of a name without case, spaces and marks between words: what a person may confuse."""
    return re.sub(r"[\s_\-.]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _parse(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the part that a name stands for, "" for none, and its other words without fillers."""
    words = _words(name)
    parts = [_WORDS[word] for word in words if word in _WORDS]
    if len(parts) != 1 and parts != [_TRAIN, _VAL]:  # train_val is both together, to train on
        return "", ()
    return parts[0], tuple(word for word in words if word not in _FILLERS and word not in _WORDS)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: runs of letters, and parts that begin with a capital."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return [word.casefold() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|[^\W\d_]+", plain)]
