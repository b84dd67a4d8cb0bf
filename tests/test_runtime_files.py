"""Atomic writes: the old file or the new one, its mode, and the errors."""

import os
import stat

import pytest

from nin.runtime import files


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_file_is_the_umasks_to_say(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "x", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_what_fails_in_the_block_leaves_the_old_file_and_its_own_words(tmp_path):
    path = tmp_path / "x"
    files.write_atomically(path, "old")
    with pytest.raises(OSError, match=r"^the images ended$"):
        write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_what_the_system_says_names_the_file(tmp_path):
    path = tmp_path / "none" / "x"
    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomically(path, "new")
    assert caught.value.filename == str(path)


def write_half(path):
    """Write, and fail before the end."""
    with files.open_atomically(path) as file:
        file.write(b"new")
        raise OSError("the images ended")
