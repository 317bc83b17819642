"""Companion: distillation of segmentation foundation models into small students."""

from . import metrics, teachers
from ._access import StudentAccessError
from ._chaos import read_chaos
from ._compare import compare
from ._distill import distill, finetune
from ._fields import Field, patches
from ._instances import instances
from ._losses import DistillationLoss, UncertaintyWeights
from ._onnx import export_onnx
from ._pretrain import pretrain
from ._readers import read_bbbc038, read_folder
from ._sdata_fields import fields_from_sdata
from ._segment import as_callable, segment
from ._segmenter import Segmenter, SegmenterConfig
from ._students import list_students
from ._synthesize import read_synthetic, synthesize
from ._targets import maps_of_labels
from ._task_readers import read_autooral, read_chase_db1, read_drive, read_kidneyus, read_ph2
from ._task_specific import task_specific_distill
from ._threshold import best_threshold
from ._tissuenet import read_tissuenet
from .teachers._lora import finetune_lora

__all__ = [
    "DistillationLoss",
    "Field",
    "Segmenter",
    "SegmenterConfig",
    "StudentAccessError",
    "UncertaintyWeights",
    "as_callable",
    "best_threshold",
    "compare",
    "distill",
    "export_onnx",
    "fields_from_sdata",
    "finetune",
    "finetune_lora",
    "instances",
    "list_students",
    "maps_of_labels",
    "metrics",
    "patches",
    "pretrain",
    "read_autooral",
    "read_bbbc038",
    "read_chaos",
    "read_chase_db1",
    "read_drive",
    "read_folder",
    "read_kidneyus",
    "read_ph2",
    "read_synthetic",
    "read_tissuenet",
    "segment",
    "synthesize",
    "task_specific_distill",
    "teachers",
]
