"""Pruning: `prune` in one shot, `GradualPruner` and `RewindPruner` while training; all say what they did."""

from .checkpoint import load_checkpoint, save_checkpoint
from .config import PruneConfig
from .gradual import GradualPruner
from .log import LogEntry, PruneLog, read_log
from .oneshot import prune
from .permute import permute_channels
from .pruner import Pruner
from .ranks import check_ranks
from .record import LayerRecord, PruneRecord
from .rewind import RewindPruner
from .trained import Trained, TrainedFile

__all__ = [
    "GradualPruner",
    "LayerRecord",
    "LogEntry",
    "PruneConfig",
    "PruneLog",
    "PruneRecord",
    "Pruner",
    "RewindPruner",
    "Trained",
    "TrainedFile",
    "check_ranks",
    "load_checkpoint",
    "permute_channels",
    "prune",
    "read_log",
    "save_checkpoint",
]
