"""Philox against the published vectors, and what the numbers must be like."""

import pytest
import torch

from ffw_fast import philox

KNOWN_ANSWERS = [  # block, draw, seed (64 bits each), words: the vectors of the authors' own distribution (Random123)
    (0x0, 0x0, 0x0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (2**64 - 1, 2**64 - 1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def as_int64(word: int) -> torch.Tensor:
    """The 64-bit word as PyTorch holds it."""
    return torch.tensor(word - 2**64 if word >= 2**63 else word)


@pytest.mark.parametrize(("block", "draw", "seed", "words"), KNOWN_ANSWERS)
def test_known_answers(block, draw, seed, words):
    result = philox.philox4x32(as_int64(block).view(1), as_int64(draw), as_int64(seed))
    assert " ".join(f"{word:08x}" for word in result.flatten().tolist()) == words


def test_numbers_are_odd_multiples_inside_the_interval():
    numbers = philox.uniform(100_003, philox.make_draw(3, 5))
    multiples = numbers.double() * 2**24
    assert numbers.dtype == torch.float32
    assert len(numbers) == 100_003
    assert (multiples % 2 == 1).all()
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 5e-3
    assert abs(numbers.std().item() - 12**-0.5) < 5e-3


def test_a_number_depends_on_its_element_alone():
    whole = philox.uniform(1000, philox.make_draw(1, 2))
    for start in (0, 4, 16, 996):
        part = philox.uniform(1000 - start, philox.make_draw(1, 2, first_element=start))
        assert torch.equal(part, whole[start:])
    assert torch.equal(philox.uniform(7, philox.make_draw(1, 2)), whole[:7])


def test_seeds_and_draws_differ():
    first = philox.uniform(1000, philox.make_draw(1, 2))
    for other in (philox.make_draw(2, 2), philox.make_draw(1, 3), philox.make_draw(1 << 32, 2)):
        assert (philox.uniform(1000, other) == first).float().mean() < 0.01


def test_first_element_must_start_a_block():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        philox.make_draw(0, 0, first_element=6)
