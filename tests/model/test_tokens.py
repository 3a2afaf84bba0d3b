"""Latents to tokens and back."""

import pytest
import torch

from fluid_core.model.tokens import check_finite, denormalise, normalise, patchify, unpatchify


def test_channels_are_c_major_and_tokens_row_major() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 6, 12)
    for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        for k, (c, p, q) in enumerate((c, p, q) for c in range(3) for p in range(2) for q in range(2)):
            assert tokens[1, n, k] == latents[1, c, 2 * row + p, 2 * column + q]


def test_unpatchify_is_the_inverse() -> None:
    latents = torch.randn(2, 4, 8, 4)
    assert torch.equal(unpatchify(patchify(latents, 2), 2, (4, 2)), latents)


def test_normalise_is_per_channel_and_inverted() -> None:
    latents = torch.randn(16, 2, 8, 8) * torch.tensor([2.0, 0.5])[:, None, None] + torch.tensor([3.0, -1.0])[:, None, None]
    normal = normalise(latents, [3.0, -1.0], [2.0, 0.5])
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(2), atol=0.1)
    assert torch.allclose(normal.std((0, 2, 3)), torch.ones(2), atol=0.1)
    assert torch.allclose(denormalise(normal, [3.0, -1.0], [2.0, 0.5]), latents, atol=1e-5)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="5x4 is not a multiple of patch 2"):
        patchify(torch.zeros(1, 4, 5, 4), 2)
    with pytest.raises(ValueError, match="4x4 is not a multiple of patch 0"):
        patchify(torch.zeros(1, 4, 4, 4), 0)
    with pytest.raises(ValueError, match="batch, channels, height, width"):
        patchify(torch.zeros(4, 4, 4), 2)
    with pytest.raises(ValueError, match="do not fill a 3x3 grid"):
        unpatchify(torch.zeros(1, 8, 16), 2, (3, 3))
    with pytest.raises(ValueError, match=r"tokens must be \(batch, tokens, channels\), got shape \(9, 16\)"):
        unpatchify(torch.zeros(9, 16), 2, (3, 3))
    with pytest.raises(ValueError, match="one value for each of 4 channels"):
        normalise(torch.zeros(1, 4, 2, 2), [0.0], [1.0])


def test_broken_samples_are_named_by_key() -> None:
    tokens, text = torch.randn(3, 16, 16), torch.randn(3, 5, 8)
    check_finite(["a", "b", "c"], tokens, text)
    check_finite(["a", "b", "c"], torch.zeros(3, 16, dtype=torch.int64), text)
    tokens[1, 4, 2], text[2, 0, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinite latents in 1 sample\(s\): 'b'"):
        check_finite(["a", "b", "c"], tokens, text)
    with pytest.raises(ValueError, match=r"NaN or infinite text embeddings in 1 sample\(s\): 'c'"):
        check_finite(["a", "b", "c"], torch.zeros(3, 16, dtype=torch.int64), text)
