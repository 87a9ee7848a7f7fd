"""No byte that leaves a client is of its text, ξ, λ or adapter; what an error says of its data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedp2eft.client.side import ClientSide
from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.client.mods import send_errors
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.wire.messages import DESCRIBE, PERSONALIZE, to_arrays
from fedp2eft.runtime import phases, workspace
from tiny_run import World, vocabulary
from turns import TRAIN_BASE, TRAIN_FEDL2P, TRAIN_PSG
from watching import watched

BLOCK = 3  # numbers in a row that must not be found
CLIPPED = {"clipping": "fixed", "clip_on": "client", "test_seed": 1, "noise_multiplier": 0.01}


class Run:
    """What a run computed on its clients, and every byte of their replies."""

    def __init__(self, world: World, rows: Path, folder: Path, **changes: Any) -> None:
        self.secret: dict[str, list[Tensor]] = {"ξ": [], "λ": [], "adapter": []}
        features, train_round, fit = workspace.features, phases.train_round, ClientSide.fit

        def watch_features(*args: Any, **options: Any) -> Any:
            self.secret["ξ"].append(found := features(*args, **options))
            return found

        def watch_round(*args: Any, **options: Any) -> Any:
            found = train_round(*args, **options)
            self.secret["λ"].append(found.lam)
            return found

        def watch_fit(self_: Any, lam: Tensor, keep: Tensor, *args: Any, **options: Any) -> Any:
            found = fit(self_, lam, keep, *args, **options)
            self.secret["λ"].append(lam)
            for layer in found.weights.layers:
                self.secret["adapter"] += [layer.A, layer.B]
            return found

        # FedL2P's rounds are not private: refused where privacy is on.
        methods = [] if "privacy" in changes else ["fedl2p"]
        self.kinds = {DESCRIBE, TRAIN_BASE, TRAIN_PSG, PERSONALIZE}
        self.kinds |= {TRAIN_FEDL2P} if methods else set()
        settings = world.settings(
            data__path=str(rows), base__rounds=1, federation__rounds=1, evaluation__ranks=[2],
            evaluation__methods=[*methods, "base", "lora", "fedp2eft"],
            fedl2p={"rounds": 1, "rank": 2, "hidden": 6, "steps": 1}, **changes,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace, "features", watch_features)
            patch.setattr(phases, "train_round", watch_round)
            patch.setattr(ClientSide, "fit", watch_fit)
            self.messages = watched(settings, folder).messages

    def replies(self) -> dict[str, bytes]:
        """All bytes of the replies, by kind of message."""
        found: dict[str, bytes] = {}
        for message, reply in self.messages:
            kind = message.metadata.message_type
            assert not reply.has_error()
            for name, record in reply.content.items():
                found[kind] = found.get(kind, b"") + name.encode() + record.deflate()
            for record in reply.content.array_records.values():
                for name, array in record.items():
                    found[kind] += name.encode() + array.data
        return found


def blocks(value: Tensor) -> set[bytes]:
    """A few numbers in a row, as any of the types that a message might hold them in."""
    flat = value.detach().cpu().double().flatten().numpy()
    rows = [flat[i : i + BLOCK] for i in range(0, len(flat) - BLOCK + 1, BLOCK)]
    telling = [
        row for row in rows if len({*row.astype(np.float32).tolist(), 0.0, 1.0}) == BLOCK + 2
    ]
    kinds = (np.float16, np.float32, np.float64)
    return {row.astype(kind).tobytes() for row in telling for kind in kinds[1:]} | {
        row.astype(kinds[0]).tobytes() for row in telling if np.isfinite(row.astype(kinds[0])).all()
        and len(set(row.astype(kinds[0]).tolist()) - {0.0}) == BLOCK
    }  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "clipped and noised"])
def run(request, world, three_clients, tmp_path_factory) -> Run:
    changes = {"privacy": CLIPPED} if request.param != "plain" else {}
    return Run(world, three_clients, tmp_path_factory.mktemp("leaves") / "run", **changes)


def test_no_number_of_a_client_is_in_any_reply(run: Run) -> None:
    replies = run.replies()
    assert set(replies) == run.kinds
    everything = b"".join(replies.values())
    for kind, tensors in run.secret.items():
        secrets = set().union(*(blocks(tensor) for tensor in tensors))
        assert len(secrets) > 30, kind
        assert not [secret for secret in secrets if secret in everything], kind


def test_no_word_of_a_client_is_in_any_reply(run: Run) -> None:
    everything = b"".join(run.replies().values())
    assert not [word for word in vocabulary() if len(word) >= 5 and word.encode() in everything]


def test_numbers_that_leave_would_be_found(run: Run) -> None:
    """The two tests above can fail: φ does leave, and so would ξ be seen."""
    sent = next(r for m, r in run.messages if m.metadata.message_type == TRAIN_PSG)
    arrays = next(iter(sent.content.array_records.values()))
    leak = to_arrays({"xi": run.secret["ξ"][0]})
    assert any(block in leak["xi"].data for block in blocks(run.secret["ξ"][0]))
    weights = max(arrays.values(), key=lambda array: len(array.data)).numpy()
    found = blocks(torch.from_numpy(weights))
    assert any(block in run.replies()[TRAIN_PSG] for block in found)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────

LABEL = "unspeakable"


def answered(error: Exception, caplog: pytest.LogCaptureFixture) -> str:
    """What a server receives of an error on a client that is another process."""

    def handle(_message: Message, _context: Context) -> Message:
        raise error

    LocalGrid(ClientApp(), [], {})  # an engine gives messages their sender
    message = Message(RecordDict(), 2, TRAIN_PSG)
    with caplog.at_level(logging.ERROR):
        reply = send_errors(message, Context(1, 2, {}, RecordDict(), {}), handle)
    assert reply.has_error()
    return str(reply.error.reason)


@pytest.mark.parametrize(
    "error",
    [
        UserError(f"rows.jsonl, row 3: column 'label' holds the unknown class '{LABEL}'."),
        KeyError(LABEL),
        ValueError(f"cannot parse {LABEL}"),
    ],
)
def test_an_error_that_may_quote_data_stays_on_the_client(error: Exception, caplog) -> None:
    received = answered(error, caplog)
    assert LABEL not in received
    assert "see its own log" in received
    assert LABEL in caplog.text


def test_an_error_without_data_is_told_whole(caplog) -> None:
    text = "φ from the server: w holds NaN or infinity."
    assert answered(ShareableError(text), caplog) == text


def test_the_local_engine_tells_everything() -> None:
    app = ClientApp(mods=[send_errors])

    @app.query("describe")
    def describe(_message: Message, _context: Context) -> Message:
        raise UserError(f"the unknown class '{LABEL}'")

    grid = LocalGrid(app, [{}], {})
    [node] = grid.get_node_ids()
    [reply] = grid.send_and_receive([Message(RecordDict(), node, DESCRIBE)])
    assert LABEL in str(reply.error.reason)
