"""How tokens and their times are cut, and what is refused; exchanges: test_parallelize.py."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.two_processes import CONFIG

from turbodit.distributed.context_parallel import _Split, split_tokens
from turbodit.model.wan import WanModel


class Group:
    """A process's view of its group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("length", "count", "n"), [(12, 2, 1), (12, 2, 12), (12, 2, 3), (24, 4, 3), (60, 4, 5)]
)
def test_every_token_keeps_its_time(length, count, n):
    time = torch.arange(2 * n).view(2, n, 1).expand(-1, -1, 6)
    per_token = time.repeat_interleave(length // n, dim=1)
    shares = []
    for rank in range(count):
        x = torch.zeros(2, length // count, 1)
        _, own, (cos, _) = _Split(Group(rank, count)).block(
            None, (x, time, (torch.arange(length)[:, None],) * 2)
        )
        assert len(cos) == length // count
        shares.append(own.repeat_interleave(length // count // own.shape[1], dim=1))
    assert torch.equal(torch.cat(shares, dim=1), per_token)


def test_cuts_are_no_finer_than_they_must_be():
    """The TI2V-5B's 31 frames of 880 tokens over 8: 3,410 tokens in runs of 110."""
    own = _Split(Group(3, 8))._times(torch.zeros(1, 31, 6, 1), 3410)
    assert own.shape[1] == 31


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"4 attention heads .* 3 context .*supported: 1, 2, 4"):
        split_tokens(WanModel(CONFIG), Group(0, 3))


def test_tokens_that_do_not_divide():
    with pytest.raises(ValueError, match=r"15 tokens do not divide over 2.*a multiple of 2"):
        _Split(Group(0, 2)).first_block(None, (torch.zeros(1, 15, 4), None, None))
