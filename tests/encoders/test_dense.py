"""Dense features: where positions of feature maps look, and that tiles leave no trace."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.mark.parametrize("stride", [8.0, 16.0, 14.0, 32.0])
def test_a_ramp_map_gives_exact_coordinates(stride: float) -> None:
    h, w = 9, 13
    x = (torch.arange(w) + 0.5) * stride
    y = (torch.arange(h) + 0.5) * stride
    ramp = torch.stack([x.expand(h, w), y[:, None].expand(h, w)])[None]
    low = np.array([x[0], y[0]])
    points = low + np.random.default_rng(0).random((50, 2)) * (np.array([x[-1], y[-1]]) - low)
    points[:2] = [low, [x[-1], y[-1]]]
    got = sample_map(ramp, stride, points)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), points, atol=1e-3)
    # Beyond the outermost positions the map goes on as it is there.
    np.testing.assert_allclose(sample_map(ramp, stride, low[None] - 50).numpy(), low[None], atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_positions_look_at_their_middle(cnn: Encoder, axis: int) -> None:
    """A trained network sees the same in a mirrored image, at the mirrored place: not half a stride aside."""
    size = 512
    image = torch.from_numpy(_tissue(size, size, seed=5)).float()[None]
    points = np.random.default_rng(0).uniform(150, size - 150, (300, 2))
    mirrored = points.copy()
    mirrored[:, axis] = size - points[:, axis]
    with torch.inference_mode():
        pairs = zip(cnn.maps(image), cnn.maps(image.flip(3 - axis)), strict=True)
        for (here, stride), (there, _) in pairs:

            def agreement(
                aside: float, here: torch.Tensor = here, there: torch.Tensor = there, s: float = stride
            ) -> float:
                a, b = sample_map(here, s, points - aside).numpy(), sample_map(there, s, mirrored - aside).numpy()
                return 1 - ((a - b) ** 2).sum() / (2 * ((a - a.mean(axis=0)) ** 2).sum())

            assert agreement(0) > max(agreement((stride - 1) / 2), agreement(-(stride - 1) / 2)), stride


@pytest.mark.parametrize("level", [0, 1])
def test_gradients_of_the_trained_network_centre_on_the_middle(cnn: Encoder, level: int) -> None:
    """The geometry of "same" padding alone would put them (stride - 1) / 2 aside; training undoes that."""
    size, rng = 224, np.random.default_rng(0)
    rgb = torch.from_numpy(_tissue(size, size, seed=5)).float()[None].requires_grad_()
    features, stride = cnn.maps(rgb)[level]
    centre, middle, errors = features.shape[2] // 2, np.arange(size) + 0.5, []
    for i, j in rng.integers(centre - 2, centre + 2, (6, 2)):
        total = torch.zeros(size, size)
        for channel in rng.choice(features.shape[1], 10, replace=False):
            (grad,) = torch.autograd.grad(features[0, channel, i, j], rgb, retain_graph=True)
            total += grad[0].abs().sum(dim=0)
        weight = (total / total.sum()).numpy()
        errors.append(
            [weight.sum(axis=0) @ middle - (j + 0.5) * stride, weight.sum(axis=1) @ middle - (i + 0.5) * stride]
        )
    assert (np.abs(np.mean(errors, axis=0)) < stride / 3).all(), errors


def test_maps_of_the_embedded_encoder(cnn: Encoder) -> None:
    with torch.inference_mode():
        maps = cnn.maps(torch.zeros(2, 3, 224, 224))
    assert [stride for _, stride in maps] == [8.0, 16.0]
    assert [tuple(m.shape) for m, _ in maps] == [(2, 40, 28, 28), (2, 112, 14, 14)]
    assert dense_dim(cnn) == 40 + 112


@pytest.mark.parametrize("model", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_other_networks_of_timm_give_both_kinds_of_features(model: str) -> None:
    encoder = load_encoder(f"timm/{model}", pretrained=False)
    assert not encoder.is_vit
    assert encoder.spec.dense_strides == (8, 16, 32)
    assert encoder.fixed_size == model.startswith("swin")
    with torch.inference_mode():
        maps = encoder.maps(torch.zeros(1, 3, 224, 224))
        assert encoder.pooled(torch.zeros(2, 3, 224, 224)).shape == (2, encoder.spec.dim)
    assert [(m.shape[2], stride) for m, stride in maps] == [(28, 8.0), (14, 16.0), (7, 32.0)]


@pytest.mark.parametrize("scale", [1.0, 0.85, 0.5, 1.3])
@pytest.mark.usefixtures("small_tiles")
def test_a_ramp_is_read_exactly_through_tiles(ramp: np.ndarray, means: Callable[..., Encoder], scale: float) -> None:
    points = np.random.default_rng(0).uniform((30, 30), (210, 150), (200, 2))
    scaled = points * scale
    region = Slide((ramp,), scale).region(scaled.min(axis=0) - 100, scaled.max(axis=0) + 100)
    with torch.inference_mode():
        found = embed_tiles(region, scaled, means(4, 8), 3)
    assert found.shape == (200, 6)
    for features in (found[:, :3], found[:, 3:]):
        np.testing.assert_allclose(features[:, :2], points - 0.5, atol=2e-3)
        np.testing.assert_allclose(features[:, 2], 7, atol=1e-3)


@pytest.mark.usefixtures("small_tiles")
def test_a_ramp_is_read_exactly_up_to_the_edge_of_the_image(ramp: np.ndarray, means: Callable[..., Encoder]) -> None:
    points = np.array([(x, y) for x in (0.5, 1.0, 120.3, 239.5) for y in (0.5, 66.6, 179.5)])
    region = Slide((ramp,), 1.0).region(np.full(2, -100.0), np.array([340.0, 280.0]))
    with torch.inference_mode():
        np.testing.assert_allclose(embed_tiles(region, points, means(1), 8)[:, :2], points - 0.5, atol=2e-3)


def test_the_margin_hides_where_a_tile_ends(cnn: Encoder) -> None:
    """A cell at the seam of two tiles has the same features in both, in the maps of all strides."""
    region = Slide((_tissue(1024, 1024),), 1.0).region(np.zeros(2), np.full(2, 1024.0))
    size, margin = 640, dense_geometry(cnn)[1]
    points = np.random.default_rng(3).uniform(480, 544, (60, 2))
    middle, seam = np.array([192.0, 192.0]), np.array([480.0 - margin, 192.0])
    with torch.inference_mode():
        maps = [cnn.maps(region.windows(corner[None], size)) for corner in (middle, seam)]
    for (whole, stride), (cut, _) in zip(*maps, strict=True):
        a, b = (sample_map(m, stride, points - c).numpy() for m, c in ((whole, middle), (cut, seam)))
        explained = 1 - ((a - b) ** 2).sum() / ((a - a.mean(axis=0)) ** 2).sum()
        assert explained > 0.999999, (stride, explained)


def test_a_cell_has_the_same_features_whichever_others_there_are(cnn: Encoder) -> None:
    image = _tissue(640, 640)
    points = np.random.default_rng(5).uniform(100, 540, (50, 2))
    near = points[np.linalg.norm(points - points[0], axis=1) < 120]
    assert (
        _error(_embed(image, near, cnn), _embed(image, points, cnn)[np.linalg.norm(points - points[0], axis=1) < 120])
        < 1e-3
    )


def test_tiles_fit_their_cells_where_the_margin_covers_what_is_seen(
    cnn: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    maps = cnn.maps
    monkeypatch.setattr(Encoder, "maps", lambda _, rgb: sizes.append(tuple(rgb.shape[2:])) or maps(rgb))
    _embed(_tissue(300, 300), np.array([[100.0, 50.0], [200.0, 60.0]]), cnn)
    ((height, width),) = sizes
    assert (height % 16, width % 16) == (0, 0)
    assert 10 + 2 * 176 <= height < 10 + 2 * 176 + 32
    assert 100 + 2 * 176 <= width < 100 + 2 * 176 + 32


def test_coarse_maps_keep_whole_tiles_and_a_wider_margin(means: Callable[..., Encoder]) -> None:
    assert dense_geometry(means(8, 16, 32)) == (1536, 256)
    assert dense_geometry(means(8, 16)) == (1536, 176)


def test_patch_tokens_of_a_vit() -> None:
    vit = load_encoder("timm/test_vit", pretrained=False)
    assert dense_geometry(vit) == (160, 20)
    assert dense_block_width(vit) % (160 - 2 * 20) == 0
    rgb = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        ((tokens, stride),) = vit.maps(rgb)
        reference = vit.module.forward_features(vit.normalise(rgb))[:, vit.module.num_prefix_tokens :]
    assert stride == 16.0
    torch.testing.assert_close(tokens, reference.transpose(1, 2).reshape(1, -1, 10, 10), atol=1e-4, rtol=1e-4)
    # The middle of a patch reads its token.
    token = sample_map(tokens, stride, np.array([[3.5 * 16, 7.5 * 16]]))
    torch.testing.assert_close(token[0], tokens[0, :, 7, 3], atol=1e-5, rtol=1e-5)


def _embed(image: np.ndarray, points: np.ndarray, encoder: Encoder, batch_size: int = 4) -> np.ndarray:
    region = Slide((image,), 1.0).region(np.full(2, -800), np.array(image.shape[:0:-1]) + 800)
    with torch.inference_mode():
        return embed_tiles(region, points, encoder, batch_size)


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference in units of the features' spread over cells."""
    return float(np.sqrt(((a - b) ** 2).mean() / b.var(axis=0).mean()))


def test_features_do_not_depend_on_the_layout_of_tiles(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    image = _tissue(640, 640)
    points = np.random.default_rng(1).uniform(100, 440, (150, 2))
    monkeypatch.setattr(_dense, "_CNN_TILE", 1216)
    whole = _embed(image, points, cnn)
    assert whole.shape == (150, 152)
    monkeypatch.setattr(_dense, "_CNN_TILE", 768)
    tiled = _embed(image, points, cnn)
    assert _error(tiled, whole) < 1e-3  # the margin covers all that strides 8 and 16 see
    # Were the cells read a stride-8 pixel aside, that would show.
    aside = _embed(image, points + 8, cnn)
    assert _error(aside, whole) > 3 * _error(tiled, whole)
    np.testing.assert_allclose(_embed(image, points, cnn, batch_size=1), tiled, atol=2e-4, rtol=1e-3)


def test_features_move_with_the_image(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_CNN_TILE", 768)
    image = _tissue(480, 480, seed=2)
    points = np.random.default_rng(2).uniform(100, 380, (100, 2))
    still = _embed(image, points, cnn)
    by = 96  # whole positions of every map, another place in the grid of tiles
    moved = np.full((3, 480 + by, 480 + by), 255, dtype=np.uint8)
    moved[:, by:, by:] = image
    assert _error(_embed(moved, points + by, cnn), still) < 1e-3


def test_order_of_cells_only_orders_rows(cnn: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dense, "_CNN_TILE", 768)
    image = _tissue(300, 300)
    points = np.random.default_rng(3).uniform(0, 300, (40, 2))
    order = np.random.default_rng(4).permutation(40)
    np.testing.assert_array_equal(_embed(image, points[order], cnn), _embed(image, points, cnn)[order])
