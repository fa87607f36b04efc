"""Generators seeded by what the number is for."""

from __future__ import annotations

import itertools

import torch

from limner import seeds


def test_known_seed() -> None:
    """SHA-256 of "int:0", unit separator, "str:pool": `printf 'int:0\\037str:pool' | sha256sum` begins 16 hex digits, halved."""
    import hashlib

    wanted = int(hashlib.sha256(b"int:0\x1fstr:pool").hexdigest()[:16], 16) // 2
    assert seeds.seed_of(0, "pool") == wanted < 2**63


def test_keys_that_look_alike_differ() -> None:
    """A number and its text, parts joined otherwise, and the order of parts are different keys."""
    keys = [(1, 2), (2, 1), ("1", 2), (1, "2"), (12,), ("12",), ("1", "2"), (1, 2, ""), ("a", "b"), ("ab",), ("a", "b", 0)]
    assert len({seeds.seed_of(*k) for k in keys}) == len(keys)


def test_a_row_of_noise_comes_from_its_key_alone() -> None:
    keys = [(0, "pool", "p", k) for k in range(4)]
    together = seeds.noise((4, 8, 8), keys)
    for order in itertools.islice(itertools.permutations(range(4)), 5):
        assert torch.equal(seeds.noise((4, 8, 8), [keys[i] for i in order]), together[list(order)])


def test_noise_is_standard_normal_and_untouched_by_the_global_state() -> None:
    """4·64·64·4 = 65536 draws: the mean's deviation is 1/256, the variance's sqrt(2)/256; five of them are allowed."""
    torch.manual_seed(1)
    a = seeds.noise((4, 64, 64), [(7, k) for k in range(4)])
    torch.manual_seed(2)
    assert torch.equal(a, seeds.noise((4, 64, 64), [(7, k) for k in range(4)]))
    assert abs(a.mean()) < 5 / 256
    assert abs(a.var() - 1) < 5 * 2**0.5 / 256
    flat = a.flatten(1)
    assert abs(torch.corrcoef(flat) - torch.eye(4)).max() < 5 / 128, "rows are independent"
