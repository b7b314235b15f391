"""Tensors in a file: the same ones, few descriptors, and a sentence when there is no room."""

import errno
import os
from pathlib import Path

import pytest
import torch

from stablelm.errors import StorageError
from stablelm.probe import disk_offload as module
from stablelm.probe.disk_offload import Shelf, shares


@pytest.mark.parametrize("segment", [64, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_tensors_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: int, dtype: torch.dtype):
    monkeypatch.setattr(module, "SEGMENT", segment)  # smaller than a tensor, or with room for some
    tensors = [torch.randn(3, index % 7 + 1, 5, dtype=dtype).transpose(0, 1) for index in range(20)]
    with Shelf(tmp_path) as shelf:
        kept = shelf.put(tensors)
        again = [tensor.clone() for tensor in kept]
        assert list(tmp_path.iterdir()) == []
    for tensor, one, other in zip(tensors, kept, again, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, tensor)
        assert torch.equal(other, tensor)


def test_a_thousand_tensors_need_few_descriptors(tmp_path: Path):
    with Shelf(tmp_path) as shelf:
        before = len(os.listdir("/dev/fd"))
        kept = [shelf.put([torch.full((4, 4), float(index))])[0] for index in range(1000)]
        assert len(os.listdir("/dev/fd")) <= before + 1
        assert [float(tensor[3, 3]) for tensor in kept] == list(range(1000))


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path):
    with Shelf(tmp_path) as shelf:
        real = shelf._file

        class Full:
            def seek(self, *arguments: int) -> int:
                return real.seek(*arguments)

            def write(self, data: bytes) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def close(self) -> None:
                real.close()

        shelf._file = Full()  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(StorageError, match=r"No space left on device.*--out"):
            shelf.put([torch.zeros(3)])


def test_shares_of_a_gradient_that_stands_for_several_chunks():
    whole = torch.arange(12.0).reshape(1, 2, 6)
    parts = shares((whole,), (torch.empty(1, 2, 3), torch.empty(1, 2, 1), torch.empty(1, 2, 2)))
    assert torch.equal(torch.cat(parts, -1), whole)
    assert [part.shape[-1] for part in parts] == [3, 1, 2]
    assert shares((whole, whole), (whole, whole)) == (whole, whole)
