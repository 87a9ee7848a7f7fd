"""The shipped data set: what its README says of it, and that no package leaks."""

import re
from importlib.resources import files

import numpy as np
import pytest

from fedp2eft.data.debian import LABELS, LANGUAGES, load_debian, read_descriptions
from fedp2eft.data.describe import describe
from fedp2eft.errors import UserError


def members(federation):
    return {c.name: (c.train.tolist(), c.test.tolist()) for c in federation.clients}


@pytest.fixture(scope="module")
def federation():
    return load_debian(new_languages=("ko", "zh_CN"), clients_per_language=4)


def test_counts_are_those_of_the_readme():
    text = (files("fedp2eft.data") / "assets" / "README.md").read_text(encoding="utf-8")
    counts = {
        language: [int(n) for n in numbers]
        for language, *numbers in re.findall(
            r"^\| (\w+) \| (\d+) \| (\d+) / (\d+) \| (\d+) / (\d+) \|$", text, re.MULTILINE
        )
    }
    assert tuple(counts) == LANGUAGES
    rows = {
        (row["language"], row["pool"]): (row["train"], row["test"])
        for row in describe(load_debian(clients_per_language=1))
    }
    for language, (total, *parts) in counts.items():
        assert [*rows[language, "seen"], *rows[language, "unseen"]] == parts
        assert sum(parts) == total
    assert sum(total for total, *_ in counts.values()) == len(read_descriptions()) == 22127


def test_licence_note_names_its_authors():
    text = (files("fedp2eft.data") / "assets" / "README.md").read_text(encoding="utf-8")
    assert "Debian Description Translation Project" in text
    assert "free licence" in text


def test_no_package_crosses_train_and_test_or_the_pools(federation):
    table = federation.table
    source = np.asarray(table["source"][:])
    used = {(pool, part): set() for pool in ("seen", "other") for part in ("train", "test")}
    for client in federation.clients:
        pool = "seen" if client.pool == "seen" else "other"
        used[pool, "train"] |= set(source[client.train])
        used[pool, "test"] |= set(source[client.test])
    groups = list(used.values())
    assert all(groups)
    for number, group in enumerate(groups):
        for other in groups[number + 1 :]:
            assert not group & other


def test_every_row_has_one_owner_and_the_owner_its_language(federation):
    language = np.asarray(federation.table["language"][:])
    owned = np.concatenate([part for c in federation.clients for part in (c.train, c.test)])
    assert len(np.unique(owned)) == len(owned)
    for client in federation.clients:
        assert set(language[client.train]) == set(language[client.test]) == {client.language}


def test_pools_and_names(federation):
    assert len(federation.clients) == 14 * 2 * 4 + 2 * 4
    assert {c.language for c in federation.pool("new-language")} == {"ko", "zh_CN"}
    assert not {c.language for c in federation.pool("seen")} & {"ko", "zh_CN"}
    assert {c.language for c in federation.pool("seen")} == {
        c.language for c in federation.pool("unseen")
    }
    names = [c.name for c in federation.clients]
    assert names == sorted(names)
    assert {"fr-seen-00", "pt_BR-unseen-03", "ko-new-language-00"} <= set(names)
    for language, pool in {(c.language, c.pool) for c in federation.clients}:
        mine = [c for c in federation.clients if (c.language, c.pool) == (language, pool)]
        assert len({(len(c.train), len(c.test)) for c in mine}) == 1


def test_another_language_changes_no_other_client(federation):
    few = members(load_debian(languages=("fr", "cs"), clients_per_language=4))
    all_of_them = members(federation)
    assert all(all_of_them[name] == rows for name, rows in few.items())
    fewer = members(load_debian(languages=("fr",), new_languages=("ko",), clients_per_language=4))
    assert set(fewer) == {
        f"{pool}-0{n}" for pool in ("fr-seen", "fr-unseen", "ko-new-language") for n in range(4)
    }
    assert all(all_of_them[name] == rows for name, rows in fewer.items())


def test_seed_decides_the_split():
    one, same, other = (members(load_debian(languages=("fr",), seed=seed)) for seed in (3, 3, 4))
    assert one == same
    assert all(one[name] != other[name] for name in one)


def test_limits():
    federation = load_debian(languages=("fr", "de"), max_train=80, max_test=20)
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(80, 20)}


def test_columns_rows_and_labels(federation):
    client = federation.clients[0]
    rows = federation.rows(client.train)
    assert all(isinstance(text, str) and text for text in rows["text"] + rows["summary"])
    assert len(rows["text"]) == len(client.train)
    assert federation.text_columns == ("text",)
    assert federation.target_column == "summary"
    assert federation.labels == LABELS == tuple(sorted(set(federation.table["label"][:])))
    ids = federation.label_ids(client.train)
    assert ids.dtype == np.int64
    assert [LABELS[i] for i in ids] == rows["label"]
    assert federation.label_ids([]).shape == (0,)
    backwards = client.train[::-1]
    assert federation.rows(backwards)["text"] == rows["text"][::-1]


def test_600_clients_are_light():
    federation = load_debian(clients_per_language=19)
    assert len(federation.clients) == 608
    size = sum(c.train.nbytes + c.test.nbytes for c in federation.clients)
    assert size / 608 < 1000
    assert all(c.train.base is None or c.train.base.nbytes < 2000 for c in federation.clients)
    assert federation.table is load_debian(languages=("fr",)).table


def test_new_languages_are_drawn_by_the_seed():
    def new(seed: int) -> set[str]:
        federation = load_debian(
            languages=("fr", "de"), new_languages=("ko", "random 4"), seed=seed,
            clients_per_language=1,
        )  # fmt: skip
        return {c.language for c in federation.clients if c.pool == "new-language"}

    drawn = [new(seed) for seed in range(3)]
    assert all(len(each) == 5 and "ko" in each and not each & {"fr", "de"} for each in drawn)
    assert len(set(map(frozenset, drawn))) > 1
    assert new(0) == drawn[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": ("pt_Br",)}, "'pt_Br' is not in debian-descriptions. Did you mean 'pt_BR'?"),
        ({"new_languages": ("xx",)}, "It has cs, da, de, en"),
        ({"new_languages": ("random 99",)}, "draws 99 languages, and debian-descriptions has 16"),
        ({"languages": ("fr",), "new_languages": ("fr",)}, "'fr' is in `languages` and"),
        ({"clients_per_language": 60}, "zh_CN, seen pool: 57 test rows cannot be split over 60"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_debian(**arguments)
