"""The names of folders that hold the parts of a set: train, test, val, in the words that people use."""

import re
import unicodedata
from collections.abc import Iterable

_TRAIN, _TEST, _VAL = "train", "test", "val"
_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainset", "traindata", "learning"), _TRAIN),
    **dict.fromkeys(("lernen", "entrenamiento", "entrainement", "treino", "addestramento"), _TRAIN),
    **dict.fromkeys(("test", "testing", "tst", "testset", "testdata", "holdout"), _TEST),
    **dict.fromkeys(("prueba", "teste", "prova"), _TEST),
    **dict.fromkeys(("val", "valid", "validate", "validation", "valset", "dev", "devset"), _VAL),
    **dict.fromkeys(("eval", "evaluation", "evaluate", "validacion", "validierung"), _VAL),
}

# They may stand beside such a word without meaning anything: seg_train, training_set, train_images, test1.
_FILLERS = {
    *("set", "data", "dataset", "subset", "split", "part", "folder", "dir", "files", "full", "all", "seg", "the"),
    *("images", "image", "imgs", "img", "pictures", "photos", "pics", "jpg", "jpeg", "png", "final", "new"),
}
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


def folded_name(name: str) -> str:
    """Return what is left of a name without case, spaces and marks between words: what a person may confuse."""
    return re.sub(r"[\s_\-.]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _parse(name: str) -> tuple[str, tuple[str, ...]]:
    """Return the part that a name stands for, "" for none, and its other words without fillers."""
    words = _words(name)
    parts = [word for word in words if word in _WORDS]
    if len(parts) != 1:
        return "", ()
    return _WORDS[parts[0]], tuple(word for word in words if word not in _FILLERS and word not in _WORDS)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: runs of letters, and parts that begin with a capital."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return [word.casefold() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|[^\W\d_]+", plain)]
