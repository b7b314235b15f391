"""accelerate's flags that are not used are named once, with what to use; its defaults and our own files name none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import TINY, environment, free_port, run
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.engine.launch_environment import unused_flags_warning

CONFIGS = sorted((REPOSITORY / "configs" / "accelerate").glob("*.yaml"))


def exported(tmp_path: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch` with these flags gives to a program."""
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, pathlib\n"
        f"if os.environ.get('RANK', '0') == '0': pathlib.Path({str(tmp_path / 'env.json')!r})"
        ".write_text(json.dumps(dict(os.environ)))\n"
    )
    start = [sys.executable, "-m", "accelerate.commands.launch", f"--main_process_port={free_port()}"]
    done = subprocess.run(
        [*start, *flags, str(script)], env=environment(), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "env.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_our_own_files_ask_for_nothing_else(config: Path, tmp_path: Path):
    assert unused_flags_warning(exported(tmp_path, "--config_file", str(config))) == ""


@pytest.mark.slow
def test_defaults_ask_for_nothing_and_flags_are_named(tmp_path: Path):
    one = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no")
    assert unused_flags_warning(exported(tmp_path, *one)) == ""
    assert unused_flags_warning(exported(tmp_path, *one, "--dynamo_backend=inductor")) == (
        "warning: of accelerate's settings --dynamo_backend (use train.compile=true) is not used"
    )
    fsdp = ("--use_fsdp", "--num_processes=2", "--num_machines=1", "--mixed_precision=no")
    assert unused_flags_warning(exported(tmp_path, *fsdp)) == ""
    asked = exported(
        tmp_path, *fsdp, "--fsdp_activation_checkpointing=true", "--fsdp_sharding_strategy=SHARD_GRAD_OP",
        "--fsdp_state_dict_type=FULL_STATE_DICT",
    )  # fmt: skip
    assert unused_flags_warning(asked) == (
        "warning: of accelerate's settings --fsdp_sharding_strategy (use engine.kind=zero2 or ddp without --use_fsdp), "
        "--fsdp_state_dict_type and --fsdp_activation_checkpointing (use engine.recompute=full) are not used"
    )


def test_sizes_of_a_mesh_without_fsdp_and_settings_of_a_deepspeed_file(tmp_path: Path):
    mesh = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
    assert "--parallelism_config_dp_replicate_size (use engine.kind=hsdp and engine.replicas)" in unused_flags_warning(
        mesh
    )
    assert unused_flags_warning({**mesh, "ACCELERATE_USE_FSDP": "true"}) == ""
    file = tmp_path / "zero.json"
    file.write_text(
        json.dumps({"optimizer": {"type": "Adam"}, "train_batch_size": "auto", "zero_optimization": {"stage": 2}})
    )
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    told = unused_flags_warning(deepspeed)
    assert "optimizer of deepspeed_config_file (use train.lr, betas, eps and weight_decay) is not used" in told
    assert "train_batch_size" not in told


def test_a_run_names_them_once(tiny_corpus: TinyCorpus, tmp_path: Path):
    arguments = [*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path}/run", "train.steps=1", "model.n_layers=1"]
    done = run("pretrain", *arguments, processes=2, ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("--dynamo_backend (use train.compile=true) is not used") == 1
