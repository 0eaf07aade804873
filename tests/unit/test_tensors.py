"""Tensor files: permissions that the umask gives, and equal bytes for equal contents."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open

from diffpref.data.tensors import save_tensors


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        # libraries write large files through a private temporary one
        save_tensors(tmp_path / "large.safetensors", {"w": torch.zeros(2**20)})
    finally:
        os.umask(before)
    assert (tmp_path / "large.safetensors").stat().st_mode & 0o777 == mode


def test_equal_contents_are_equal_bytes_whatever_order_the_metadata_came_in(tmp_path):
    metadata = {f"key {number}": f"wert ü {number}" for number in range(9)}
    found = set()
    for number in range(6):
        order = dict(sorted(metadata.items(), key=lambda item, n=number: hash((n, item))))
        path = tmp_path / f"{number}.safetensors"
        save_tensors(path, {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.int64)}, order)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), torch.ones(3))
