"""Every key of a run: its type, unit, default and meaning.

Frozen dataclasses, one a section; `stablelm.config.load` fills and validates them. A key marked
`identity` belongs to what a run *is* and must be equal on resume; the others are free to change.
A default of None means: derived from other keys (see the text of the key). A field whose key is a
word of the language ends in an underscore: `checkpoint.async` is `async_`.
"""

# ruff: noqa: RUF009 - key() makes dataclass fields

from dataclasses import dataclass
from typing import Literal

from stablelm.config.batch_sizes import BatchSizes
from stablelm.config.model_schema import AttentionConfig as AttentionConfig
from stablelm.config.model_schema import ModelConfig
from stablelm.key import key
from stablelm.optimizers.muon import MuonOptions
from stablelm.optimizers.sam import SamOptions
from stablelm.optimizers.sophia import SophiaOptions


@dataclass(frozen=True)
class RunConfig:
    dir: str = key("runs/default", "where everything of the run is written", path=True)
    seed: int = key(0, "seed of weights, dropout and data order", identity=True)
    stop_after: int | None = key(
        None, "stop with a checkpoint and exit code 75 once this step is finished", unit="steps"
    )
    init_from: str | None = key(
        None, "start a new run from the weights of this run or checkpoint directory", identity=True, path=True
    )
    grow_from: str | None = key(
        None,
        "start a new run from the weights of this shallower run or checkpoint directory; the optimizer state is new",
        identity=True,
        path=True,
    )
    growth: Literal["stack", "repeat", "zero"] = key(
        "zero",
        "how the layers of run.grow_from become more. stack: all of them on top of themselves; repeat: each several "
        "times in a row; zero: repeat, with branches of zero in the copies, so that the function stays the same",
        identity=True,
    )
    allow_foreign_dir: bool = key(False, "write to a run.dir that belongs to another user")
    allow: list[str] = key(
        list,
        "identity keys that may differ from the checkpoint, as [train.lr]: later steps have the new values, which the "
        "run remembers, see docs/changing_a_run.md",
    )
    time_limit: str | float | None = key(
        None, "stop in time with exit code 75; seconds, MM:SS, HH:MM:SS or D-HH:MM:SS", unit="s", path=False
    )


@dataclass(frozen=True)
class DataConfig:
    source: Literal["files", "datasets", "shards"] = key(
        "files",
        "what data.path holds: files of text, anything that datasets.load_dataset opens, or shards made by "
        "stablelm prepare",
    )
    path: str | list[str] = key(
        "embedded",
        "file, glob, folder, URL or list of these; 'embedded': Python's own documentation; "
        "datasets: name on the hub, folder or builder such as csv; shards: the prepared folder, or *.tokens files",
        identity=True,
        path=True,
    )
    dataset: dict[str, str | list[str] | int | float | bool] = key(
        dict,
        "source: datasets: arguments of load_dataset for every path, as {name: en, split: train, revision: ...}; "
        "a path may say its own, as allenai/c4?name=en",
        identity=True,
        path=("data_files", "data_dir"),
    )
    mixture: dict[str, str | list[str] | int | float] = key(
        dict,
        "several sources in place of data.path, as web: {path: ..., weight: 0.8}; weight: {0: 0.2, 9000: 0.5} changes "
        "at a data step",
        identity=True,
        path=True,
    )
    validation: dict[str, str | list[str]] = key(
        dict,
        "validation sets: name -> path, or {path: ..., text_column: ...} where their text is under another name",
        path=True,
    )
    validation_path: str | list[str] | None = key(None, "short form for the validation set 'default'", path=True)
    tokenizer: str = key(
        "embedded",
        "a SentencePiece .model file, a tokenizer.json, a folder that holds one of them, or a model on the Hugging "
        "Face hub (org/name[@revision] or hf://org/name); 'embedded': trained on the embedded corpus",
        identity=True,
        path=True,
    )
    add_bos: bool = key(False, "each document begins with the tokenizer's bos token", identity=True)
    eos_token: str | None = key(
        None, "the token that ends each document, by its content; None: the tokenizer's own", identity=True, path=False
    )
    seq_len: int = key(512, "targets a sequence", unit="tokens", identity=True)
    document_mask: bool = key(False, "attention stays within a document, whose positions start at 0", identity=True)
    packing: Literal["split", "best_fit"] = key(
        "split",
        "split: documents joined and cut into sequences; best_fit: whole ones where they fit best, padded, "
        "none predicted from another",
        identity=True,
    )
    lanes: int = key(768, "deterministic streams of documents; data-parallel sizes must divide it", identity=True)
    shuffle_block: int = key(64, "rows shuffled together inside a file", unit="documents", identity=True)
    workers: int = key(1, "workers that read and tokenize ahead of the step, a rank; 0: it is done in the step itself")
    worker_kind: Literal["thread", "process"] = key(
        "thread", "thread: part of the rank; process: one beside it, for more tokens than a core makes"
    )
    prefetch: int = key(2, "batches kept ready by the workers")
    text_column: str = key(
        "text", "where a row holds its document: a key of JSON, a column of parquet", identity=True, path=False
    )
    filter: str | None = key(
        None,
        "package.module:function from a row (a mapping) to whether it is a document; None: all are",
        identity=True,
        path=False,
    )
    map: str | None = key(
        None,
        "package.module:function from a row that is kept to one with its text under text_column; None: as stored",
        identity=True,
        path=False,
    )
    bad_rows: Literal["stop", "skip"] = key(
        "stop",
        "a row without a document (cut off, not Unicode, null, without the key). stop: ends the run; skip: is left out "
        "and counted. Rows keep their numbers, so it may change at any time",
    )
    text_unit: Literal["file", "line"] = key(
        "file", "what is a document in *.txt, *.txt.gz and *.txt.zst: the whole file, or each line", identity=True
    )
    storage: dict[str, str | int | float | bool] = key(
        dict,
        "fsspec options of a store, as s3: {endpoint_url: ..., anon: true}; credentials belong in the environment, "
        "for instance AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        path=False,
    )
    cache: str = key(
        "data/cache", "folder of the embedded corpus, of indexes of text files and other derived files", path=True
    )
    cache_bytes: int = key(0, "largest size of whole remote files kept in the cache; 0: none is kept", unit="bytes")
    retry_budget: float = key(600.0, "longest time to retry one unreachable read", unit="s")
    max_document_bytes: int = key(
        64 << 20, "longest document, line or run of blank lines; a longer one is an error in its file", unit="bytes"
    )


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = key(None, "optimizer steps; exactly one of steps and tokens", identity=True)
    tokens: int | None = key(None, "training length; rounded up to whole steps", unit="tokens", identity=True)
    global_batch_size: int | dict[int, int] = key(
        32,
        "sequences per step over all ranks; {0: 32, 1000: 64}: other sizes from data steps on, which count consumed "
        "batches from 0",
        unit="sequences",
        identity=True,
    )
    micro_batch_size: int | None = key(
        None, "sequences that a rank processes at once; None: no accumulation", unit="sequences"
    )
    lr: float = key(3e-4, "peak learning rate", identity=True)
    min_lr: float | None = key(None, "learning rate at the end; None: lr / 10", identity=True)
    warmup_steps: int = key(100, "linear warm-up from zero; may exceed steps", unit="steps", identity=True)
    schedule: Literal["cosine", "linear", "wsd", "power", "constant"] = key(
        "cosine",
        "shape after the warm-up; wsd: constant until the cooldown; power: constant up to power_after, then a power of "
        "the step until the cooldown",
        identity=True,
    )
    cooldown_steps: int | None = key(
        None, "last steps of wsd and power; None: a fifth of the steps", unit="steps", identity=True
    )
    cooldown_shape: Literal["linear", "1-sqrt"] = key(
        "linear", "how the rate falls to min_lr in the cooldown; 1-sqrt: fast at first", identity=True
    )
    power_after: int | None = key(
        None, "power: last step at the full rate; None: warmup_steps", unit="steps", identity=True
    )
    power_exponent: float = key(0.51, "power: the rate is lr (step / power_after)^-power_exponent", identity=True)
    optimizer: Literal["adamw", "muon", "sophia", "sam", "looksam", "stable_adamw", "lion", "schedule_free"] = key(
        "adamw", "how gradients become updates, see docs/optimizers.md", identity=True
    )
    weight_decay: float = key(0.1, "decay of matrices; norms, biases and embeddings have none", identity=True)
    independent_decay: bool = key(
        False,
        "a step decays by weight_decay times the schedule, a share of the peak rate, and not by weight_decay times the "
        "rate itself",
        identity=True,
    )
    betas: tuple[float, float] = key((0.9, 0.95), "the optimizer's averaging constants", identity=True)
    eps: float = key(1e-8, "Adam's epsilon", identity=True)
    eps_inside: bool = key(False, "AdamW divides by sqrt(v + eps) in place of sqrt(v) + eps", identity=True)
    ema: float = key(
        0.0, "decay of an exponential moving average of the weights, kept beside them; 0: none", identity=True
    )
    moments: Literal["fp32", "bf16", "int8"] = key(
        "fp32",
        "storage of Adam's moments, updated in fp32: the parameters' dtype, bf16, or int8 with a scale for each block "
        "(extra torchao)",
        identity=True,
    )
    grad_clip: float = key(1.0, "largest global gradient norm; 0: no clipping", identity=True)
    z_loss: float = key(0.0, "weight of log(Z)^2, which keeps logits from drifting", identity=True)
    loss: str | None = key(
        None,
        "package.module:function from logits and targets to the loss of each token, which is minimised in place of the "
        "cross-entropy",
        identity=True,
        path=False,
    )
    precision: Literal["fp32", "bf16", "fp64"] | None = key(
        None, "arithmetic of the matrix products; None: accelerate's flag, else fp32", identity=True
    )
    float8: Literal["none", "tensorwise", "rowwise"] = key(
        "none",
        "float8 matmuls of the layers' matrices in training passes, under precision bf16: one scale for a matrix, or "
        "one for each row",
        identity=True,
    )
    float8_min_width: int = key(
        2048, "smallest side of a matmul's matrix that float8 takes; small ones gain nothing", identity=True
    )
    compile: Literal["auto"] | bool = key(
        "auto", "compile each layer with torch.compile; auto: on GPUs that it supports, except under zero3"
    )
    deterministic: bool = key(
        False,
        "only kernels that repeat their results bit for bit, on GPUs at some cost in speed; CPUs repeat theirs anyway",
    )
    muon: MuonOptions = key(MuonOptions, str(MuonOptions.__doc__))
    sophia: SophiaOptions = key(SophiaOptions, str(SophiaOptions.__doc__))
    sam: SamOptions = key(SamOptions, str(SamOptions.__doc__))

    @property
    def batch_sizes(self) -> BatchSizes:
        """The sequences of each step."""
        return BatchSizes.of(self.global_batch_size)


@dataclass(frozen=True)
class EngineConfig:
    kind: Literal["auto", "single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = key(
        "auto", "how ranks share the work; auto: accelerate's flags, else single or fsdp2 by world size"
    )
    replicas: int | None = key(
        None, "whole copies of the model under hsdp, each sharded over the other ranks; None: one a node, at least 2"
    )
    unit_bytes: int = key(
        2**26, "consecutive layers are gathered together until their matrices reach this size in bf16", unit="bytes"
    )
    prefetch: int = key(1, "units gathered ahead of the one at work under fsdp2 and hsdp")
    reshard_after_forward: Literal["auto", "always", "never"] = key(
        "auto",
        "what fsdp2 and hsdp free after its forward pass and gather again for the backward pass; auto: all but the "
        "head, which comes first there; never: nothing until the step's last backward pass",
    )
    accumulate: Literal["auto", "local", "sharded"] = key(
        "auto",
        "where fsdp2 and hsdp add up the gradients of micro-batches. local: unsharded on each rank, reduced once a "
        "step; sharded: each micro-batch is reduced into the shards; auto: local where that takes at most a tenth of "
        "the GPU's memory",
    )
    reduce_dtype: Literal["fp32", "bf16"] = key(
        "fp32",
        "in which fsdp2 and hsdp sum the gradients of the layers' matrices over ranks, under train.precision bf16",
    )
    offload: Literal["none", "optimizer", "parameters"] = key(
        "none", "what lives in the host's memory: Adam's state, or parameters and gradients with it"
    )
    recompute: str = key(
        "none",
        "activations computed again in the backward pass. none; attention: those of attention; selective: all but the "
        "results of matmuls and attention; full: all but the inputs of layers; every:K: full in each K-th layer; auto: "
        "the cheapest of these that fits engine.memory_limit",
        path=False,
    )
    memory_limit: float | None = key(
        None,
        "what recompute: auto fits a rank's predicted peak into; None: a GPU's memory less 5 GB, on a CPU nine tenths "
        "of a rank's share of the available memory. With a limit, a CPU's freed tensors go back to the system at once",
        unit="bytes",
    )
    optimizer_in_backward: bool = key(
        False, "update each parameter as soon as its gradient is there and free the gradient; one process, no clipping"
    )
    memory_budget: float = key(
        1.0, "share of a compiled layer's activations that is kept; the cheapest to recompute go first"
    )
    matmul_precision: Literal["highest", "high", "medium"] = key(
        "highest",
        "of matrix products of fp32 numbers (torch.set_float32_matmul_precision); high: TF32 on GPUs, medium: bf16",
    )
    gc_every: int | None = key(
        None,
        "steps between Python's garbage collections, at the same steps on all ranks; 0: whenever Python likes; None: "
        "50 on GPUs, else 0",
        unit="steps",
    )


@dataclass(frozen=True)
class CheckpointConfig:
    dir: str | None = key(
        None, "folder or URL (s3://, gs://, az://) where checkpoints go; None: <run.dir>/checkpoints", path=True
    )
    every: int = key(500, "steps between checkpoints; 0: only when the run stops", unit="steps")
    keep: int = key(2, "newest checkpoints kept")
    keep_permanent_every: int | None = key(None, "checkpoints at multiples of this are never deleted", unit="steps")
    async_: bool = key(True, "copy to host memory and write while training continues; one save in flight")


@dataclass(frozen=True)
class ObserveConfig:
    every: int = key(10, "steps between records", unit="steps")
    sinks: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = key(
        ["tensorboard"], "loggers that get the records of metrics.jsonl, which is always written; []: none"
    )
    layers_every: int = key(
        0, "steps between measurements of every layer on a fixed batch, and of updates; 0: never", unit="steps"
    )
    sharpness_every: int = key(
        0,
        "steps between measurements of the largest eigenvalue of the loss's Hessian on the same batch, 32 passes over "
        "it; 0: never",
        unit="steps",
    )
    metrics: list[str] = key(
        list,
        "functions package.module:function of a step before its update, whose figures are recorded every observe.every "
        "steps as custom/<name>",
    )
    profile: tuple[int, int] | None = key(None, "first and last step of a profiler trace", unit="steps")
    memory_snapshot: bool = key(False, "write CUDA's allocation history when the run ends")
    page: bool = key(True, "make the page run.dir/report.html at evaluations, as often as costs below 1 % of the time")
    hang_seconds: float = key(
        600.0, "a rank that gets no further for this long is hung: the run ends with 80", unit="s"
    )
    first_step_seconds: float = key(3600.0, "the same until the first step is finished, which compiles", unit="s")


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = key(500, "steps between evaluations; 0: only at the end", unit="steps")
    batches: int = key(8, "global batches, of step 0's size, of each validation set, the same ones every time")
    micro_batch_size: int = key(
        8,
        "sequences that a rank processes at once; the same in any world size, so that the figures are",
        unit="sequences",
    )
    samples: list[str] = key(
        list, "prompts that are continued at each evaluation, by the likeliest tokens; texts go to the records"
    )
    sample_tokens: int = key(64, "new tokens of each sample", unit="tokens")
    tasks: dict[str, str] = key(
        dict,
        "multiple-choice tasks scored at each evaluation: name -> local .jsonl file of query, choices and gold",
        path=True,
    )
    task_items: int | None = key(None, "at most so many items of each task, the first ones; None: all", unit="items")
    average: str | None = key(
        None,
        "weights that evaluations, samples and exports take: none, the trained ones; ema, their average train.ema; "
        "last:K, the mean of the newest K checkpoints; None: ema where there is one, else none",
        path=False,
    )
    best: str | None = key(
        None,
        "keep the checkpoint that is best by this metric besides the newest ones, and save whenever an evaluation is "
        "better than all before: val_loss/<set>, task/<name>/acc or task/<name>/acc_norm",
        path=False,
    )


@dataclass(frozen=True)
class GuardsConfig:
    spike: Literal["none", "skip", "rewind"] = key(
        "none",
        "on a spike: nothing; leave out updates whose gradient norm is one; or return to the last checkpoint and jump "
        "over the data around it",
        identity=True,
    )
    window: int = key(128, "finished steps that a spike is compared to, spikes not among them", identity=True)
    threshold: float = key(
        10.0,
        "a spike's loss or gradient norm lies this many spreads (1.4826 MAD) above the window's median",
        identity=True,
    )
    skip_data: int = key(16, "batches jumped over by a rewind, the spike's in their middle", identity=True)
    max_rewinds: int = key(3, "rewinds of a run, after which a spike ends it with exit code 76")
    max_skips: int = key(20, "updates left out in a row; one more ends the run with exit code 76", unit="steps")
    recheck: bool = key(
        False, "run a batch whose update was left out once more: the same bits speak for bad data, others for hardware"
    )


@dataclass(frozen=True)
class FaultsConfig:
    allow: bool = key(False, "faults on purpose, for tests; every other key here needs it")
    bad_batch: int | None = key(None, "number of the batch, from 1, whose loss is not finite")
    spike: float | None = key(None, "what multiplies that batch's loss instead")
    hang: tuple[int, int] | None = key(None, "[rank, step]: where the first attempt hangs")
    hang_in: Literal["data", "step", "save"] | None = key(None, "phase in which faults.hang hangs; unset: step")
    crash: tuple[int, int] | None = key(None, "[rank, step]: where the first attempt raises an error")
    slow: tuple[int, float] | None = key(None, "[rank, seconds]: who sleeps in every step, and how long")
    corrupt_save: int | None = key(None, "step whose checkpoint is damaged once it is committed, in the first attempt")
    full_disk: int | None = key(None, "step whose save finds the disk full, in the first attempt")


@dataclass(frozen=True)
class Config:
    run: RunConfig = key(RunConfig, "the run and its directory")
    model: ModelConfig = key(ModelConfig, "the decoder")
    data: DataConfig = key(DataConfig, "text, tokens and their order")
    train: TrainConfig = key(TrainConfig, "optimisation")
    engine: EngineConfig = key(EngineConfig, "parallelism and memory")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "saving")
    observe: ObserveConfig = key(ObserveConfig, "records and traces")
    evaluate: EvaluateConfig = key(EvaluateConfig, "validation")
    guards: GuardsConfig = key(GuardsConfig, "what is done about updates that would do harm")
    faults: FaultsConfig = key(FaultsConfig, "faults on purpose")
