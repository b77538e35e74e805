"""The dense model as a teacher: beside the student, or written down beforehand."""

from sparsepass.retrain.teacher.cache import offline_teacher
from sparsepass.retrain.teacher.online import OnlineParts, OnlineTeacher, Teacher, check_hidden, online_teacher
from sparsepass.retrain.teacher.sample import SAMPLED, SampleConfig, check_file, sample_to_file

__all__ = [
    "SAMPLED",
    "OnlineParts",
    "OnlineTeacher",
    "SampleConfig",
    "Teacher",
    "check_file",
    "check_hidden",
    "offline_teacher",
    "online_teacher",
    "sample_to_file",
]
