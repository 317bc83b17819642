"""Companion: distillation of segmentation foundation models into small students."""

from . import metrics, teachers
from ._access import StudentAccessError
from ._distill import distill, finetune
from ._fields import Field, patches
from ._instances import instances
from ._losses import DistillationLoss, UncertaintyWeights
from ._onnx import export_onnx
from ._readers import read_bbbc038, read_folder, read_tissuenet
from ._sdata_fields import fields_from_sdata
from ._segment import as_callable, segment
from ._segmenter import Segmenter, SegmenterConfig
from ._students import list_students
from ._targets import maps_of_labels

__all__ = [
    "DistillationLoss",
    "Field",
    "Segmenter",
    "SegmenterConfig",
    "StudentAccessError",
    "UncertaintyWeights",
    "as_callable",
    "distill",
    "export_onnx",
    "fields_from_sdata",
    "finetune",
    "instances",
    "list_students",
    "maps_of_labels",
    "metrics",
    "patches",
    "read_bbbc038",
    "read_folder",
    "read_tissuenet",
    "segment",
    "teachers",
]
