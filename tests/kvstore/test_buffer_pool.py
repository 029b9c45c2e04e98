"""Memory that is lent again once no tensor looks at it, and never before."""

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.core import EncodedChunk
from kvloom.kvstore.encoding.buffer_pool import BufferPool, rounded
from kvloom.testing import make_blob, same_blob


def test_lends_the_same_memory_again() -> None:
    pool = BufferPool()
    first = pool.empty(100_000)
    address = first.data_ptr()
    del first
    second = pool.empty(99_000)  # of the same step
    assert second.data_ptr() == address and second.shape == (99_000,) and second.dtype == torch.uint8


def test_a_view_keeps_the_memory() -> None:
    pool = BufferPool()
    data = pool.empty(1 << 20)
    view = data[8:4096].view(torch.float32)[3:]
    view.fill_(7.0)
    address = data.data_ptr()
    del data
    others = [pool.empty(1 << 20) for _ in range(3)]
    assert all(other.data_ptr() != address for other in others)
    for other in others:
        other.fill_(1)
    assert bool((view == 7.0).all())
    del view
    assert pool.empty(1 << 20).data_ptr() == address


def test_keeps_no_more_than_it_may() -> None:
    pool = BufferPool(capacity_bytes=1 << 20)
    lent = [pool.empty(1 << 19) for _ in range(7)]
    for _ in range(2):
        del lent[0]
        pool.empty(1 << 18)  # collects
    lent.clear()
    for _ in range(2):
        pool.empty(1 << 18)
        assert 0 < pool.idle_bytes <= 1 << 20 and pool.check() == []


@given(st.integers(1, 1 << 40))
def test_wastes_at_most_a_sixteenth(nbytes: int) -> None:
    assert nbytes <= rounded(nbytes) <= nbytes + nbytes // 16 + 1
    assert rounded(rounded(nbytes)) == rounded(nbytes)


def test_copies_chunks() -> None:
    blob = make_blob(3, numbers=20_000)
    lent = EncodedChunk(blob.codec, blob.tensors, blob.meta, blob.layered, leased=True)
    copy = BufferPool().copy(lent)
    assert same_blob(copy, blob) and not copy.leased
    for name, tensor in blob.tensors.items():
        assert copy.tensors[name].data_ptr() != tensor.data_ptr() and copy.tensors[name].data_ptr() % 64 == 0
    assert max(tensor.nbytes for tensor in blob.tensors.values()) > 1 << 15  # both ways of copying


@pytest.mark.parametrize("nbytes", [0, 1, 100, 1 << 15])
def test_any_size(nbytes: int) -> None:
    assert BufferPool().empty(nbytes).shape == (nbytes,)


def test_threads_never_share_memory() -> None:
    pool, wrong = BufferPool(), []

    def use(number: int) -> None:
        for turn in range(200):
            data = pool.empty(40_000 + number)
            value = (number * 7 + turn) % 251
            data.fill_(value)
            if not bool((data == value).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
