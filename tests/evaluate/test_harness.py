"""Runs as models of lm-evaluation-harness: rolling likelihoods, generation, any world size, and its own command."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.choices import TASK, write_items
from support.distributed import run_ranks
from support.programs import run

pytest.importorskip("lm_eval")


class Asked:
    """A request of the harness, as far as a model sees it."""

    def __init__(self, *args: Any):
        self.args = args


def texts() -> list[str]:
    draw = random.Random(0)
    words = ["ban", "der", "fi", "gosta", "huto", "ka", "lelim", "mir"]
    found = [" ".join(draw.choice(words) for _ in range(length)) for length in (1, 7, 60)]
    return [*found, found[1], ""]


def answers(rank: int, world_size: int, checkpoint: str) -> tuple[list[float], list[str]]:
    from lm_eval.api.registry import get_model

    import stablelm.evaluate.tasks.harness  # noqa: F401 - registers the model

    if world_size > 1:
        torch.distributed.destroy_process_group()  # the model joins one itself
    model: Any = get_model("stablelm").create_from_arg_string(f"checkpoint={checkpoint}", {"batch_size": 2})
    rolling = model.loglikelihood_rolling([Asked(text) for text in texts()])
    greedy = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    drawn = {"until": "ka", "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    asked = [Asked(text, options) for text in texts() for options in (greedy, drawn)]
    return rolling, model.generate_until(asked)


def test_rolling_likelihoods_are_those_of_each_token_alone(trained: Path):
    from stablelm.evaluate.trained_run import load_module, open_run

    opened = open_run(str(trained))
    module = load_module(opened)
    found, written = answers(0, 1, str(trained))
    for text, value in zip(texts(), found, strict=True):
        tokens = [opened.tokenizer.eos, *opened.tokenizer.encode(text)]
        total, done = 0.0, 1
        while done < len(tokens):  # windows of 32 targets; the last one has the rest and as much before it as fits
            end = min(len(tokens), done + 32)
            start = max(0, end - 33)
            with torch.no_grad():
                hidden = module(torch.tensor([tokens[start : end - 1]]))[0]
                logits = (hidden @ module.head_weight().T).double().log_softmax(-1)
            total += sum(float(logits[place - start - 1, tokens[place]]) for place in range(done, end))
            done = end
        assert value == pytest.approx(total, rel=1e-5)
    assert len(written) == 2 * len(texts())
    assert not any("." in text for text in written[::2])
    assert not any("ka" in text for text in written[1::2])
    assert written[2] == written[6]  # equal prompts, the likeliest tokens


@pytest.mark.slow
def test_two_processes_answer_as_one(trained: Path):
    one = answers(0, 1, str(trained))
    first, second = run_ranks(answers, 2, str(trained))
    assert first == second
    assert first[0] == pytest.approx(one[0], rel=1e-6)
    assert first[1] == one[1]


def test_generation_that_the_model_cannot_make_is_refused(trained: Path):
    from lm_eval.api.registry import get_model

    import stablelm.evaluate.tasks.harness  # noqa: F401
    from stablelm.errors import ConfigError

    model: Any = get_model("stablelm").create_from_arg_obj({"checkpoint": str(trained)})
    for options, words in (
        ({"max_gen_toks": 32}, "up to 32 tokens"),
        ({"max_gen_toks": 4, "num_beams": 2}, "num_beams"),
    ):
        with pytest.raises(ConfigError, match=words):
            model.generate_until([Asked("ban", options)])
    with pytest.raises(ConfigError, match="lacks the checkpoint"):
        get_model("stablelm").create_from_arg_string("")
    with pytest.raises(ConfigError, match="has checkpont"):
        get_model("stablelm").create_from_arg_obj({"checkpont": "x"})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_harness_s_own_command(processes: int, trained: Path, tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(
        TASK.format(name="words", path=write_items(tmp_path / "words.jsonl", 12))
    )
    asked = ("--model_args", f"checkpoint={trained}", "--tasks", "words", "--include_path", str(tmp_path / "tasks"))
    out = ("--output_path", str(tmp_path / "out.json"), "--batch_size", "4")
    cache = str(tmp_path / "cache")
    done = run("lm_harness", "run", "--model", "stablelm", *asked, *out, processes=processes, HF_DATASETS_CACHE=cache)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]["words"]
    own = ("--tasks", str(tmp_path / "words.jsonl"), "--out", str(tmp_path / "own.json"))
    done = run("eval", "--checkpoint", str(trained), *own)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "own.json").read_text())["tasks"]["words"]
    assert (found["acc,none"], found["acc_norm,none"]) == (told["acc"], told["acc_norm"])


@pytest.mark.slow
def test_a_mistake_in_its_arguments_is_one_sentence(tmp_path: Path):
    wrong = f"checkpoint={tmp_path}"
    done = run("lm_harness", "run", "--model", "stablelm", "--model_args", wrong, "--tasks", "arc_easy")
    assert done.returncode == 78
    assert f"error: {tmp_path} holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
