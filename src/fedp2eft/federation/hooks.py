"""What this package uses of Flower beyond its public interface: all of it, with the reason.

Any of these may change without notice, so flwr is pinned to one minor version (pyproject.toml), and
tests/federation/test_hooks.py lists which of them a new version lacks.

Of Flower 1.41, and what it is used for:

* `TaskIdentity`, `Run.create_empty`: `begin_run`: a `Message` takes its sender from there
* `Metadata._message_id`: `give_id`: the engine gives ids, and `LocalGrid` is an engine
* numbers of `ErrorCode`: `CLIENT_APP_RAISED`, `UNAVAILABLE`: why there is no reply
* key "clipping_norm" of a message's config: `CLIP_NORM`: a client checks the norm first
* `DifferentialPrivacyAdaptiveBase._geometric_update`: `ServerQuantile`, `ClientQuantile`
* `…._add_noise_to_aggregated_arrays`: the same
* noise drawn from NumPy's global generator: `noise_from`: seeds it
* option `--parent-pid` of its processes: `end_with_parent`: tells whose end to watch for
* `m_t`, `v_t`, `momentum_vector` of its strategies: `Averaging.memory`: kept in checkpoints
* `flwr.common.secure_aggregation.crypto`, `….primitives.asymmetric`: secure sums: key agreement,
  encryption, Shamir's shares. Not its `quantize` (random, and its weights can overflow) nor its
  `pseudo_rand_gen` (32 bits of seed: a server can try them all)
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.serverapp import strategy as flower
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedp2eft.seeding import derive_seed

__all__ = [
    "CLIENT_APP_RAISED",
    "CLIP_NORM",
    "SERVER_NODE_ID",
    "UNAVAILABLE",
    "ClientQuantile",
    "ServerQuantile",
    "begin_run",
    "bytes_to_public_key",
    "combine_shares",
    "create_shares",
    "decrypt",
    "encrypt",
    "generate_key_pairs",
    "generate_shared_key",
    "give_id",
    "noise_from",
    "public_key_to_bytes",
]

SERVER_NODE_ID = 1
CLIENT_APP_RAISED = 2  # ErrorCode.CLIENT_APP_RAISED_EXCEPTION
# No such message any more, no such reply any more, no heartbeat of the node.
UNAVAILABLE = (3, 4, 5)
CLIP_NORM = "clipping_norm"


def begin_run(run: Run | None = None) -> Run:
    """Make this process the server of a run, a new one if absent, and return the run."""
    run = run or Run.create_empty(run_id=1)
    TaskIdentity.task_id, TaskIdentity.run_id = 1, run.run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    return run


def give_id(message: Message, message_id: str) -> None:
    """Give a message its id, as Flower's own engines do."""
    message.metadata.__dict__["_message_id"] = message_id


class _Quantile:
    """Flower's adaptive clipping with the norm moved as Andrew et al. (2021) do.

    Flower 1.41 lowers the norm where more clients than wished are above it, so that it runs away
    from the quantile, and takes the noise of a round from the norm after its move
    (docs/flower-adaptive-clipping.md).
    """

    clipping_norm: float
    clip_norm_lr: float
    target_clipped_quantile: float
    _next: float | None = None

    def _geometric_update(self, clipped_fraction: float) -> None:
        below = 1 - clipped_fraction
        step = self.clip_norm_lr * (below - self.target_clipped_quantile)
        self._next = self.clipping_norm * math.exp(-step)

    def _add_noise_to_aggregated_arrays(self, aggregated: ArrayRecord) -> ArrayRecord:
        noised: ArrayRecord = super()._add_noise_to_aggregated_arrays(aggregated)  # type: ignore[misc]
        if self._next is not None:
            self.clipping_norm = self._next
        return noised


class ServerQuantile(_Quantile, flower.DifferentialPrivacyServerSideAdaptiveClipping):
    """Adaptive clipping on the server."""


class ClientQuantile(_Quantile, flower.DifferentialPrivacyClientSideAdaptiveClipping):
    """Adaptive clipping on the clients."""


@contextmanager
def noise_from(test_seed: int | None, *parts: int | str) -> Iterator[None]:
    """Seed NumPy's global generator, which Flower draws noise from, until the end of the block.

    Args:
        test_seed: None seeds it from the system's randomness.
        parts: What the noise is for; tells draws of one test seed apart.
    """
    before = np.random.get_state()
    np.random.seed(None if test_seed is None else derive_seed(test_seed, *parts) % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


LOOK_SECONDS = 0.5


@cache
def end_with_parent() -> None:
    """Interrupt this process once the parent that Flower named at its start is gone.

    Flower 1.41 only checks whether its parent's process number is in use. Where nobody waits for
    the parent (the first process of many containers does not), it stays in use for ever: the orphan
    would keep polling a SuperLink that is gone, and keep the run folder locked.
    """
    if "--parent-pid" not in sys.argv[:-1]:
        return
    parent = int(sys.argv[sys.argv.index("--parent-pid") + 1])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        # Flower's own way out: its handlers tidy up. Sent to the process, it ends a wait of the
        # main thread; raised in this one, it would be seen after that wait only.
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
