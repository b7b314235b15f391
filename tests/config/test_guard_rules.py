"""Rules of guards.*, faults.* and the time-outs: no fault strikes unless it is allowed by name."""

from dataclasses import fields

import pytest

from stablelm.config import rules
from stablelm.config.load import load
from stablelm.config.schema import Config, FaultsConfig
from stablelm.errors import ConfigError

FAULTS = {
    "bad_batch": "3",
    "spike": "50",
    "hang": "[1,5]",
    "hang_in": "save",
    "crash": "[1,5]",
    "slow": "[1,0.3]",
    "corrupt_save": "4",
    "full_disk": "4",
}


def resolve(*overrides: str) -> Config:
    loaded = load([], ["train.steps=10", *overrides])
    return rules.resolve(loaded.config, pieces=4000, world_size=2, accelerate_precision=None, origins=loaded.origins)


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(*overrides)
    return str(caught.value)


def asked(name: str) -> list[str]:
    needed = {"spike": ["faults.bad_batch=3"], "hang_in": ["faults.hang=[1,5]"]}.get(name, [])
    return [f"faults.{name}={FAULTS[name]}", *needed]


def test_all_faults_are_here():
    assert {*FAULTS, "allow"} == {field.name for field in fields(FaultsConfig)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_unless_allowed(name: str):
    told = problem(*asked(name))
    assert "would break the run on purpose; leave it out, or set faults.allow=true" in told
    assert f"faults.{name}" in told
    assert getattr(resolve(*asked(name), "faults.allow=true").faults, name) is not None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["faults.allow=true", "faults.hang=[2,5]"], "faults.hang=[2, 5] must name a rank from 0 to 1 first"),
        (["faults.allow=true", "faults.slow=[1,-1]"], "and no negative number"),
        (["faults.allow=true", "faults.hang_in=data"], "faults.hang_in needs a rank and a step; set faults.hang"),
        (["faults.allow=true", "faults.spike=50"], "faults.spike needs the number of a batch; set faults.bad_batch"),
        (
            ["faults.allow=true", "faults.full_disk=4", "checkpoint.dir=s3://bucket/run"],
            "faults.full_disk needs a local checkpoint.dir",
        ),
        (["guards.window=1"], "guards.window=1 must be at least 2"),
        (["guards.threshold=0"], "guards.threshold=0.0 must be above 0"),
        (["guards.skip_data=0"], "guards.skip_data=0 must be at least 1"),
        (["observe.hang_seconds=0"], "observe.hang_seconds=0.0 must be above 0"),
    ],
)
def test_a_broken_rule_has_its_sentence(overrides: list[str], words: str):
    assert words in problem(*overrides)
