"""Data sets of the hub, with `datasets.load_dataset` replaced: nothing is fetched."""

import datasets
import numpy as np
import pytest

from fedp2eft.data.hub import load_hub, load_hub_dataset
from fedp2eft.data.known import AFRISENTI, CONVERTED, XNLI, HubSource
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

CLASSES = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
PAIRS = HubSource("a/pairs", ("premise", "hypothesis"), pool_train=120, pool_test=40)


def pairs(path, config, split, revision):
    size = 400 if split == "train" else 100
    data = {
        "premise": [f"{config} {split} {n}" for n in range(size)],
        "hypothesis": [f"h {n}" for n in range(size)],
        "label": [n % 3 for n in range(size)],
        "other": [0] * size,
    }
    return datasets.Dataset.from_dict(data).cast_column("label", CLASSES)


@pytest.fixture
def hub(monkeypatch):
    def serve(answer):
        def load_dataset(path, name=None, *, split, revision=None):
            if isinstance(answer, Exception):
                raise answer
            return answer(path, name, split, revision)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return serve


def test_protocol(hub):
    hub(pairs)
    federation = load_hub(
        "pairs",
        PAIRS,
        DataSettings(languages=("fr", "de"), new_languages=("sw",), clients_per_language=4),
    )
    assert federation.labels == ("entailment", "neutral", "contradiction")
    assert federation.text_columns == ("premise", "hypothesis")
    assert len(federation.clients) == 2 * 2 * 4 + 4
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(30, 10)}
    sentences = {}
    for client in federation.clients:
        pool = "seen" if client.pool == "seen" else "other"
        for part in (client.train, client.test):
            for premise in federation.rows(part)["premise"]:
                language, split, number = premise.split()
                assert language == client.language
                assert split == ("train" if part is client.train else "test")
                sentences.setdefault((split, number), set()).add(pool)
    assert all(len(pools) == 1 for pools in sentences.values())
    row = federation.clients[0].train[0]
    number = int(federation.rows([row])["premise"][0].split()[-1])
    assert federation.label_ids([row]).tolist() == [number % 3]


def test_another_language_changes_no_other_client(hub):
    hub(pairs)

    def texts(*languages):
        federation = load_hub(
            "pairs", PAIRS, DataSettings(languages=languages, clients_per_language=4)
        )
        return {c.name: federation.rows(c.train)["premise"] for c in federation.clients}

    few, many = texts("fr"), texts("de", "fr")
    assert all(many[name] == rows for name, rows in few.items())


def test_without_classes(hub):
    hub(pairs)
    source = HubSource("a/pairs", ("premise",), label_column=None, target_column="hypothesis")
    federation = load_hub("pairs", source, DataSettings(languages=("fr",), clients_per_language=5))
    assert (federation.labels, federation.label_column) == ((), None)
    assert len(np.unique(np.concatenate([c.train for c in federation.clients]))) == 400


def test_an_unreachable_hub_is_one_line(hub):
    hub(ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"))
    with pytest.raises(UserError, match=r"The hub is not reachable for a/b \(fr\).*check the net"):
        load_hub_dataset("a/b", "fr")


def test_the_real_library_says_so_too():
    with pytest.raises(UserError, match=r"The hub is not reachable for facebook/xnli \(fr\)"):
        load_hub("xnli", XNLI, DataSettings(languages=("fr",)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Dataset scripts are no longer supported"), "revision refs/convert/parquet"),
        (ValueError("BuilderConfig 'xx' not found.\nAvailable: fr"), "BuilderConfig 'xx' not foun"),
        (
            datasets.exceptions.DatasetNotFoundError("no such"),
            r"split train, cannot be loaded \(no",
        ),
    ],
)
def test_what_the_hub_lacks(hub, error, message):
    hub(error)
    with pytest.raises(UserError, match=message) as caught:
        load_hub_dataset("a/b", "fr")
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(hub):
    hub(pairs)
    with pytest.raises(UserError, match=r"no column 'premises'. Did you mean 'premise'\? It has"):
        load_hub_dataset("a/b", columns=("premises",))


def test_a_row_without_text_is_named(hub):
    def broken(*arguments):
        table = pairs(*arguments).to_dict()
        table["premise"][7] = None
        return datasets.Dataset.from_dict(table)

    hub(broken)
    source = HubSource("a/pairs", ("premise",))
    with pytest.raises(UserError, match=r"pairs \(fr, train\), row 7: column 'premise' holds noth"):
        load_hub("pairs", source, DataSettings(languages=("fr",)))


def test_an_unknown_language_is_not_asked_for():
    with pytest.raises(UserError, match="'it' is not in xnli"):
        load_hub("xnli", XNLI, DataSettings(languages=("it",)))
    with pytest.raises(UserError, match="Name the languages of pairs to load"):
        load_hub("pairs", PAIRS, DataSettings())


def test_afrisenti_on_the_hub(hub):
    """Two languages have no train split: they can be new, and are never tried as others."""
    asked = {}

    def tweets(path, config, split, revision):
        assert (path, revision) == ("shmuhammad/AfriSenti-twitter-sentiment", CONVERTED)
        asked.setdefault(config, []).append(split)
        names = datasets.ClassLabel(names=["positive", "negative", "neutral"])
        rows = {"tweet": [f"{n % 3} {n}" for n in range(24)], "label": [n % 3 for n in range(24)]}
        return datasets.Dataset.from_dict(rows).cast_column("label", names)

    def load_dataset(path, *, data_dir, split, revision):
        return tweets(path, data_dir, split, revision)

    hub(tweets)
    datasets.load_dataset = load_dataset  # the fixture puts the real one back
    federation = load_hub(
        "afrisenti",
        AFRISENTI,
        DataSettings(languages=("hau",), new_languages=("tir",), clients_per_language=2),
    )
    assert asked == {"hau": ["train+validation", "test"], "tir": ["validation", "test"]}
    # the hub's ids are in another order than ours: classes go by name
    assert federation.labels == ("negative", "neutral", "positive")
    names = ("positive", "negative", "neutral")
    for tweet, label in zip(*federation.rows(range(24)).values(), strict=True):
        assert label == names[int(tweet.split()[0])]
    with pytest.raises(UserError, match="'orm' of afrisenti has no train split"):
        load_hub("afrisenti", AFRISENTI, DataSettings(languages=("orm",), clients_per_language=2))
    asked.clear()
    load_hub("afrisenti", AFRISENTI, DataSettings(clients_per_language=2))
    assert set(asked) == set(AFRISENTI.languages) - {"orm", "tir"}
