"""ONNX files that give the student's maps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from histoniche.seg import Segmenter, SegmenterConfig, export_onnx
from histoniche.seg import _onnx as module

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def student(encoder: str = "mobilenetv3_small_050") -> Segmenter:
    teacher = {"name": "SAM", "licence": "Apache-2.0"}
    config = SegmenterConfig(encoder, ["DAPI"], 0.25, decoder_channels=[8] * 5, teacher=teacher, min_area=20)
    return Segmenter(config, pretrained=False)


@pytest.mark.parametrize("encoder", ["mobilenetv3_small_050", "resnet10t"])
def test_maps_are_the_students_at_any_size(encoder: str, tmp_path: Path) -> None:
    model = student(encoder)
    path = export_onnx(model, tmp_path / "new" / "student.onnx")
    assert path == tmp_path / "new" / "student.onnx"
    assert [p.name for p in path.parent.iterdir()] == ["student.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 32, 32), (3, 1, 96, 64), (2, 1, 192, 320)):
        pixels = rng.random(shape, dtype=np.float32)
        (maps,) = session.run(["maps"], {"pixels": pixels})
        np.testing.assert_allclose(maps, model.predict_maps(pixels), atol=1e-5)


def test_metadata_say_what_the_model_needs(tmp_path: Path) -> None:
    model = student()
    model.save(tmp_path / "model")
    path = export_onnx(tmp_path / "model", str(tmp_path / "a.onnx"), verify=False)
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(found["channels"]) == ["DAPI"]
    assert float(found["um_per_px"]) == 0.25
    assert json.loads(found["stretch"]) == [1.0, 99.8]
    assert json.loads(found["outputs"]) == ["foreground", "boundary"]
    assert json.loads(found["instances"]) == {"threshold": 0.5, "min_depth": 1.0, "smoothing": 1.0, "min_area": 20}
    assert json.loads(found["teacher"])["licence"] == "Apache-2.0"
    assert found["weights_sha256"] == model.digest


def test_fixed_size(tmp_path: Path) -> None:
    path = export_onnx(student(), tmp_path / "a.onnx", size=64)
    (entry,) = onnx.load(path).graph.input
    dims = entry.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert [d.dim_value for d in dims[1:]] == [1, 64, 64]
    with pytest.raises(ValueError, match="size=50 must be a multiple of 32"):
        export_onnx(student(), tmp_path / "b.onnx", size=50)


def test_the_student_is_left_as_it_was(tmp_path: Path) -> None:
    model, pixels = student(), np.random.default_rng(0).random((1, 1, 64, 64), dtype=np.float32)
    before, state = model.predict_maps(pixels), torch.random.get_rng_state()
    export_onnx(model, tmp_path / "a.onnx")
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(model.predict_maps(pixels), before)


def test_maps_that_differ_are_refused_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    other = module._Maps(student("resnet10t").module).eval()
    export = module._export
    monkeypatch.setattr(module, "_export", lambda module_, *args: export(other, *args))
    with pytest.raises(RuntimeError, match=r"Maps of ONNX and PyTorch differ by .* more than 0.0001"):
        export_onnx(student(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_a_model_of_one_size_is_refused_where_sizes_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = module._export
    monkeypatch.setattr(module, "_export", lambda network, path, n, size, opset: export(network, path, n, 64, opset))
    with pytest.raises(RuntimeError, match=r"cannot run on images .* bound to one size.* size="):
        export_onnx(student(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install \"histoniche\[seg\]\""):
        export_onnx(student(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_swin_at_free_sizes(tmp_path: Path) -> None:
    model = Segmenter(SegmenterConfig("swin-tiny", ["DAPI"], decoder_channels=[8] * 5), pretrained=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights of training size, so that a wrong window would be seen
        for name, parameter in model.module.named_parameters():
            if "relative_position_bias" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            elif "qkv" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path / "a.onnx")))
    for shape in ((1, 1, 64, 64), (2, 1, 224, 96), (1, 1, 256, 320)):
        pixels = torch.rand(shape, generator=generator).numpy()
        np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], model.predict_maps(pixels), atol=1e-4)


def test_vit_at_the_size_of_its_patches(tmp_path: Path) -> None:
    model = student("vit-tiny")
    with pytest.raises(ValueError, match=r"'vit-tiny' is bound to one size in ONNX: .*size="):
        export_onnx(model, tmp_path / "a.onnx")
    before = model.digest
    path = export_onnx(model, tmp_path / "a.onnx", size=64)
    assert model.digest == before, "the student keeps its own position embeddings"
    pixels = np.random.default_rng(0).random((3, 1, 64, 64), dtype=np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], model.predict_maps(pixels), atol=1e-4)
