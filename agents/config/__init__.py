"""What a run can be told: the settings, their checks, files and presets."""

from agents.config.learning import AdvantageConfig, KLConfig, LossConfig, OptimizerConfig, RewardConfig
from agents.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    Scalar,
    SFTConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "EvaluationConfig",
    "GuardConfig",
    "KLConfig",
    "LogConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "Scalar",
    "TaskConfig",
    "TrainConfig",
]
