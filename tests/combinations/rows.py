"""What a user can combine, and a pairwise covering array of it: few rows in which every possible pair occurs.

A value is a tuple of `key=value` arguments. A row's method is one of its mechanism's, which take turns: pairs are
covered by mechanism. A row's run starts under one engine and is resumed under another, so both command lines must be
legal; a pair of values that no legal row holds is refused by the rules, with a reason.
"""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from support.pairwise import Case, Cover, Pair, cover, pairs_of

from stablelm.config import rules
from stablelm.config.load import load
from stablelm.errors import ConfigError

SEED = 11
TASK = "words"
FAST, EAGER, CHECKED = 2, 6, 8
"""The first rows: those of `make test`, those that compile nothing, and those of the whole test suite."""
STEPS, KILLED_AT = 6, 3
BATCH = 24  # sequences: two micro-batches of 3 on each of four processes
ENGINES = {
    "single x1": ("single", 1),
    "ddp x2": ("ddp", 2),
    "ddp x4": ("ddp", 4),
    "fsdp2 x2": ("fsdp2", 2),
    "fsdp2 x4": ("fsdp2", 4),
    "hsdp x4": ("hsdp", 4),
    "zero1 x2": ("zero1", 2),
    "zero1 x4": ("zero1", 4),
    "zero2 x2": ("zero2", 2),
    "zero3 x2": ("zero3", 2),
    "zero3 x4": ("zero3", 4),
}
# Methods that are alike in what an engine has to shard, gather, recompute and save.
MECHANISMS: dict[str, tuple[str, ...]] = {
    "plain": (
        *("pre_ln", "gpt2", "post_ln", "peri_ln", "magneto", "tfixup", "layernorm_scaling", "completep", "mlra"),
        "dyt",
    ),
    "placed": ("keel", "mix_ln", "normformer", "resi_dual", "scaled_embed", "embed_ln"),
    "scaled": ("deepscalelm_pre", "deepscalelm_post", "deepnorm", "rezero", "layerscale", "skipinit", "admin"),
    "concat": ("catformer",),
    "dense": ("denseformer",),
    "sigma": ("sigma_reparam", "sigma_reparam_nonorm", "deepscalelm_sigma", "magneto_sigma", "catformer_sigma"),
    "planned": ("e_spa", "u_spa", "value_skipinit", "e_spa_skips"),
    "streams": ("hyper_connections", "mhc"),
    "gated stream": ("gtrxl",),
    "depth attention": ("attention_residuals",),
    "mudd": ("muddformer",),
    "ngpt": ("ngpt",),
    "gains": ("wesar",),
    "attention": ("gated_attention", "softmax_one", "attention_sink", "clipped_softmax", "qk_norm", "value_residual"),
    "shaped": ("shaped_attention", "sas", "sas_p"),
    "looped": ("looped",),
    "dropped layers": ("layer_drop", "stochastic_depth"),
}
OPTIONS = {"sigma_reparam": ("model.sigma.targets=all",)}
# Those that exclude one another come first.
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "offload": {kind: (f"engine.offload={kind}",) for kind in ("none", "optimizer", "parameters")},
    "compile": {"no": (), "yes": ("train.compile=true",)},
    "precision": {kind: (f"train.precision={kind}",) for kind in ("fp32", "bf16")},
    "mechanism": dict.fromkeys(MECHANISMS, ()),
    "optimizer": {
        **{name: (f"train.optimizer={name}",) for name in ("adamw", "muon", "sophia", "sam", "looksam")},
        **{name: (f"train.optimizer={name}",) for name in ("stable_adamw", "lion")},
        "schedule_free": ("train.optimizer=schedule_free", "train.schedule=constant"),
    },
    "average": {"none": (), "ema": ("train.ema=0.9", "evaluate.average=ema")},
    "document_mask": {"no": (), "yes": ("data.document_mask=true",)},
    "source": dict.fromkeys(("files", "shards", "datasets", "mixture"), ()),
    "tokenizer": dict.fromkeys(("sentencepiece", "bpe-bytes"), ()),
    "packing": {kind: (f"data.packing={kind}",) for kind in ("split", "best_fit")},
    "workers": {
        "none": ("data.workers=0",),
        "thread": ("data.workers=1",),
        "process": ("data.workers=1", "data.worker_kind=process"),
    },
    "head": {"own": ("model.tie_embeddings=false",), "tied": ("model.tie_embeddings=true",)},
    "evaluate": {"at the end": ("evaluate.every=0",), "at the save": (f"evaluate.every={KILLED_AT}",)},
    "tasks": dict.fromkeys(("none", "choices"), ()),
    "samples": {"none": (), "yes": ("evaluate.samples=[ban, dero mi]", "evaluate.sample_tokens=4")},
    "best": {"none": (), "loss": ("evaluate.best=val_loss/default",)},
    "layers": {"never": (), "at the save": (f"observe.layers_every={KILLED_AT}",)},
    "save": {"in the step": ("checkpoint.async=false",), "background": ("checkpoint.async=true",)},
    "accumulation": {"no": (), "yes": ("train.micro_batch_size=3",)},
    # Sizes change before the kill and after it.
    "batch": {"fixed": (), "ramp": (f"train.global_batch_size={{0: {BATCH // 2}, 2: {BATCH}, 5: {BATCH // 2}}}",)},
    "rate": dict.fromkeys(("kept", "changed"), ()),
    "recompute": {
        "none": (),
        **{mode: (f"engine.recompute={mode}",) for mode in ("full", "selective", "attention", "every:2", "auto")},
    },
    "moments": {kind: (f"train.moments={kind}",) for kind in ("fp32", "bf16")},
    "update": {"step": (), "backward": ("engine.optimizer_in_backward=true", "train.grad_clip=0")},
    "dropout": {"no": (), "yes": ("model.dropout=0.1",)},
    "guards": {
        "none": (),
        "skip": ("guards.spike=skip", "guards.window=2", "guards.threshold=1000"),
        "rewind": ("guards.spike=rewind", "guards.window=2", "guards.threshold=1000"),
        "recheck": ("guards.recheck=true", "faults.allow=true", "faults.bad_batch=2"),
    },
}
AXES: dict[str, tuple[str, ...]] = {
    "engine": tuple(ENGINES),
    "resume": tuple(ENGINES),
    **{axis: tuple(values) for axis, values in SETTINGS.items()},
}
CHANGED = ("train.lr=1e-4", "run.allow=[train.lr]")
"""What the steps after the kill have besides, where the rate changes."""
COMMON = (
    *("model.n_layers=3", "model.d_model=32", "model.n_heads=2", "data.seq_len=32", "data.lanes=24"),
    *(f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", "train.lr=3e-4", "train.warmup_steps=100"),
    *("observe.every=1", "evaluate.batches=1", "engine.unit_bytes=20000"),
    *(f"checkpoint.every={KILLED_AT}", "checkpoint.keep=9"),
)
CHOSEN = (*SETTINGS, "method")
NEUTRAL = {axis: values[0] for axis, values in AXES.items()}


class Sources(NamedTuple):
    """The same small corpus in each form and with each tokenizer, and a task of multiple choice, as arguments."""

    texts: Mapping[tuple[str, str], tuple[str, ...]]
    task: str


def arguments(case: Mapping, engine: str, sources: Sources, *, later: bool = False) -> list[str]:
    """The command line of a row under one of its engines, `later` that from the kill on."""
    method = case.get("method", MECHANISMS[case["mechanism"]][0])
    chosen = [item for axis, values in SETTINGS.items() for item in values[case[axis]]]
    task = [f"evaluate.tasks={{{TASK}: {sources.task}}}"] if case["tasks"] == "choices" else []
    text = sources.texts[case["source"], case["tokenizer"]]
    changed = CHANGED if later and case["rate"] == "changed" else ()
    named = (f"model.method={method}", *OPTIONS.get(method, ()))
    return [*COMMON, *text, *named, *chosen, *task, *changed, f"engine.kind={ENGINES[engine][0]}"]


def refusal(case: Mapping) -> str:
    """What the rules say of a row's two command lines; '' if both are legal. Axes left out are as plain as can be."""
    whole = NEUTRAL | dict(case)
    whole.setdefault("method", MECHANISMS[str(whole["mechanism"])][0])
    if "engine" not in case and "resume" in case:
        whole["engine"] = case["resume"]
    if "resume" not in case:
        whole["resume"] = whole["engine"]
    if "engine" not in case and "resume" not in case:
        return _first_legal(tuple(whole[axis] for axis in CHOSEN))
    chosen = tuple(whole[axis] for axis in CHOSEN)
    words = _refusal(chosen, whole["engine"]) or _refusal(chosen, whole["resume"])
    if not words and whole["dropout"] == "yes" and whole["engine"] != whole["resume"]:
        return "dropout is seeded by rank: only the same engine and size draw the same masks"
    return words


def _first_legal(chosen: tuple[str, ...]) -> str:
    """'' if any engine takes the settings, else what the first one says."""
    return _refusal(chosen, next(iter(ENGINES))) if all(_refusal(chosen, engine) for engine in ENGINES) else ""


@lru_cache(None)
def _refusal(chosen: tuple[str, ...], engine: str) -> str:
    texts = {(source, kind): FORMS[source] for source in SETTINGS["source"] for kind in SETTINGS["tokenizer"]}
    nowhere = Sources(texts, "a.jsonl")
    line = arguments(dict(zip(CHOSEN, chosen, strict=True)), engine, nowhere)
    try:
        loaded = load([], line)
        rules.check(loaded.config, ENGINES[engine][1], None, loaded.origins)
    except ConfigError as error:
        return str(error)
    return ""


# Arguments of the same forms whose files do not exist: rules look at none.
FORMS = {
    "files": ("data.path=a.json.gz", "data.validation_path=v.json.gz"),
    "shards": ("data.source=shards", "data.path=a", "data.validation_path=v.json.gz"),
    "datasets": ("data.source=datasets", "data.path=a", "data.validation_path=v"),
    "mixture": (
        "data.mixture={a: {path: a.json.gz, weight: 0.7}, b: {path: b.json.gz, weight: 0.3}}",
        "data.validation_path=v.json.gz",
    ),
}


@lru_cache(1)
def array() -> Cover:
    """The covering array, the same in every process. Each case has a `method` besides, of its `mechanism`."""
    found = cover(AXES, lambda case: bool(refusal(case)), SEED)
    return found._replace(cases=_with_methods(found.cases))


def _with_methods(cases: list[Case]) -> list[Case]:
    """Gives each row the method that has fewest rows so far, of those that the rules allow there."""
    uses: Counter[str] = Counter()
    complete = []
    for case in cases:
        candidates = MECHANISMS[str(case["mechanism"])]
        legal = [name for name in candidates if not refusal(case | {"method": name})]
        method = min(legal, key=lambda name: uses[name])
        uses[method] += 1
        complete.append(case | {"method": method})
    return complete


def in_order() -> list[Case]:
    """All rows; any first few of them hold as many pairs as they can. The `EAGER` first ones compile nothing."""
    left = list(array().cases)
    seen: set[Pair] = set()
    ordered: list[Case] = []
    while left:
        eligible = [case for case in left if case["compile"] == "no"] if len(ordered) < EAGER else left
        best = max(eligible, key=lambda case: len(pairs_of(case) - seen))
        left.remove(best)
        seen |= pairs_of(best)
        ordered.append(best)
    return ordered


def named(case: Case) -> str:
    """A row in one line: what is not plain."""
    special = [f"{axis} {case[axis]}" for axis in SETTINGS if case[axis] != NEUTRAL[axis] and axis != "mechanism"]
    return f"{case['engine']} -> {case['resume']}: {', '.join([str(case['method']), *special])}"
