"""The engine that holds a trained run's model, in any world size, without an optimizer."""

from dataclasses import replace

from stablelm.checkpoint.weights import EvaluatedWeights
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.launch_environment import Launch
from stablelm.engine.process.compilation import settled
from stablelm.engine.process.torch_settings import set_switches
from stablelm.engine.ranks import Ranks, check_precision, connect
from stablelm.engine.tensor_parts import clean_name
from stablelm.evaluate.trained_run import TrainedRun


def load_engine(run: TrainedRun, launch: Launch, kind: str) -> tuple[Engine, Ranks, TrainedRun]:
    """Joins the ranks and loads the checkpoint's weights; the run's `train.compile` is settled. Collective.

    Raises ConfigError for what the machine lacks, CheckpointError for tensors that do not fit.
    """
    ranks = connect(launch, kind)
    check_precision(str(run.config.train.precision), ranks.device)
    set_switches(run.config)
    run = replace(run, config=settled(run.config, kind, ranks.device))
    engine = build_engine(run.config, kind, ranks, train=False)
    names = {clean_name(name) for name, _ in engine.module.named_parameters()}
    weights = EvaluatedWeights.of(run.checkpoint, run.config)
    weights.load(engine.tensors(optimizer=False), names, ranks.cpu_group)
    engine.loaded()
    return engine, ranks, run
