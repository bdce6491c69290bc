"""Scikit-learn's 1,797 handwritten digits (8x8, ten classes), split by image, and how a user sees them.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998. The split needs no random numbers:
within a class, images are ordered by the SHA-256 of their pixels. So it is the same for every seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from federation.errors import PopulationError

CLASSES = 10
PER_CLASS = 52
"""Images of each class for training users, and as many others for new users: 29% of all, each."""
PATCHES = 16
"""Patches of 2x2 pixels, in 4 rows of 4: what the base takes as tokens."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DigitImages:
    """Pixels are ink, from 0 (none) to 1.

    pretraining (P, 8, 8), pretraining_classes (P,): all images that no user owns.
    pools (2, CLASSES, PER_CLASS, 8, 8): the images of training users, and those of new users.
    fingerprint: of all images and classes.
    """

    pretraining: Tensor
    pretraining_classes: Tensor
    pools: Tensor
    fingerprint: str


@lru_cache(maxsize=1)
def digit_images() -> DigitImages:
    """The images, split. Raises PopulationError when scikit-learn, which carries them, is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PopulationError(
            "the population 'digits' takes its images from scikit-learn, which is not installed; "
            "pip install 'fedquilt[digits]'"
        ) from error
    raw, class_n = load_digits(return_X_y=True)
    pixels_n = raw.astype(np.uint8)
    fingerprint = hashlib.sha256(pixels_n.tobytes() + class_n.astype(np.uint8).tobytes()).hexdigest()
    hashes = np.array([hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in pixels_n])
    by_class = [
        index_n[np.argsort(hashes[index_n])] for c in range(CLASSES) for index_n in [np.flatnonzero(class_n == c)]
    ]
    users = np.stack([index_n[: 2 * PER_CLASS] for index_n in by_class]).reshape(CLASSES, 2, PER_CLASS)
    others = np.concatenate([index_n[2 * PER_CLASS :] for index_n in by_class])
    ink = torch.from_numpy(pixels_n).view(-1, 8, 8).float() / 16
    return DigitImages(ink[others], torch.from_numpy(class_n[others]), ink[users.swapaxes(0, 1)], fingerprint)


@dataclass(frozen=True)
class Condition:
    """How U users see digits.

    degree_u: by how much images are turned, against the clock.
    patch_up (U, PATCHES): which patch of the turned image is shown at each place.
    slope_u, offset_u: pixels are slope * x + offset, with x from -1 (no ink) to 1; a negative slope inverts.
    name_uc (U, CLASSES): what the user calls each class.
    """

    degree_u: Tensor
    patch_up: Tensor
    slope_u: Tensor
    offset_u: Tensor
    name_uc: Tensor

    def inputs(self, ink: Tensor) -> Tensor:
        """What the base sees of images (U, N, 8, 8) of ink: (U, N, 1, 8, 8)."""
        seen = as_pixels(moved_patches(turned(ink, self.degree_u), self.patch_up))
        slope, offset = (t[:, None, None, None, None] for t in (self.slope_u, self.offset_u))
        return seen * slope + offset

    def targets(self, class_un: Tensor) -> Tensor:
        """The user's names of classes: (U, N) int64."""
        return self.name_uc.gather(1, class_un)


def as_pixels(ink: Tensor) -> Tensor:
    """Ink (.., 8, 8) in 0..1 as images of one channel (.., 1, 8, 8), in -1..1."""
    return (2.0 * ink - 1.0).unsqueeze(-3)


def turned(images: Tensor, degree_u: Tensor) -> Tensor:
    """Each user's images (U, N, 8, 8) turned about their centre, against the clock; bilinear, 0 around the image."""
    users, count = images.shape[:2]
    if not degree_u.any():
        return images
    radian_u = torch.deg2rad(degree_u)
    cos, sin, zero = radian_u.cos(), radian_u.sin(), torch.zeros_like(radian_u)
    theta = torch.stack((cos, -sin, zero, sin, cos, zero), 1).view(users, 2, 3)
    grid = F.affine_grid(theta, [users, count, 8, 8], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def moved_patches(images: Tensor, patch_up: Tensor) -> Tensor:
    """Images (U, N, 8, 8) with patch patch_up[u, p] at place p; patches are counted row by row."""
    users, count = images.shape[:2]
    patches = images.view(users, count, 4, 2, 4, 2).transpose(3, 4).reshape(users, count, PATCHES, 4)
    moved = patches.gather(2, patch_up[:, None, :, None].expand(-1, count, -1, 4))
    return moved.view(users, count, 4, 4, 2, 2).transpose(3, 4).reshape(users, count, 8, 8)


def cycles(chosen_uk: Indices, count: int) -> Indices:
    """The permutation of 0..count - 1 of each user in which each chosen one is followed by the next, (U, count).

    Two chosen ones or more all move, and nothing else does.
    """
    permutation_un = np.tile(np.arange(count), (len(chosen_uk), 1))
    np.put_along_axis(permutation_un, chosen_uk, np.roll(chosen_uk, -1, axis=1), axis=1)
    return permutation_un
