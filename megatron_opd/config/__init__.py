"""Every option of a run, one sentence each, with the only default it has.

A YAML file holds what differs from these defaults; further files and ``key=value`` arguments hold what differs from it:

    load_config(Path("conf/toy.yaml"), ["conf/recipe/opd.yaml", "steps=2", "optimizer.lr=1e-4"])

All mistakes are reported together, with the nearest known key. Relative paths count from the current directory.
"""

from megatron_opd.config.cluster import ClusterConfig
from megatron_opd.config.convert import ConversionConfig, ToHfConfig, ToMegatronConfig
from megatron_opd.config.evaluation import BenchmarkConfig, EvaluationConfig
from megatron_opd.config.load import load_config, load_evaluation, load_options, parse_config
from megatron_opd.config.prepare import PrepareConfig
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
    EvalConfig,
    ImagesConfig,
    JudgeConfig,
    OptimizerConfig,
    RefreshConfig,
    RolloutConfig,
    ScoringConfig,
    SinksConfig,
    StreamConfig,
    StudentConfig,
    TeacherConfig,
    VerifierConfig,
)
from megatron_opd.config.servers import EngineConfig, RoutingConfig, ServerConfig

__all__ = [
    "BalanceConfig",
    "BenchmarkConfig",
    "CalibrationConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "Config",
    "ConversionConfig",
    "DataConfig",
    "DifficultyConfig",
    "EngineConfig",
    "EvalConfig",
    "EvaluationConfig",
    "ImagesConfig",
    "JudgeConfig",
    "LazyConfig",
    "LossConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "RefreshConfig",
    "RolloutConfig",
    "RoutingConfig",
    "ScoringConfig",
    "ServerConfig",
    "SinksConfig",
    "StreamConfig",
    "StudentConfig",
    "TeacherConfig",
    "ToHfConfig",
    "ToMegatronConfig",
    "VerifierConfig",
    "load_config",
    "load_evaluation",
    "load_options",
    "parse_config",
]
