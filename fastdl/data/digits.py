"""The UCI digits: 1,797 images of 8 x 8 pixels, shipped with the package (origin and licence: DIGITS.md)."""

from __future__ import annotations

import pathlib

import numpy as np


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the digits.

    Returns
    -------
    X : (1797, 64) float32, grey values from 0 to 1
    y : (1797,) int64, the digits 0 to 9
    """
    with np.load(pathlib.Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(16), labels.astype(np.int64)
