"""The engine that holds a trained run's model, in any world size, without an optimizer."""

from stablelm.checkpoint.format import load_tensors
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.launch_environment import Launch
from stablelm.engine.ranks import Ranks, check_precision, connect
from stablelm.evaluate.trained_run import TrainedRun


def load_engine(run: TrainedRun, launch: Launch, kind: str) -> tuple[Engine, Ranks]:
    """Joins the ranks and loads the checkpoint's weights. Collective.

    Raises ConfigError for what the machine lacks, CheckpointError for tensors that do not fit.
    """
    ranks = connect(launch, kind)
    check_precision(str(run.config.train.precision), ranks.device)
    engine = build_engine(run.config, kind, ranks, train=False)
    load_tensors(run.checkpoint / "tensors", engine.tensors(optimizer=False), ranks.cpu_group, partial=True)
    engine.loaded()
    return engine, ranks
