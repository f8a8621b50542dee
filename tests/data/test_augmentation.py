"""Random flips and crops."""

import torch

from ffw_fast.data.augmentation import crop_at_random, flip_at_random


def images(count: int) -> torch.Tensor:
    return torch.randint(1, 256, (count, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_about_half_are_mirrored_and_the_others_stay():
    given = images(200)
    flipped = flip_at_random(given, torch.Generator().manual_seed(0))
    kinds = [
        (torch.equal(image, before), torch.equal(image, before.flip(-1)))
        for image, before in zip(flipped, given, strict=True)
    ]
    assert all(same != mirrored for same, mirrored in kinds)
    assert 70 < sum(mirrored for _, mirrored in kinds) < 130


def test_crops_are_windows_of_the_padded_image_at_every_place():
    given, places = images(300), set()
    cropped = crop_at_random(given, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(given, [2] * 4)
    for image, around in zip(cropped, padded, strict=True):
        found = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, around[:, down : down + 6, right : right + 7])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) == 25


def test_generators_alone_decide():
    given, state = images(20), torch.get_rng_state()
    for augment in (flip_at_random, lambda x, source: crop_at_random(x, 2, source)):
        first, again, other = (augment(given, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
