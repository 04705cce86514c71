"""Shuffling and resuming of the loader."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sanawm_jax.data.loader import Loader
from sanawm_jax.runtime.errors import InputError


def test_every_epoch_is_another_whole_shuffle():
    loader = Loader(range(12), 4, seed=0)
    first, second = loader.next(3), loader.next(3)
    assert first.shape == (3, 4)
    for epoch in (first, second):
        assert sorted(epoch.ravel()) == list(range(12))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(Loader(range(12), 4, seed=0).next(3), first)
    assert not np.array_equal(Loader(range(12), 4, seed=1).next(3), first)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resumes_where_it_was(num_threads):
    loader = Loader(range(10), 3, seed=5, num_threads=num_threads)
    loader.next(4)
    state = json.loads(json.dumps(loader.state()))
    expected = loader.next(5)
    other = Loader(range(10), 3, seed=5)
    other.restore(state)
    np.testing.assert_array_equal(other.next(5), expected)


def test_empty():
    with pytest.raises(InputError, match="no clips"):
        Loader(range(0), 3, seed=0)


def test_batches_of_one():
    """A batch size of one is the published one of a pair of devices."""
    batches = Loader(range(5), 1, seed=0).next(10)
    assert sorted(batches[:5].ravel()) == sorted(batches[5:].ravel()) == list(range(5))
    assert not np.array_equal(batches[:5], batches[5:])
