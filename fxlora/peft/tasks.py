"""TaskType: the values of `LoraConfig.task_type`, as members of an enumeration."""

from __future__ import annotations

from enum import Enum


class TaskType(str, Enum):
    """The task of a model; `LoraConfig(task_type=…)` also takes its value, a text."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"
