"""Teachers: frozen models that turn a field into probability maps."""

from histoniche.seg._access import TeacherAccessError

from ._cache import teach
from ._cellsam import CellSAM
from ._litemedsam import LiteMedSAM
from ._prompts import Prompts
from ._protocol import CallableTeacher, Output, Teacher
from ._sam import PromptedTeacher
from ._semantic import SemanticTeacher, tune
from ._transformers_sam import SAM

__all__ = [
    "SAM",
    "CallableTeacher",
    "CellSAM",
    "LiteMedSAM",
    "Output",
    "PromptedTeacher",
    "Prompts",
    "SemanticTeacher",
    "Teacher",
    "TeacherAccessError",
    "teach",
    "tune",
]
