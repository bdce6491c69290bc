"""The digits' images: splits by content, and what conditions do against torch's own operations and loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from federation.streams import Streams
from simulations.populations.digits_images import (
    CLASSES,
    PER_CLASS,
    Condition,
    cycles,
    digit_images,
    moved_patches,
    turned,
)

pytest.importorskip("sklearn")


def contents(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.reshape(-1, 64)}


def test_splits_share_no_image_and_leave_none_out() -> None:
    images = digit_images()
    pretraining, train, new = (contents(part) for part in (images.pretraining, images.pools[0], images.pools[1]))
    assert (len(pretraining), len(train), len(new)) == (757, CLASSES * PER_CLASS, CLASSES * PER_CLASS)
    assert len(pretraining | train | new) == 1797


@pytest.mark.parametrize("quarters", [-1, 0, 1, 2])
def test_a_quarter_turn_is_torchs(quarters: int) -> None:
    images = digit_images().pretraining[:6].view(2, 3, 8, 8)
    degree_u = torch.tensor([90.0 * quarters, 0.0])
    found = turned(images, degree_u)
    torch.testing.assert_close(found[0], torch.rot90(images[0], quarters, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], images[1], atol=1e-5, rtol=0)


def test_a_turn_mixes_the_four_nearest_pixels() -> None:
    """Bilinear by hand: where pixel (row, column) of the turned image was before."""
    image, degree = digit_images().pretraining[0], 33.0
    padded = torch.nn.functional.pad(image, (9,) * 4)
    cos, sin = np.cos(np.deg2rad(degree)), np.sin(np.deg2rad(degree))
    expected = torch.empty(8, 8)
    for row, column in itertools.product(range(8), range(8)):
        down, right = row - 3.5, column - 3.5
        y, x = 3.5 + cos * down + sin * right, 3.5 - sin * down + cos * right
        top, left = int(np.floor(y)), int(np.floor(x))
        near = padded[top + 9 : top + 11, left + 9 : left + 11]
        share_y, share_x = torch.tensor([1 - (y - top), y - top]), torch.tensor([1 - (x - left), x - left])
        expected[row, column] = (near * torch.outer(share_y, share_x)).sum()
    found = turned(image.view(1, 1, 8, 8), torch.tensor([degree]))
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=0)


def test_patches_move_as_a_loop_moves_them() -> None:
    images = torch.rand(2, 3, 8, 8)
    patch_up = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(u)) for u in range(2)])
    found = moved_patches(images, patch_up)
    for u, place in itertools.product(range(2), range(16)):
        (row, column), (from_row, from_column) = divmod(place, 4), divmod(int(patch_up[u, place]), 4)
        for down, right in itertools.product(range(2), range(2)):
            to = found[u, :, 2 * row + down, 2 * column + right]
            assert to.equal(images[u, :, 2 * from_row + down, 2 * from_column + right])


@pytest.mark.parametrize("moving", [0, 2, 5, 10])
def test_a_cycle_moves_the_chosen_ones_and_is_one_cycle(moving: int) -> None:
    chosen = Streams(3).distinct("chosen", np.arange(50), 10, moving)
    for permutation, own in zip(cycles(chosen, 10), chosen):
        assert sorted(permutation) == list(range(10))
        assert set(np.flatnonzero(permutation != np.arange(10))) == set(own)
        walk = [own[0]] if moving else []
        while len(walk) < moving:
            walk.append(permutation[walk[-1]])
        assert set(walk) == set(own)


def test_contrast_is_affine_in_the_pixels() -> None:
    one = torch.ones(1)
    seen = Condition(0 * one, torch.arange(16)[None], -0.5 * one, 0.25 * one, torch.arange(10)[None])
    pixels = seen.inputs(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))[0, :, 0, 0, 0]
    torch.testing.assert_close(pixels, torch.tensor([0.75, 0.25, -0.25]))
