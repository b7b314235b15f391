"""The files that describe the repository are valid and agree with each other."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import stablelm

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = {
    canonicalize_name(requirement.name): requirement.specifier
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
METADATA = PROJECT["project"]
REQUIREMENTS = [Requirement(text) for text in METADATA["dependencies"] + METADATA["optional-dependencies"]["dev"]]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
INPUTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(*names: str) -> dict:
    return yaml.safe_load(ROOT.joinpath(*names).read_text(encoding="utf-8"))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_direct_dependency_has_a_tested_version_in_its_range(requirement):
    (pin,) = CONSTRAINTS[canonicalize_name(requirement.name)]
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_the_supported_versions_are_as_declared():
    torch = next(requirement for requirement in REQUIREMENTS if requirement.name == "torch")
    assert torch.specifier == SpecifierSet(">=2.11,<2.15")
    supported = SpecifierSet(METADATA["requires-python"])
    listed = {text.rpartition(" ")[2] for text in METADATA["classifiers"] if ":: Python :: 3." in text}
    assert listed == {f"3.{minor}" for minor in range(9, 20) if f"3.{minor}.1" in supported}


def test_the_citation_has_the_fields_of_its_schema():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert set(citation) <= {
        "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
        "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
        "repository-code", "title", "type", "url", "version",
    }  # fmt: skip
    assert citation["cff-version"] == "1.2.0"
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert citation["license"] == METADATA["license"]
    assert str(citation["version"]) == stablelm.__version__
    assert f"## {stablelm.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_the_script_of_ci():
    workflow = read(".github", "workflows", "ci.yml")
    (job,) = workflow["jobs"].values()
    assert any(".ci/run" in step.get("run", "") for step in job["steps"])
    python = next(step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python@"))
    assert python["python-version"] == "3.11"
    assert python["cache"] == "pip"
    assert all((ROOT / name).is_file() for name in python["cache-dependency-path"].split())


def test_hooks_are_pinned_and_their_targets_exist():
    repositories = read(".pre-commit-config.yaml")["repos"]
    remote = {entry["repo"]: entry["rev"] for entry in repositories if entry["repo"] != "local"}
    assert all(Version(rev.removeprefix("v")).release for rev in remote.values())
    ruff = remote["https://github.com/astral-sh/ruff-pre-commit"]
    assert f"=={ruff.removeprefix('v')}" == str(CONSTRAINTS[canonicalize_name("ruff")])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in (hook for entry in repositories if entry["repo"] == "local" for hook in entry["hooks"]):
        program, target = hook["entry"].split()
        assert program == "make"
        assert f"\n{target}: " in makefile


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_an_issue_form_has_the_fields_of_its_schema(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.name == "config.yml":
        assert set(content) <= {"blank_issues_enabled", "contact_links"}
        return
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in content["body"]} <= INPUTS
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    assert all(field["attributes"]["options"] for field in fields if field["type"] in {"dropdown", "checkboxes"})


def test_the_package_is_marked_as_typed():
    assert (Path(stablelm.__file__).parent / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["stablelm"]
