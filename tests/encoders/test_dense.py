"""Dense features: where positions of feature maps look, and that tiles leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.filters import gaussian

from histoniche.encoders import Encoder, _dense, load_encoder
from histoniche.encoders._dense import dense_block_width, dense_dim, dense_geometry, embed_tiles, sample_map
from histoniche.encoders._tiles import Slide


@pytest.fixture(scope="module")
def cnn() -> Encoder:
    return load_encoder("efficientnet-lite0")


def _tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    smooth = np.stack([gaussian(channel, 3) for channel in noise])
    return np.clip(170 + 250 * smooth, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("stride", "shift"), [(8.0, 3.5), (16.0, -7.5), (14.0, 0.0), (32.0, 15.5)])
def test_a_ramp_map_gives_exact_coordinates(stride: float, shift: float) -> None:
    h, w = 9, 13
    x = (torch.arange(w) + 0.5) * stride + shift
    y = (torch.arange(h) + 0.5) * stride + shift
    ramp = torch.stack([x.expand(h, w), y[:, None].expand(h, w)])[None]
    low = np.array([x[0], y[0]])
    points = low + np.random.default_rng(0).random((50, 2)) * (np.array([x[-1], y[-1]]) - low)
    points[:2] = [low, [x[-1], y[-1]]]
    got = sample_map(ramp, stride, shift, points)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), points, atol=1e-3)
    # Beyond the outermost positions the map goes on as it is there.
    np.testing.assert_allclose(sample_map(ramp, stride, shift, low[None] - 50).numpy(), low[None], atol=1e-3)


def _looks_at(encoder: Encoder, level: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For some positions of a map: the (x, y) it is said to stand for, and the centroid of |gradient| of the input."""
    image = torch.from_numpy(_tissue(size, size, seed=5)).float()[None]
    said, seen = [], []
    rng = np.random.default_rng(0)
    with torch.enable_grad():
        rgb = image.clone().requires_grad_()
        features, stride, shift = encoder.maps(rgb)[level]
        assert features.shape[2:] == (size // stride, size // stride)
        centre = features.shape[2] // 2
        for i, j in rng.integers(centre - 3, centre + 3, (6, 2)):
            total = torch.zeros(size, size)
            for channel in rng.choice(features.shape[1], 10, replace=False):
                (grad,) = torch.autograd.grad(features[0, channel, i, j], rgb, retain_graph=True)
                total += grad[0].abs().sum(dim=0)
            weight = (total / total.sum()).numpy()
            middle = np.arange(size) + 0.5
            seen.append([weight.sum(axis=0) @ middle, weight.sum(axis=1) @ middle])
            said.append([(j + 0.5) * stride + shift, (i + 0.5) * stride + shift])
    return np.array(said), np.array(seen)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("efficientnet-lite0", 3.5), ("timm/resnet18", -3.5), ("timm/test_convnext", 0.0)],
)
def test_positions_look_where_they_are_said_to(name: str, expected: float) -> None:
    """Of TensorFlow's "same" padding, torch's padding, and patches that do not overlap."""
    encoder = load_encoder(name, pretrained=name == "efficientnet-lite0")
    with torch.inference_mode():
        maps = encoder.maps(torch.zeros(1, 3, 224, 224))
    assert (maps[0][1], maps[0][2]) == (8.0, expected)
    said, seen = _looks_at(encoder, 0, 224)
    error = (seen - said).mean(axis=0)
    assert (np.abs(error) < 8 / 3).all(), error
    # The opposite convention would be worse.
    if expected:
        assert (np.abs(error) < np.abs(error + 2 * expected)).all(), error


def test_shifts_grow_with_the_stride(cnn: Encoder) -> None:
    with torch.inference_mode():
        maps = cnn.maps(torch.zeros(2, 3, 224, 224))
    assert [(stride, shift) for _, stride, shift in maps] == [(8.0, 3.5), (16.0, 7.5), (32.0, 15.5)]
    assert [tuple(m.shape) for m, _, _ in maps] == [(2, 40, 28, 28), (2, 112, 14, 14), (2, 320, 7, 7)]
    assert dense_dim(cnn) == 40 + 112 + 320


def test_patch_tokens_of_a_vit() -> None:
    vit = load_encoder("timm/test_vit", pretrained=False)
    assert dense_geometry(vit) == (160, 20)
    assert dense_block_width(vit) % (160 - 2 * 20) == 0
    rgb = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        ((tokens, stride, shift),) = vit.maps(rgb)
        reference = vit.module.forward_features(vit.normalise(rgb))[:, vit.module.num_prefix_tokens :]
    assert (stride, shift) == (16.0, 0.0)
    torch.testing.assert_close(tokens, reference.transpose(1, 2).reshape(1, -1, 10, 10), atol=1e-4, rtol=1e-4)
    # The middle of a patch reads its token.
    token = sample_map(tokens, stride, shift, np.array([[3.5 * 16, 7.5 * 16]]))
    torch.testing.assert_close(token[0], tokens[0, :, 7, 3], atol=1e-5, rtol=1e-5)


def _embed(image: np.ndarray, points: np.ndarray, encoder: Encoder, batch_size: int = 4) -> np.ndarray:
    region = Slide((image,), 1.0).region(np.array([-200, -200]), np.array(image.shape[:0:-1]) + 200)
    with torch.inference_mode():
        return embed_tiles(region, points, encoder, batch_size)


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference in units of the features' spread over cells."""
    return float(np.sqrt(((a - b) ** 2).mean() / b.var(axis=0).mean()))


def test_features_do_not_depend_on_the_layout_of_tiles(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _tissue(640, 640)
    points = np.random.default_rng(1).uniform(100, 540, (150, 2))
    monkeypatch.setattr(_dense, "_CNN_TILE", 1152)
    whole = _embed(image, points, cnn)
    assert whole.shape == (150, 472)
    monkeypatch.setattr(_dense, "_CNN_TILE", 384)
    tiled = _embed(image, points, cnn)
    assert _error(tiled, whole) < 0.1
    # Were the cells read a stride-8 pixel aside, that would show.
    aside = _embed(image, points + 8, cnn)
    assert _error(aside, whole) > 3 * _error(tiled, whole)
    np.testing.assert_allclose(_embed(image, points, cnn, batch_size=1), tiled, atol=2e-4, rtol=1e-3)


def test_features_move_with_the_image(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_CNN_TILE", 384)
    image = _tissue(480, 480, seed=2)
    points = np.random.default_rng(2).uniform(100, 380, (100, 2))
    still = _embed(image, points, cnn)
    by = 96  # whole positions of every map, another place in the grid of tiles
    moved = np.full((3, 480 + by, 480 + by), 255, dtype=np.uint8)
    moved[:, by:, by:] = image
    assert _error(_embed(moved, points + by, cnn), still) < 0.1


def test_order_of_cells_only_orders_rows(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_CNN_TILE", 256)
    image = _tissue(300, 300)
    points = np.random.default_rng(3).uniform(0, 300, (40, 2))
    order = np.random.default_rng(4).permutation(40)
    np.testing.assert_array_equal(_embed(image, points[order], cnn), _embed(image, points, cnn)[order])
