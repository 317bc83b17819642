"""Engine: image encoders, crops and dense features, the feature store."""

from ._contract import contract_difference, feature_contract
from ._embed import embed
from ._load import Encoder, EncoderAccessError, load_encoder
from ._registry import EncoderSpec, get, list_encoders, register
from ._store import FeatureStore

__all__ = [
    "Encoder",
    "EncoderAccessError",
    "EncoderSpec",
    "FeatureStore",
    "contract_difference",
    "embed",
    "feature_contract",
    "get",
    "list_encoders",
    "load_encoder",
    "register",
]
