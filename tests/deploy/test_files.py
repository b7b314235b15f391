"""Dockerfile, the Kubernetes job and the SkyPilot task: schemas, and what they must agree on with the program."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.programs import node, pretrain
from stablelm.supervise.requeue_policy import FINAL, REQUEUED

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
CLAIM, JOBSET = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
TASK = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text(encoding="utf-8"))
TERM = 128 + 15


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n", "", DOCKERFILE)
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def check_arguments(arguments: list[str]) -> dict[str, Any]:
    """What launch/node.py makes of the words: they name configurations and keys that exist."""
    options, rest = node.parse_arguments(arguments)
    node.check(options)
    asked = pretrain.parse_arguments(rest)
    load([str(REPOSITORY / file) for file in asked.config], asked.overrides)
    return {**vars(options), "keys": dict(key.split("=", 1) for key in asked.overrides)}


def test_the_image_has_the_tested_torch_and_an_ordinary_user():
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^torch==(\S+)$", constraints, re.MULTILINE)
    (base,) = instructions("FROM")
    assert base == f"pytorch/pytorch:{torch}-cuda${{CUDA}}-cudnn9-runtime"
    assert instructions("ENTRYPOINT") == ['["stablelm"]']
    (user,) = instructions("USER")
    assert user == str(POD["securityContext"]["runAsUser"]) == str(POD["securityContext"]["fsGroup"])
    assert f"useradd --uid {user} " in DOCKERFILE
    assert all("--constraint constraints.txt" in line for line in instructions("RUN") if "pip install" in line)


def test_what_the_image_copies_is_not_ignored():
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    sources = {word for line in instructions("COPY") for word in line.split()[:-1]} - {"."}
    assert sources <= kept and all(list(REPOSITORY.glob(name)) for name in kept)
    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {packaged["readme"], *packaged["license-files"], "stablelm"} <= kept


def test_the_requirements_are_those_of_the_project():
    command = [sys.executable, DEPLOY / "requirements.py", "s3", "gcs"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = {Requirement(line).name for line in done.stdout.splitlines()}
    assert {"torch", "deepspeed", "pydantic", "s3fs", "gcsfs"} <= names and "adlfs" not in names


def test_hadolint_has_nothing_to_say():
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed")
    subprocess.run([program, REPOSITORY / "Dockerfile"], check=True)


def test_the_kubernetes_objects_fit_their_schemas():
    validate = pytest.importorskip("kubernetes_validate").validate
    validate(CLAIM, "1.31", strict=True)
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": JOB}, "1.31", strict=True)


def test_kubernetes_starts_again_what_slurm_requeues():
    (rule,) = JOB["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "NotIn", "ranks")
    assert set(codes["values"]) == {*REQUEUED, TERM} and not set(codes["values"]) & {*FINAL, 0}
    # A job that fails for want of retries starts the set again, one that fails by the rule ends it.
    policy = JOBSET["spec"]["failurePolicy"]
    (final,) = policy["rules"]
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (JOB["backoffLimit"], POD["restartPolicy"]) == (0, "Never") and policy["maxRestarts"] > 0


def test_kubernetes_starts_a_node_on_every_pod():
    (container,) = POD["containers"]
    assert container["name"] == "ranks"
    command, *arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    found = check_arguments(arguments)
    assert command == "node"
    assert found["nodes"] == JOB["parallelism"] == JOB["completions"] and JOB["completionMode"] == "Indexed"
    name = JOBSET["metadata"]["name"]
    job = JOBSET["spec"]["replicatedJobs"][0]["name"]
    assert found["master"].startswith(f"{name}-{job}-0-0.{name}:")
    assert found["processes"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes[mounts["/runs"]]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert found["keys"]["run.dir"].startswith("/runs/") and CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_skypilot_starts_a_node_on_every_machine_and_recovers():
    assert set(TASK) == {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    assert set(TASK["resources"]["job_recovery"]["recover_on_exit_codes"]) < set(REQUEUED)
    values = {"NUM_NODES": "2", "NODE_RANK": "1", "NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_GPUS_PER_NODE": "8"}
    environ = {f"SKYPILOT_{name}": value for name, value in values.items()} | {"BUCKET": "b", "PATH": "/usr/bin:/bin"}
    echo = re.sub(r"^exec \S+ launch/node.py", "printf '%q '", TASK["run"])
    words = subprocess.run(["bash", "-euc", echo], env=environ, capture_output=True, text=True, check=True).stdout
    found = check_arguments(shlex.split(words))
    assert (found["nodes"], found["node_rank"], found["processes"]) == (2, 1, 8) and found["master"] == "10.0.0.1:29500"
    assert found["keys"]["checkpoint.dir"] == "s3://b/mine"
    assert "--constraint constraints.txt" in TASK["setup"]
