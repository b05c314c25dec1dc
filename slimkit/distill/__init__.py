"""Distillation for PyTorch: a teacher, a student and the losses between them as one module to train."""

from slimkit.core.lazy import door as _door
from slimkit.distill.cache import TeacherCache
from slimkit.distill.dual import DistillDualModels, get_distill_model

__all__ = ["DistillDualModels", "TeacherCache", "get_distill_model"]

__getattr__, __dir__ = _door("slimkit", "distill")
