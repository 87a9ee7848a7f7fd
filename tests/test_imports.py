"""What an import loads; that imports run one way is import-linter's to say (`make lint`)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("flwr", "ray", "torch", "transformers", "datasets", "jsonargparse")


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import fedp2eft", HEAVY),
        ("from fedp2eft import Settings, UserError; Settings()", HEAVY),
        ("from fedp2eft.settings import reading; reading.settings_from({})", HEAVY),
        ("from fedp2eft import personalize, evaluate, export, PSG, METHODS", ("flwr", "ray")),
        ("from fedp2eft import read_results, write_tables", ("flwr", "ray", "transformers")),
    ],
)
def test_an_import_loads_no_more_than_it_needs(code: str, without: tuple[str, ...]) -> None:
    asked = (
        f"import json, sys\n{code}\nprint(json.dumps([m for m in {without} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True)
    assert json.loads(done.stdout) == []
