"""The workflows run on every Python that the package names, and trust no moving tag."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}
STEPS = [
    step
    for workflow in WORKFLOWS.values()
    for job in workflow["jobs"].values()
    for step in job.get("steps", [])
]


def test_every_python_of_the_package_is_tested_whole() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    test = WORKFLOWS["ci"]["jobs"]["test"]
    assert test["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    assert "bash .ci/run" in [step.get("run") for step in test["steps"]]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_actions_are_pinned_and_nothing_may_write() -> None:
    for step in STEPS:
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}


def test_what_is_published_is_what_was_tested() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert jobs["checks"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["publish"]["needs"] == "checks"
    download, publish = jobs["publish"]["steps"]
    [upload] = (
        step for step in STEPS if step.get("with", {}).get("name") == "dist" and step != download
    )
    assert upload["with"]["path"] == download["with"]["path"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "with" not in publish  # no token: trusted publishing


def test_a_called_workflow_waits_for_no_run_that_waits_for_it() -> None:
    """`github.workflow` is the caller's name in a called one; names of groups have no case."""
    called, calling = (WORKFLOWS[name]["concurrency"]["group"] for name in ("ci", "release"))
    assert "github.workflow" not in called
    assert called.lower() != calling.lower()
