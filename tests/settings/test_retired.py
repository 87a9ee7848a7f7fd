"""Keys of earlier versions: accepted where they can only mean what is done now."""

from __future__ import annotations

import pytest

from fedp2eft.errors import UserError
from fedp2eft.methods import method_named
from fedp2eft.settings.reading import read_settings, settings_from


def test_the_value_that_is_left_is_accepted() -> None:
    old = {"local": {"prior": "gamma", "alpha": 0.002, "lr": 0.5}}
    assert settings_from(old) == settings_from({"local": {"lr": 0.5}})


def test_the_value_that_is_gone_names_the_last_version_that_had_it(tmp_path) -> None:
    words = r"local\.prior: normalized was removed; fedp2eft 0\.1\.0 was the last version"
    with pytest.raises(UserError, match=words):
        settings_from({"local": {"prior": "normalized"}})
    (tmp_path / "settings.yaml").write_text("local: {prior: normalized}")
    with pytest.raises(UserError, match=words):
        read_settings(tmp_path / "settings.yaml")
    with pytest.raises(UserError, match=r"fedp2eft-normalized was removed; fedp2eft 0\.1\.0"):
        method_named("fedp2eft-normalized")


def test_alpha_alone_was_never_one_of_the_paper() -> None:
    with pytest.raises(UserError, match=r"Unknown setting 'local\.alpha'"):
        settings_from({"local": {"alpha": 1.0}})
