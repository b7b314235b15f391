"""A trained run as a model of lm-evaluation-harness (extra `eval`), sharded over the ranks of any engine.

Every rank runs the harness on all items, and the ranks share each request's work out among themselves: the figures are
the same in any world size to the last digit, which the harness's own division of items does not give, because it adds
them up in another order.
"""

import atexit
import difflib
import json
import logging
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from stablelm.engine.interface import Engine
from stablelm.engine.launch_environment import accelerate_flags, detect, engine_kind
from stablelm.engine.ranks import Ranks, disconnect
from stablelm.errors import ConfigError
from stablelm.evaluate import consent
from stablelm.evaluate.run_engine import load_engine
from stablelm.evaluate.tasks.choice_items import Request, before_a_document, encode_pair
from stablelm.evaluate.tasks.likelihood import Likelihood, Shapes, loglikelihoods
from stablelm.evaluate.trained_run import TrainedRun, open_run

NEW_TOKENS = 256
"""Longest generation of a task that gives no length, as the harness's own models have it."""
GENERATION = ("do_sample", "until", "max_gen_toks", "temperature", "top_k", "top_p", "repetition_penalty")
ARGUMENTS = ("checkpoint", "tokenizer", "config", "trust_checkpoint")


class StableLM(TemplateLM):
    """Scores and generates with a run's model; `rows`: sequences of a micro-batch, None for the run's own number.

    Built by the harness from `--model_args checkpoint=DIR[,tokenizer=FILE][,config=FILE][,trust_checkpoint=true]`.
    """

    def __init__(self, run: TrainedRun, engine: Engine, ranks: Ranks, rows: int | None = None):
        super().__init__()
        self.run, self.engine, self.ranks = run, engine, ranks
        self.shapes = Shapes.of(run.config, rows)
        self.batch_size, self._device = self.shapes.rows, engine.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "StableLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> "StableLM":
        """Loads the checkpoint on the ranks of this launch. Raises ConfigError and CheckpointError."""
        for name in arg_dict:
            if name not in ARGUMENTS:
                raise ConfigError(f"--model_args has {name}; give {', '.join(ARGUMENTS)}")
        if "checkpoint" not in arg_dict:
            raise ConfigError("--model_args lacks the checkpoint; give checkpoint=RUN_OR_STEP_DIR")
        own = arg_dict.get("config")
        launch = detect()
        run = open_run(
            str(arg_dict["checkpoint"]),
            tokenizer=arg_dict.get("tokenizer"),
            own=consent.own_configuration([str(own)] if own else []),
            trusted=arg_dict.get("trust_checkpoint") is True,
            first_rank=launch.rank == 0,
        )
        engine, ranks, run = load_engine(run, launch, engine_kind("auto", accelerate_flags(), launch.world_size))
        atexit.register(disconnect, ranks)
        return cls(run, engine, ranks, _rows((additional_config or {}).get("batch_size")))

    @property
    def max_length(self) -> int:
        return self.shapes.longest

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return before_a_document(self.run.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.run.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of the text alone, without those that begin and end a document."""
        return self.run.tokenizer.encode(string)

    def tok_decode(self, tokens: list[int]) -> str:
        return self.run.tokenizer.decode(tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Each request's arguments are (context, continuation)."""
        pairs = [request.args for request in requests]
        found = self._scored([encode_pair(self.run.tokenizer, *pair) for pair in pairs])
        answers = [(score.log_probability, score.greedy) for score in found]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._scored([Request(tuple(context), tuple(rest)) for _, context, rest in requests])
        return [(score.log_probability, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, from as much before it as the model takes."""
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            own = [Request(*map(tuple, make_disjoint_window(part))) for part in parts]
            windows += own
            counts.append(len(own))
        scores = iter(self._scored(windows))
        totals = [sum(next(scores).log_probability for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _scored(self, requests: list[Request]) -> list[Likelihood]:
        return loglikelihoods(self.engine, self.ranks, requests, self.shapes)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each request's arguments are (context, options), `until` among these; the text before it is the answer."""
        asked: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]  # type: ignore[misc]
        answers = [""] * len(asked)
        groups: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(asked):
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(index)
        for indices in groups.values():
            texts = self._continued([asked[index][0] for index in indices], asked[indices[0]][1])
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", asked[index], text)
        return answers

    def _continued(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        """What the model writes after each context; of one that is too long its end counts. Collective."""
        from stablelm.evaluate.tasks.harness_generation import generated

        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
        if unknown := sorted(set(options) - set(GENERATION)):
            raise ConfigError(f"a task generates with {', '.join(unknown)}; we know {', '.join(GENERATION)}")
        until = [end for end in options.get("until") or [] if end]
        new = int(options["max_gen_toks"])
        if new >= self.max_length:
            raise ConfigError(
                f"a task generates up to {new} tokens, but the model takes {self.max_length} (model.max_seq_len); "
                "give stablelm lm-harness a smaller one by --gen_kwargs max_gen_toks=N"
            )
        begin = [self.prefix_token_id] if self.run.tokenizer.add_bos else []
        room = self.max_length - new
        tokens = [[*begin, *self.tok_encode(text)][-room:] or [self.prefix_token_id] for text in contexts]
        sampling = {
            name: options[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty") if name in options
        }
        texts = generated(
            self.run, self.engine, self.ranks, tokens, rows=self.shapes.rows, new=new, stop=until, **sampling
        )
        return [postprocess_generated_text(text, until, None) for text in texts]

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        raise ConfigError("--apply_chat_template: a pretrained model has no chat template; leave it out")


register_model("stablelm")(StableLM)


def _rows(batch_size: Any) -> int | None:
    """lm-eval's --batch_size, a number or auto."""
    text = str(batch_size) if batch_size is not None else ""
    return int(text) if text.isdecimal() and int(text) > 0 else None


def load_tasks(names: list[str], folder: str | None) -> list[Any]:
    """The tasks and groups of lm-evaluation-harness by name or yaml file, their data sets loaded.

    `folder`: where definitions lie besides the harness's own. Raises ConfigError for a name that is unknown, a
    definition or a data set that cannot be loaded, and a task that would run code which the model writes.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    found = []
    manager = _manager(names, folder)
    for name in names:
        if not _is_file(name) and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise ConfigError(
                f"--tasks {name} is neither a task of lm-evaluation-harness nor a .jsonl file"
                f"{f', did you mean {near[0]}?' if near else ''}; for tasks of your own give --task-path FOLDER"
            )
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # of the data set's library, of a definition: anything
            raise ConfigError(f"--tasks {name} cannot be loaded ({_first_line(error)})") from None
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"--tasks {name} runs code that the model writes; use stablelm lm-harness with "
                    "--confirm_run_unsafe_code"
                )
        found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return found


def _manager(names: list[str], folder: str | None) -> TaskManager:
    """The harness's own definitions are thousands of files: they are read only where a name needs them."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    if all(_is_file(name) or name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=folder)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def run_tasks(model: StableLM, tasks: list[Any], *, limit: int | None, few_shot: int | None) -> dict[str, Any]:
    """Figures of each task and group by name, on rank 0; {} on the others. Collective."""
    found: Any = simple_evaluate(
        model,
        tasks=tasks,
        limit=limit,
        num_fewshot=few_shot,
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
    )
    if found is None or not model.ranks.is_first:
        return {}
    counts = found["n-samples"]
    return {
        name: _figures(metrics) | {"n": sum(counts[one]["effective"] for one in _members(name, found))}
        for name, metrics in found["results"].items()
    }


def _members(name: str, found: Any) -> list[str]:
    """The tasks of a group, at any depth; of a task itself."""
    if name in found["n-samples"]:
        return [name]
    return [task for inner in found["group_subtasks"].get(name, []) for task in _members(inner, found)]


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """The harness's `acc,none` and `acc_stderr,none` as `acc` and `stderr`; other filters stay part of the name."""
    figures: dict[str, Any] = {}
    for key, value in metrics.items():
        name, _, kind = key.partition(",")
        if not kind or isinstance(value, str):
            if value != "N/A" or not kind:
                continue
            value = None
        name = "stderr" if name == "acc_stderr" else name
        figures[name if kind == "none" else f"{name},{kind}"] = value
    return figures
