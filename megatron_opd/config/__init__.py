"""Every option of a run, one sentence each, with the only default it has.

A YAML file holds what differs from these defaults; further files and ``key=value`` arguments hold what differs from it:

    load_config(Path("conf/toy.yaml"), ["conf/recipe/opd.yaml", "steps=2", "optimizer.lr=1e-4"])

All mistakes are reported together, with the nearest known key. Relative paths count from the current directory.
"""

from megatron_opd.config.load import load_config, parse_config
from megatron_opd.config.recipe import (
    BalanceConfig,
    CalibrationConfig,
    DifficultyConfig,
    LazyConfig,
    LossConfig,
    ObjectiveConfig,
)
from megatron_opd.config.run import Config
from megatron_opd.config.sections import (
    CheckpointConfig,
    ColumnsConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    JudgeConfig,
    OptimizerConfig,
    RefreshConfig,
    RolloutConfig,
    ScoringConfig,
    ServerConfig,
    StudentConfig,
    TeacherConfig,
    VerifierConfig,
)

__all__ = [
    "BalanceConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "DifficultyConfig",
    "EngineConfig",
    "EvalConfig",
    "JudgeConfig",
    "LazyConfig",
    "LossConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RefreshConfig",
    "RolloutConfig",
    "ScoringConfig",
    "ServerConfig",
    "StudentConfig",
    "TeacherConfig",
    "VerifierConfig",
    "load_config",
    "parse_config",
]
