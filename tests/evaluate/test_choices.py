"""Multiple choice by likelihood: figures against an independent computation, in any world size, and refusals."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.letters import LetterTokenizer
from support.tiny import TinyCorpus

from stablelm.config import rules
from stablelm.config.load import load
from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.evaluate.tasks.choice_items import ChoiceTask, Request, encode_pair, read_task
from stablelm.evaluate.tasks.choices import evaluate_choices
from stablelm.evaluate.tasks.likelihood import Shapes, loglikelihoods
from stablelm.tokenizers import load_tokenizer

LONGEST = 32


def config(*extra: str, world_size: int = 1) -> Any:
    loaded = load([], [*SIZES, *extra], world_size=world_size)
    return rules.resolve(loaded.config, pieces=300, world_size=world_size, accelerate_precision=None)


SIZES = (
    "model.n_layers=2", "model.d_model=32", "model.n_heads=2", f"data.seq_len={LONGEST}", "data.lanes=12",
    "train.steps=1", "train.global_batch_size=12", "evaluate.micro_batch_size=4",
)  # fmt: skip


def engine_of(config: Any, kind: str, ranks: Ranks) -> Any:
    """With weights far from zero, so that choices differ."""
    engine = build_engine(config, kind, ranks, train=False)
    for name, tensor in engine.tensors(optimizer=False).items():
        if name.endswith("weight") and kind == "single" and tensor.dim() == 2:
            tensor.mul_(2)
    engine.loaded()
    return engine


def some_requests(seed: int = 0, count: int = 21) -> list[Request]:
    draw = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(300) for _ in range(draw.randint(1, most)))

    found = [Request(tokens(20), tokens(6)) for _ in range(count)]
    same = found[0]
    # Equal ones, ones that differ in their last token alone, and some that are too long.
    return [
        *found,
        same,
        Request(same.context, (*same.continuation[:-1], 7)),
        Request(tokens(20) * 40, tokens(6)),
        Request(tokens(9), tokens(9) * 40),
    ]


def expected(module: Any, request: Request) -> tuple[float, bool]:
    """From the whole matrix of logits of the sequence alone; where it is too long, token by token of its windows."""
    context, rest = request
    if len(rest) > LONGEST:
        half = LONGEST // 2
        cuts = [(context + rest[:at], rest[at : at + half]) for at in range(0, len(rest), half)]
        parts = [expected(module, Request(*cut)) for cut in cuts]
        return sum(value for value, _ in parts), all(greedy for _, greedy in parts)
    tokens = (context + rest)[-(LONGEST + 1) :]
    with torch.no_grad():
        hidden = module(torch.tensor([tokens[:-1]]))[0]
        logits = (hidden @ module.head_weight().T.to(hidden.dtype)).double().log_softmax(-1)
    last = logits[-len(rest) :]
    target = torch.tensor(rest)
    return float(last[torch.arange(len(target)), target].sum()), bool((last.argmax(-1) == target).all())


@pytest.mark.parametrize("method", ["pre_ln", "catformer", "sigma_reparam", "e_spa", "denseformer"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "fixed-widths"])
def test_scores_equal_those_of_each_sequence_alone(method: str, compiled: bool):
    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    resolved = config(f"model.method={method}", "train.precision=fp64")
    engine = engine_of(resolved, "single", ranks)
    shapes = Shapes(4, LONGEST, (LONGEST // 2, LONGEST) if compiled else ())
    requests = some_requests()
    found = loglikelihoods(engine, ranks, requests, shapes)
    assert not engine.module.training
    for request, score in zip(requests, found, strict=True):
        value, greedy = expected(engine.module, request)
        assert score.log_probability == pytest.approx(value, rel=1e-9)
        assert score.greedy is greedy


def test_a_greedy_continuation_is_recognised():
    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    engine = engine_of(config(), "single", ranks)
    tokens = [5, 9, 200]
    with torch.no_grad():
        for _ in range(3):
            hidden = engine.module(torch.tensor([tokens]))[0, -1]
            tokens.append(int((engine.module.head_weight() @ hidden).argmax()))
    context = tuple(tokens[:3])
    requests = [Request(context, tuple(tokens[3:])), Request(context, (*tokens[3:5], (tokens[5] + 1) % 300))]
    assert [score.greedy for score in loglikelihoods(engine, ranks, requests, Shapes.of(config()))] == [True, False]


def test_no_requests_and_a_stop_between_micro_batches():
    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    engine = engine_of(config(), "single", ranks)
    assert loglikelihoods(engine, ranks, [], Shapes.of(config())) == []
    engine.module.train()
    places = []

    def reached(place: str) -> None:
        places.append(place)
        if len(places) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(engine, ranks, some_requests(), Shapes.of(config()), reached)
    assert places == ["micro-batch 1 of 8", "micro-batch 2 of 8"]
    assert engine.module.training


def on_ranks(rank: int, world_size: int, kind: str, precision: str) -> list[Any]:
    import torch.distributed as dist

    groups = (dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
    ranks = Ranks(rank, world_size, torch.device("cpu"), *groups)  # type: ignore[arg-type]
    resolved = config(f"engine.kind={kind}", f"train.precision={precision}", world_size=world_size)
    return loglikelihoods(engine_of(resolved, kind, ranks), ranks, some_requests(count=9), Shapes.of(resolved))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_give_the_figures_of_one(kind: str):
    alone = Ranks(0, 1, torch.device("cpu"), None, None)
    one = loglikelihoods(
        build_engine(config(), "single", alone, train=False), alone, some_requests(count=9), Shapes.of(config())
    )
    first, second = run_ranks(on_ranks, 2, kind, "fp32")
    assert first == second == one


def test_context_and_continuation_are_cut_as_lm_eval_cuts_them(tiny_corpus: TinyCorpus):
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM

    tokenizer = load_tokenizer(tiny_corpus.tokenizer)

    class Theirs(TemplateLM):
        eot_token_id = tokenizer.eos  # type: ignore[assignment]

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs) -> Any:
            return requests

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return []

        def generate_until(self, requests, disable_tqdm=False):
            return []

    class One:
        def __init__(self, *args: str):
            self.args = args

    pairs = [
        ("", "ban der"),
        ("ban", " der"),
        ("ban  \n", " der"),
        ("bansta le", "mir go"),
        ("mir", "go"),
        ("ban der", "sta"),
    ]
    theirs: Any = Theirs().loglikelihood([One(*pair) for pair in pairs], disable_tqdm=True)  # type: ignore[list-item]
    for pair, (_, context, continuation) in zip(pairs, theirs, strict=True):
        assert encode_pair(tokenizer, *pair) == (tuple(context), tuple(continuation))


class Letters(LetterTokenizer):
    """A token for each letter, and one for the pair 'ab'."""

    def encode(self, text: str) -> list[int]:
        return [1 if piece == "\1" else ord(piece) for piece in text.replace("ab", "\1")]


def test_a_continuation_always_has_a_token():
    assert encode_pair(Letters(), "xa", "b") == ((ord("x"),), (1,))
    assert encode_pair(Letters(), "a", "b") == ((0,), (1,))
    assert encode_pair(Letters(), "  ", "b") == ((0,), (32, 32, ord("b")))


def test_a_context_begins_as_documents_do():
    class WithStart(Letters):
        bos, add_bos = 2, True

    assert encode_pair(WithStart(), "x", "b") == ((2, ord("x")), (ord("b"),))
    assert encode_pair(WithStart(), "", "b") == ((2,), (ord("b"),))
    assert encode_pair(WithStart(), "a", "b") == ((2,), (1,))


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


ITEM = {"query": "ab", "choices": ["c", "dd"], "gold": 1}


def test_accuracies_lengths_and_errors(tmp_path: Path):
    """Choices whose likelihood is known: the model prefers one token, so more of others cost more."""
    lines = [{"query": "q", "choices": ["a", "aaa"], "gold": gold} for gold in (0, 0, 0, 1)]
    task = read_task(write(tmp_path / "t.jsonl", *lines), Letters(), longest=LONGEST, key="--tasks")
    assert (task.lengths[0], task.gold, task.shortened) == ([1, 3], [0, 0, 0, 1], 0)

    class Uniform:
        module = torch.nn.Identity()
        device = torch.device("cpu")

        def scores(self, tokens, places, targets):
            from stablelm.model.loss import TokenScores

            space = targets == ord(" ")
            return TokenScores(torch.where(space, -3.0, -1.0), space)

    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    scores = evaluate_choices(Uniform(), ranks, task, Shapes(2, LONGEST))  # type: ignore[arg-type]
    # Of " a": -4 in all and -4 a character; of " aaa": -6 and -2.
    assert (scores.acc, scores.acc_norm, scores.n) == (0.75, 0.25, 4)
    assert scores.stderr == pytest.approx(math.sqrt(0.75 * 0.25 * 4 / 3) / 2)
    one = ChoiceTask(task.requests[:1], task.lengths[:1], task.gold[:1], 0)
    assert evaluate_choices(Uniform(), ranks, one, Shapes(2, LONGEST)).as_dict()["stderr"] is None  # type: ignore[arg-type]


def test_items_are_limited_and_blank_lines_skipped(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", ITEM, "", ITEM, "no JSON")
    assert len(read_task(path, Letters(), longest=LONGEST, items=2, key="--tasks").gold) == 2
    long = {"query": "q" * 50, "choices": ["c", "d"], "gold": 0}
    assert read_task(write(tmp_path / "l.jsonl", long), Letters(), longest=LONGEST, key="--tasks").shortened == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "dictionary"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 1', "not JSON"),
        ({"query": "q", "choices": ["a", "b"]}, "gold: Field required"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "choices"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "choices.1"),
        ({"query": "q", "choices": ["a", 3], "gold": 0}, "choices.1"),
        ({"query": None, "choices": ["a", "b"], "gold": 0}, "query"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold is 2, but there are 2 choices"),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "gold"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold"),
        ('"' + "x" * (1 << 20) + '"', "longer than 1 MiB"),
    ],
)
def test_a_wrong_line_is_named(line: Any, words: str, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", ITEM, line)
    with pytest.raises(ConfigError) as caught:
        read_task(path, Letters(), longest=LONGEST, key="--tasks t")
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--tasks t: {path}:2: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path):
    for path, words in [
        (str(tmp_path / "no.jsonl"), "does not exist"),
        (str(tmp_path), "cannot be read"),
        (write(tmp_path / "e.jsonl"), "holds no item"),
    ]:
        with pytest.raises(ConfigError, match=words):
            read_task(path, Letters(), longest=LONGEST, key="--tasks t")
