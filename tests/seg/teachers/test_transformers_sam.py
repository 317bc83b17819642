"""SAM of transformers, as a tiny network with random weights that is saved and loaded through the public class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

from histoniche.seg import finetune_lora
from histoniche.seg._fields import Field
from histoniche.seg.teachers import SAM, PromptedTeacher, Prompts, SemanticTeacher, TeacherAccessError

CENTRE = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
SPREAD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
GRID = Prompts("grid", spacing=20, least_iou=-100, least_stability=0, most_overlap=1.0, most_area=1.0)


@pytest.fixture(scope="module")
def net() -> SamModel:
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16,
            window_size=2, global_attn_indexes=[1], mlp_dim=64, num_pos_feats=8,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    model = SamModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the usual start is so small that every logit is 0
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.6)
        # Grids multiply by the predicted IoU, which may not be 0 everywhere.
        model.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def folder(net: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "tiny"
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(folder: Path) -> SAM:
    return SAM(["dapi"], weights=folder)


@pytest.fixture
def item() -> Field:
    """A field as large as the input, so that nothing is scaled, with room at the bottom for padding."""
    labels = np.zeros((40, 64), dtype=np.int32)
    for number in range(5):
        labels[3 + 5 * number : 17 + 5 * number, 12 * number : 12 * number + 10] = number + 1
    return Field("field", np.random.default_rng(0).random((1, 40, 64)).astype(np.float32), ("dapi",), labels)


def pixel_values(item: Field) -> torch.Tensor:
    """What SAM's own preprocessing makes of a field: 0 to 255, normalised, then padded with zeros."""
    grey = torch.from_numpy(item.read(("dapi",)) ** 0.5)
    return F.pad((grey.repeat(3, 1, 1) * 255 - CENTRE) / SPREAD, (0, 0, 0, 24))[None]


def sized(logits: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits[None, :, :10], size=(40, 64), mode="bilinear", align_corners=False)[0].sigmoid()


# ----------------------------------------------------------------------------------------------------------- the same
def test_boxes_reach_the_model(teacher: SAM, net: SamModel, item: Field) -> None:
    boxes = torch.from_numpy(Prompts().boxes(item, item.read(("dapi",))))
    with torch.no_grad():
        expected = net(pixel_values=pixel_values(item), input_boxes=boxes[None], multimask_output=False)
    logits, iou = teacher.decode(teacher.encode(pixel_values(item)), boxes, boxes=True)
    assert logits.shape == (5, 1, 16, 16)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected.pred_masks[0])
    torch.testing.assert_close(iou, expected.iou_scores[0])
    maps = teacher(item).maps
    masks = sized(expected.pred_masks[0, :, 0])
    np.testing.assert_allclose(maps[0], masks.amax(0).numpy(), atol=1e-5)


def test_points_reach_the_model(teacher: SAM, net: SamModel, item: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.from_numpy(GRID.points(item.shape))
    with torch.no_grad():
        expected = net(
            pixel_values=pixel_values(item), input_points=points[None, :, None], multimask_output=True,
            input_labels=torch.ones(1, len(points), 1, dtype=torch.int64),
        )  # fmt: skip
    logits, iou = teacher.decode(teacher.encode(pixel_values(item)), points, boxes=False)
    assert logits.shape == (6, 3, 16, 16)
    torch.testing.assert_close(logits, expected.pred_masks[0])
    torch.testing.assert_close(iou, expected.iou_scores[0])
    every, certain = expected.pred_masks[0].flatten(0, 1), expected.iou_scores[0].flatten()
    rows = GRID.keep(every[:, :10], certain)
    assert len(rows) > 1
    monkeypatch.setattr(teacher, "prompts", GRID)
    masks = sized(every[rows]) * certain[rows].clamp(0, 1)[:, None, None]
    found = teacher(item).maps[0]
    assert found.max() > 0.01
    np.testing.assert_allclose(found, masks.amax(0).numpy(), atol=1e-5)


def test_the_embedding_is_that_of_the_model(teacher: SAM, net: SamModel, item: Field) -> None:
    embedding = teacher(item, features=True).features["embedding"]
    assert embedding.shape == (16, 2, 4)  # the part that the image fills
    np.testing.assert_allclose(embedding, net.get_image_embeddings(pixel_values(item))[0, :, :2].numpy(), atol=1e-5)


def test_preprocessing_is_that_of_transformers(teacher: SAM) -> None:
    """Grey values that are whole numbers of 0 to 255, through the processor of transformers."""
    from transformers import SamImageProcessor

    grey = np.random.default_rng(1).integers(0, 256, size=(64, 64), dtype=np.uint8)
    processor = SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    expected = processor(np.repeat(grey[..., None], 3, -1), return_tensors="pt")["pixel_values"]
    rgb = torch.from_numpy(grey / np.float32(255)).repeat(1, 3, 1, 1)
    # Its constants are rounded to three digits of 1.
    torch.testing.assert_close(teacher.normalise(rgb), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("prompts", [Prompts(), GRID], ids=["boxes", "grid"])
def test_batches_change_nothing(teacher: SAM, item: Field, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "prompts", prompts)
    whole = teacher(item).maps
    assert np.ptp(whole[0]) > 0.01
    for size in (1, 2, 3):
        monkeypatch.setattr(teacher, "batch_size", size)
        np.testing.assert_allclose(teacher(item).maps, whole, atol=1e-5)


def test_it_is_frozen(teacher: SAM) -> None:
    assert isinstance(teacher, PromptedTeacher)
    assert not teacher.module.training
    rgb = torch.rand(1, 3, 64, 64, requires_grad=True)
    teacher.module.vision_encoder(rgb)[0].sum().backward()
    assert rgb.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.module.parameters())


def test_weights_and_prompts_are_in_the_fingerprint(teacher: SAM, folder: Path, tmp_path: Path) -> None:
    assert SAM(["dapi"], weights=folder).fingerprint == teacher.fingerprint
    assert SAM(["dapi"], weights=folder, prompts=GRID).fingerprint != teacher.fingerprint
    other = tmp_path / "tiny"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    state["mask_decoder.iou_token.weight"][0, 0] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    assert SAM(["dapi"], weights=other).fingerprint != teacher.fingerprint
    assert teacher.name == "sam tiny"
    assert teacher.licence == "Apache-2.0"
    assert teacher.input_px == 64


# ------------------------------------------------------------------------------------------------------------- access
@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("vit_b", "facebook/sam-vit-base"),
        ("vit_l", "facebook/sam-vit-large"),
        ("vit_h", "facebook/sam-vit-huge"),
        ("someone/their-sam", "someone/their-sam"),
    ],
)
def test_without_network_it_says_what_to_do(model: str, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(source: str, **values: object) -> None:
        asked.append((source, values))
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    monkeypatch.setattr(SamModel, "from_pretrained", refuse)
    message = rf"{repository}.*couldn't connect.*`hf download {repository} .*weights='sam'.*HF_HUB_OFFLINE=1"
    with pytest.raises(TeacherAccessError, match=message):
        SAM(["dapi"], model=model)
    assert asked[0][0] == repository
    assert asked[0][1]["use_safetensors"] is True
    assert "trust_remote_code" not in asked[0][1]


def test_the_hub_is_asked_by_default(net: SamModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamModel, "from_pretrained", lambda source, **values: (net, {"missing_keys": set()}))
    teacher = SAM(["dapi"])
    assert teacher.name == "facebook/sam-vit-base"


def test_a_folder_without_weights_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TeacherAccessError, match=r"no folder with config.json and model.safetensors.*hf download"):
        SAM(["dapi"], weights=tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(TeacherAccessError, match="cannot be had from the folder"):
        SAM(["dapi"], weights=tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path, net: SamModel, folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherAccessError, match=r"model\.safetensors"):
        SAM(["dapi"], weights=tmp_path)


def test_damaged_weights_are_an_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="are damaged, or not SAM's"):
        SAM(["dapi"], weights=tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("mask_decoder.iou_token")}
    assert len(kept) == len(state) - 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing, 'mask_decoder.iou_token.weight' among them"):
        SAM(["dapi"], weights=tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs the package transformers: pip install"):
        SAM(["dapi"])


# ----------------------------------------------------------------------------------------------- adapted to a task
def test_hidden_features_are_those_of_the_blocks(teacher: SAM, net: SamModel, item: Field) -> None:
    hidden = teacher.hidden(item)
    assert {name: maps.shape for name, maps in hidden.items()} == {
        "block0": (32, 2, 4), "block1": (32, 2, 4), "embedding": (16, 2, 4),
    }  # fmt: skip
    encoder = net.vision_encoder
    with torch.no_grad():
        tokens = encoder.patch_embed(pixel_values(item)) + encoder.pos_embed
        for k, layer in enumerate(encoder.layers):
            tokens = layer(tokens)
            np.testing.assert_allclose(hidden[f"block{k}"], tokens[0, :2].permute(2, 0, 1).numpy(), atol=1e-5)


def test_its_own_decoder_without_a_prompt(teacher: SAM, net: SamModel, item: Field) -> None:
    embedding = torch.cat([teacher.embed(item.read(["dapi"]))[0], torch.ones(1, 16, 4, 4)])
    decoder = teacher.unprompted_decoder()
    with torch.no_grad():
        logits = decoder(embedding, torch.zeros(len(embedding), 3, 64, 64))
        wanted = net(image_embeddings=embedding, multimask_output=True).pred_masks[:, 0, :2]
    assert logits.shape == (2, 2, 16, 16)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert not any(a is b for a in decoder.parameters() for b in teacher.module.parameters())  # a copy


@pytest.mark.parametrize("decoder", ["dense", "mask"])
def test_lora_in_the_attention_of_every_block(folder: Path, item: Field, decoder: str, tmp_path: Path) -> None:
    labels = np.zeros(item.shape, dtype=np.int32)
    labels[4:20, 4:20] = 1
    base = SAM(["dapi"], weights=folder)
    options = {"n_steps": 2, "batch_size": 2, "patch_px": 32, "lr": 1e-4, "decoder": decoder}
    teacher = finetune_lora([replace(item, labels=labels)], teacher=base, **options)
    adapted = [name for name, _ in teacher.base.module.named_modules() if name.endswith("lora_A")]
    assert adapted == [f"vision_encoder.layers.{k}.attn.qkv.lora_A" for k in range(2)]
    assert all(
        layer.lora_B["default"].weight.abs().max() > 0 for layer in map(_qkv, teacher.base.module.vision_encoder.layers)
    )
    teacher.save(tmp_path / "task")
    again = SemanticTeacher.load(tmp_path / "task", teacher=base)
    np.testing.assert_array_equal(again(item).maps, teacher(item).maps)


def _qkv(layer: torch.nn.Module) -> torch.nn.Module:
    return layer.attn.qkv
