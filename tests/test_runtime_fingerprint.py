"""The hash of saved work changes with what it is about, and is that of the files of version 0.1."""

import hashlib

import pytest
import torch

from nin.runtime.fingerprint import changed_settings, fingerprint


def test_it_hashes_texts_bytes_and_values_one_after_the_other():
    values = torch.arange(6, dtype=torch.float32).view(1, 2, 3)
    expected = hashlib.sha256("ä".encode() + b"\0" + values.numpy().tobytes()).hexdigest()
    assert fingerprint(["ä", b"\0", values]) == expected
    assert fingerprint(["ä", b"\0", values], hashlib.blake2b(digest_size=16)) != expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_the_memory_format_does_not_matter_and_every_dtype_has_a_hash(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype)
    assert fingerprint([x]) == fingerprint([x.to(memory_format=torch.channels_last)])
    assert fingerprint([x]) != fingerprint([x[1:]])
    assert fingerprint([torch.tensor(3), x[:0]]) == fingerprint([torch.tensor([3])])


def test_a_setting_that_is_new_counts_as_changed_and_one_that_is_gone_does_not():
    assert list(changed_settings({"a": 1, "b": 2}, {"a": 1, "c": 3})) == [("b", None, 2)]
