"""Tensors in files: the same ones, no names, no descriptors, and a sentence when there is no space."""

import os
import resource
from pathlib import Path

import pytest
import torch

from stablelm.errors import StorageError
from stablelm.probe.disk_offload import to_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_tensors_come_back(tmp_path: Path, dtype: torch.dtype):
    tensors = [torch.randn(3, index % 7 + 1, 5, dtype=dtype).transpose(0, 1) for index in range(20)]
    kept = to_disk(tensors, tmp_path)
    assert list(tmp_path.iterdir()) == []
    for tensor, one in zip(tensors, kept, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, tensor)
        assert one.data_ptr() != tensor.data_ptr()


def test_a_thousand_tensors_keep_no_descriptors(tmp_path: Path):
    before = len(os.listdir("/dev/fd"))
    kept = to_disk((torch.full((4, 4), float(index)) for index in range(1000)), tmp_path)
    assert len(os.listdir("/dev/fd")) == before
    assert [float(tensor[3, 3]) for tensor in kept] == list(range(1000))


def test_a_full_disk_is_one_sentence(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written \(File too large\).*--out"):
            to_disk([torch.zeros(5000)], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
