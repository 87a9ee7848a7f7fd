"""Everything that is parsed, as functions of bytes: only a `UserError` may come out.

`TARGETS[name]` takes bytes; `seeds(name)` gives whole inputs to start from. The short run is
`test_fuzz.py`, the long one `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import save_file

from fedp2eft.adapters.export import adapter_facts, load_adapter
from fedp2eft.data.clients import SEEN
from fedp2eft.data.files import clients_from_files
from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.admission import offer_of
from fedp2eft.federation.server.checkpoints import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fedp2eft.federation.server.evaluation import alike_answers, scores_of
from fedp2eft.federation.server.exchange import Member, _described
from fedp2eft.federation.server.labels import counts_in
from fedp2eft.federation.wire.compression import pack, unpack
from fedp2eft.federation.wire.messages import ABOUT, ARRAYS, EXAMPLES, METRICS
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.runtime.client_files import ClientFiles
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import AdapterSettings
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.settings.reading import read_settings, settings_of_folder
from turns import TRAIN_PSG

LIKE = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.tensor([1.5])}
ROWS = [{"text": f"der hund {i}", "label": "ab"[i % 2], "client": "c", "pool": "seen"}
        for i in range(4)]  # fmt: skip


@cache
def folder() -> Path:
    """A folder of this process for the files that are parsed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    LocalGrid(ClientApp(), [], {})  # an engine gives messages their sender
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ── what comes over the wire ────────────────────────────────────────────────────────────────────


def reply(content: RecordDict) -> Message:
    folder()
    return Message(content, 2, TRAIN_PSG)


def trained() -> dict[str, int | float]:
    """What a client tells of a round."""
    return {EXAMPLES: 3, **dict.fromkeys(PSG_PHASE.metrics, 0.1)}


def an_array(data: bytes) -> None:
    """The bytes of one array of φ, on every wire, as the server and a survey read them."""
    for wire in ("fp32", "bf16", "int8"):
        record = pack(LIKE, wire)  # type: ignore[arg-type]
        old = record["w"]
        record["w"] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=data)
        content = RecordDict({ARRAYS: record, METRICS: MetricRecord(trained())})
        for read in (
            lambda: unpack(record, LIKE, wire, "φ"),  # type: ignore[arg-type]  # noqa: B023
            lambda: offer_of("c", reply(content), LIKE, wire, PSG_PHASE.metrics),  # type: ignore[arg-type]  # noqa: B023
            lambda: alike_answers({"c": record}, "survey"),  # noqa: B023
        ):
            try:
                read()
            except UserError:
                continue


def labels(data: bytes) -> None:
    """The bytes of a client's label counts, as the server reads them."""
    record = pack({"labels": torch.ones(2)}, "fp32")
    old = record["labels"]
    record["labels"] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=data)
    member = Member(2, "c", "de", SEEN, 3)
    counts = counts_in(reply(RecordDict({ARRAYS: record})), member, 2, PrivacySettings())
    assert counts.shape == (2,)
    assert float(counts.min()) >= 0
    assert float(counts.sum()) <= 3.003


def metrics(data: bytes) -> None:
    """A metric record as Flower takes it off the wire."""
    try:
        record = MetricRecord.inflate(data)
    except Exception:  # Flower refuses it
        return
    content = RecordDict({METRICS: record, ARRAYS: pack(LIKE, "fp32")})
    for read in (
        lambda: scores_of(reply(content)),
        lambda: offer_of("c", reply(content), LIKE, "fp32", PSG_PHASE.metrics, "norm_bit"),
        lambda: offer_of("c", reply(content), LIKE, "fp32", PSG_PHASE.metrics),
    ):
        try:
            read()
        except UserError:
            continue


def about(data: bytes) -> None:
    """What a node says it is."""
    try:
        record = ConfigRecord.inflate(data)
    except Exception:  # Flower refuses it
        return
    member = _described(
        Member(2, "", "", "", 0),
        reply(RecordDict({ABOUT: record, METRICS: MetricRecord({EXAMPLES: 3})})),
    )
    assert "/" not in member.client
    assert member.client.isascii()


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@cache
def psg() -> Path:
    """A whole PSG folder."""
    names = tuple(f"layer.{i}" for i in range(2))
    config = PSGConfig(
        adapter=AdapterSettings(r_max=2), base_model="tiny", base_revision="1",
        linear_names=names, layer_names=names,
    )  # fmt: skip
    path = folder() / "whole-psg"
    PSG(config).save_pretrained(path)
    return path


def psg_config(data: bytes) -> None:
    file("psg/config.json", data)
    shutil.copy(psg() / "model.safetensors", folder() / "psg" / "model.safetensors")
    PSG.from_pretrained(folder() / "psg")


def psg_weights(data: bytes) -> None:
    file("psg/model.safetensors", data)
    shutil.copy(psg() / "config.json", folder() / "psg" / "config.json")
    PSG.from_pretrained(folder() / "psg")


def table(ending: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        clients_from_files(DataSettings(path=str(file(f"rows.{ending}", data))))

    return read


def packed_rows(data: bytes) -> None:
    """What a gzipped file unpacks to."""
    clients_from_files(
        DataSettings(path=str(file("packed.jsonl.gz", gzip.compress(data, compresslevel=0))))
    )


def settings(data: bytes) -> None:
    read_settings(file("settings.yaml", data))


def run_settings(data: bytes) -> None:
    settings_of_folder(file("settings.yaml", data).parent)


def checkpoint(data: bytes) -> None:
    """A damaged one is passed over."""
    file("checkpoints/psg-000001.safetensors", data)
    load_checkpoint(folder() / "checkpoints", "psg")


def kept_back(data: bytes) -> None:
    file("clients/c/kept-back-000001.safetensors", data)
    ClientFiles(folder() / "clients", "kept-back").before("c")


def facts(data: bytes) -> None:
    file("adapter/fedp2eft.json", data)
    adapter_facts(folder() / "adapter")


def adapter(data: bytes) -> None:
    path = file("adapter-weights/adapter_model.safetensors", data)
    file("adapter-weights/adapter_config.json", seeds("adapter-config")[0])
    load_adapter(path.parent)


def adapter_config(data: bytes) -> None:
    path = file("adapter-config/adapter_config.json", data)
    file("adapter-config/adapter_model.safetensors", seeds("adapter")[0])
    load_adapter(path.parent)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "array": an_array,
    "labels": labels,
    "metrics": metrics,
    "about": about,
    "psg-config": psg_config,
    "psg-weights": psg_weights,
    "rows.jsonl": table("jsonl"),
    "rows.csv": table("csv"),
    "rows.tsv": table("tsv"),
    "rows.json": table("json"),
    "rows.parquet": table("parquet"),
    "rows.jsonl.gz": table("jsonl.gz"),
    "packed-rows": packed_rows,
    "settings": settings,
    "run-settings": run_settings,
    "checkpoint": checkpoint,
    "kept-back": kept_back,
    "facts": facts,
    "adapter": adapter,
    "adapter-config": adapter_config,
}
SLOW = {"settings", "run-settings"}


def check(name: str, data: bytes) -> bool:
    """Parse; whether it was taken. Anything but a `UserError` of one line comes out."""
    try:
        TARGETS[name](data)
    except UserError as error:
        text = str(error)
        assert text
        assert "\n" not in text, text
        return False
    return True


@cache
def seeds(name: str) -> tuple[bytes, ...]:
    """Whole inputs of a target."""
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if name == "array":
        arrays = [pack(LIKE, wire)["w"].data for wire in ("fp32", "bf16", "int8")]  # type: ignore[arg-type]
        trap = Array(np.array([1.5, 2.5])).data
        return (*arrays, trap, trap.replace(b"<f8", b"|O "))
    if name == "labels":
        counts = np.array([2, 1], dtype=np.float32)
        return tuple(Array(value).data for value in (counts, -counts, 9 * counts, counts * np.nan))
    if name == "metrics":
        told = trained()
        scored = {EXAMPLES: 3, "correct": 2, "loss": 0.5, "parameters": 7, "seconds": 0.1}
        return tuple(MetricRecord(one).deflate() for one in (told, scored, told | {"norm_bit": 1}))
    if name == "about":
        who = {"client": "fr-seen-00", "language": "fr", "pool": "seen"}
        return (ConfigRecord(who).deflate(), ConfigRecord(who | {"client": "../x"}).deflate())
    if name in ("psg-config", "psg-weights"):
        part = {"psg-config": "config.json", "psg-weights": "model.safetensors"}[name]
        return ((psg() / part).read_bytes(),)
    if name in ("rows.jsonl", "packed-rows"):
        return (rows, json.dumps(ROWS).encode())
    if name == "rows.csv":
        return (b'text,label,client\nder hund,a,c\n"die\nkatze",b,c\n',)
    if name == "rows.tsv":
        return (b'text\tlabel\n"der ""hund"""\ta\n', b'text\tlabel\n""die\tb\nkatze\tb\n')
    if name == "rows.json":
        return (b'[{"text": "der hund", "label": "a"}, {"text": "die katze", "label": "b"}]',)
    if name == "rows.jsonl.gz":
        return (gzip.compress(rows),)
    if name == "rows.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder() / "seed.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return (path.read_bytes(),)
    if name in ("settings", "run-settings"):
        made = {"seed": 3, "data": {"dataset": "files", "path": "rows.jsonl"},
                "local": {"lr": 1e-3, "epochs": 1}, "evaluation": {"ranks": [1, 2]},
                "privacy": {"clipping": "fixed", "epsilon": 3.0}}  # fmt: skip
        return (yaml.safe_dump(made).encode(),)
    if name == "checkpoint":
        home = folder() / "seed-checkpoints"
        save_checkpoint(home, Checkpoint("psg", 1, LIKE, {"m_t/w": LIKE["w"].clone()}), 2)
        return (next(home.iterdir()).read_bytes(),)
    if name == "kept-back":
        path = folder() / "seed.safetensors"
        save_file(LIKE, path)
        return (path.read_bytes(),)
    if name == "facts":
        return (b'{"base": "tiny", "rank": 2, "task": "classification", "max_length": 12}',)
    if name == "adapter":
        path = folder() / "seed-adapter.safetensors"
        key = "base_model.model.layer.0.lora_"
        save_file({key + "A.weight": torch.ones(2, 3), key + "B.weight": torch.ones(4, 2)}, path)
        return (path.read_bytes(),)
    if name == "adapter-config":
        made = {"r": 2, "lora_alpha": 2, "peft_type": "LORA", "target_modules": ["layer.0"]}
        ranks = {"rank_pattern": {"layer.0": 1}, "alpha_pattern": {"layer.0": 1}}
        return (json.dumps(made).encode(), json.dumps(made | ranks).encode())
    raise KeyError(name)
