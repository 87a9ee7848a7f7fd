"""Names of a method at a budget, and the files of surveys that bear them."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.surveys import read_survey, write_survey

NAMES = {
    "lora-r2": AtBudget("lora", 2),
    "fedp2eft+prior-p16": AtBudget("fedp2eft+prior", 16, "parameters"),
    "lora-r2-r4": AtBudget("lora-r2", 4),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert str(NAMES[name]) == name
    assert AtBudget.parse(name) == NAMES[name]


def test_a_method_without_a_budget_has_one_name_under_both() -> None:
    assert str(AtBudget("base", 0, "parameters")) == "base-r0"


@pytest.mark.parametrize("name", ["lora", "-r2", "lora-r", "lora-rx", "lora-q2", "lora-r2.json"])
def test_other_names_are_none(name: str) -> None:
    assert AtBudget.parse(name) is None


def test_a_survey_is_read_for_the_parameters_that_it_was_taken_with(tmp_path: Path) -> None:
    at = AtBudget("auto", 2)
    assert read_survey(tmp_path, at) is None
    write_survey(tmp_path, at, "abc", {"best": 1.0})
    assert read_survey(tmp_path, at, "abc") == read_survey(tmp_path, at) == {"best": 1.0}
    assert read_survey(tmp_path, at, "abd") is None
    assert read_survey(tmp_path, at, None) is None


def test_a_survey_of_an_earlier_version_loads(tmp_path: Path) -> None:
    (tmp_path / "surveys").mkdir()
    values = {"best": np.array(3.0, np.float32), "rows": np.float32([[0.1, 2.0]])}
    save_file(values, tmp_path / "surveys" / "lora-tuned-p2.safetensors")
    found = read_survey(tmp_path, AtBudget("lora-tuned", 2, "parameters"), "abc")
    assert found is not None
    assert found == {"best": 3.0, "rows": [[float(np.float32(0.1)), 2.0]]}
