"""The ClientApp: what a node does with a message. The same on every engine.

A node's config names its client: `client` (a name), or Flower's own `partition-id` (a number, in
the order of the sorted names of all clients).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor

from fedp2eft.adapters.export import save_adapter
from fedp2eft.bases.standard_fl import fine_tune, set_parameters, trained_parameters
from fedp2eft.client import OnStep, local_order, train_round
from fedp2eft.errors import UserError
from fedp2eft.federation.cohort import local_run, set_phi
from fedp2eft.federation.local import CLIENT_APP_RAISED
from fedp2eft.federation.messages import (
    ABOUT,
    ARRAYS,
    EXAMPLES,
    METRICS,
    PREPARED,
    alike_arrays,
    from_arrays,
    reply_with,
    the_arrays,
    the_config,
    to_arrays,
)
from fedp2eft.federation.reporting import current
from fedp2eft.federation.workspace import Workspace, shared_workspace
from fedp2eft.methods import METHODS, ClientSide, method_named
from fedp2eft.models.precision import resolve_precision
from fedp2eft.seeding import derive_seed
from fedp2eft.settings import check_rank


def tell_user_errors(
    message: Message, context: Context, handle: Callable[[Message, Context], Message]
) -> Message:
    """Flower mod: a user's mistake reaches the server as its one line, on every engine."""
    try:
        return handle(message, context)
    except UserError as error:
        return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)


app = ClientApp(mods=[tell_user_errors])
logger = logging.getLogger(__name__)


def open_workspace(context: Context) -> Workspace:
    """The workspace of the process for the run that `context` belongs to."""
    from fedp2eft.reading import settings_of_run

    config = context.run_config
    settings = settings_of_run(config)
    run = config.get("run")
    return shared_workspace(json.dumps(settings), str(run) if run else None)


def client_name(context: Context, workspace: Workspace) -> str:
    """Which client this node is."""
    node = context.node_config
    if "client" in node:
        return workspace.client(str(node["client"])).name
    names = sorted(workspace.clients)
    if "partition-id" not in node:
        raise UserError("The node config names no client: add client='NAME'.")
    number, nodes = int(node["partition-id"]), int(node.get("num-partitions", len(names)))
    if nodes != len(names) or not 0 <= number < len(names):
        raise UserError(
            f"The experiment has {len(names)} clients and the federation {nodes} SuperNodes: "
            f"start it with --federation-config 'num-supernodes={len(names)}'."
        )
    return names[number]


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Name, language, pool and number of rows of this client."""
    workspace = open_workspace(context)
    client = workspace.client(client_name(context, workspace))
    if not len(client.test):
        logger.warning(
            "Client %s has no test rows: its adapter is made and not scored.", client.name
        )
    about = ConfigRecord({"client": client.name, "language": client.language, "pool": client.pool})
    counts = MetricRecord({EXAMPLES: len(client.train), "num-tests": len(client.test)})
    return reply_with(message, RecordDict({ABOUT: about, METRICS: counts}))


@app.train("base")
def train_base(message: Message, context: Context) -> Message:
    """One round of Standard FL: base weights in, fine-tuned base weights out."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s = workspace.settings
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    model = workspace.trainable_base
    mine = trained_parameters(model, s.base)
    set_parameters(
        model, from_arrays(the_arrays(message), mine, "The base from the server"), s.base
    )
    data = workspace.encoded(name, "train")
    seed = derive_seed(s.seed, "base", round_, name)
    order = list(local_order(len(data), s.base.epochs, s.base.batch_size, seed))
    dtype = resolve_precision(s.model.precision, workspace.device)
    losses = fine_tune(
        model, workspace.task, data, order, s.base, s.local, dtype, seed,
        on_step=steps("base", len(order), name),
    )  # fmt: skip
    metrics = {"loss": sum(losses) / max(1, len(losses))}
    return _trained(message, to_arrays(mine), metrics, len(data), name)


@app.train("psg")
def train_psg(message: Message, context: Context) -> Message:
    """One round of FedP²EFT: φ in, φ out. Neither text, ξ, λ nor an adapter leaves."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s = workspace.settings
    received = set_phi(workspace, message)
    run = local_run(workspace, message, name)
    result = workspace.ahead.take(message) or train_round(
        workspace.bt, workspace.task, run.data, workspace.features(name), workspace.psg, run.order,
        s.local, s.generator, workspace.profile, seed=run.seed,
        on_step=steps("psg", -(-len(run.order) // s.local.accumulate), name),
    )  # fmt: skip
    metrics = {
        "psg-loss": result.psg_loss,
        "stage1-first": result.stage1_losses[0] if result.stage1_losses else 0.0,
        "stage1-last": result.stage1_losses[-1] if result.stage1_losses else 0.0,
    }
    wire, arrays = s.federation.wire, to_arrays(result.phi)
    if wire != "fp32":
        round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
        change = {key: value - received[key] for key, value in result.phi.items()}
        arrays = workspace.feedback.send(name, round_, change, wire)
    return _trained(message, arrays, metrics, result.examples, name)


def train_psg_ahead(messages: Sequence[Message], contexts: Sequence[Context]) -> None:
    """Train the clients of several waiting `train.psg` messages in one batch.

    For an engine that has the messages of many clients in one process: `train_psg` takes what was
    computed here, and computes what was not.
    """
    try:
        workspace = open_workspace(contexts[0])
        names = [client_name(context, workspace) for context in contexts]
        workspace.ahead.train(workspace, messages, names)
    except UserError:
        return  # `train_psg` says it, of the client whose mistake it is


@app.query("survey")
def answer_survey(message: Message, context: Context) -> Message:
    """Answer what a method asks the seen clients before it is used."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    method, rank = what_is_asked(message, workspace)
    survey = METHODS[method].survey
    if survey is None:
        raise UserError(f"Method {method!r} asks its clients nothing.")
    answer = survey.ask(client_side(workspace, message, name), rank)
    return reply_with(message, RecordDict({ARRAYS: to_arrays(answer)}))


@app.evaluate("personalize")
def personalize_and_score(message: Message, context: Context) -> Message:
    """Fit this client's own adapter with the method and budget asked for; only scores leave."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s = workspace.settings
    method, rank = what_is_asked(message, workspace)
    start = time.perf_counter()
    outcome = METHODS[method].fit(client_side(workspace, message, name), rank)
    metrics: dict[str, MetricRecordValues] = {
        EXAMPLES: outcome.scores.examples,
        "correct": outcome.scores.correct,
        "loss": outcome.scores.loss,
        "parameters": outcome.weights.parameters() if outcome.weights else 0,
        "seconds": round(time.perf_counter() - start, 3),
    }
    keep = s.evaluation
    if outcome.weights and method == "fedp2eft" and keep.save_adapters and workspace.run:
        client = workspace.client(name)
        save_adapter(
            outcome.weights,
            workspace.run / "adapters" / name / f"{method}-r{rank}",
            base=str(Path(workspace.base_source.path).resolve()),
            revision=workspace.psg_config.base_revision,
            layout=keep.layout,
            facts={
                "method": method,
                "rank": rank,
                "client": name,
                "language": client.language,
                "labels": list(workspace.federation.labels),
                "max_length": s.local.max_length,
                "accuracy": outcome.scores.accuracy if outcome.scores.examples else None,
                "test_rows": outcome.scores.examples,
            },
        )
    about = ConfigRecord({"client": name})
    return reply_with(message, RecordDict({ABOUT: about, METRICS: MetricRecord(metrics)}))


def what_is_asked(message: Message, workspace: Workspace) -> tuple[str, int]:
    """Method and rank budget that a message names, checked."""
    config = the_config(message)
    method, rank = str(config["method"]), int(config["rank"])  # type: ignore[arg-type]
    method_named(method)
    check_rank(max(1, rank), workspace.settings.adapter.r_max)
    return method, rank


def client_side(workspace: Workspace, message: Message, name: str) -> ClientSide:
    """What the method that a message names may look at, for one client."""
    s, psg = workspace.settings, workspace.psg
    reporter = current()
    shared: dict[str, Tensor] = {}
    if METHODS[str(the_config(message)["method"])].shared == "psg":
        shared = from_arrays(the_arrays(message), psg.state_dict(), "φ from the server")
        psg.set_numbers(shared)
    prepared = alike_arrays([the_arrays(message, PREPARED)], "What the server prepared")[0]
    return ClientSide(
        bt=workspace.bt,
        task=workspace.task,
        train=workspace.encoded(name, "train"),
        test=workspace.encoded(name, "test"),
        psg=psg,
        features=lambda: workspace.features(name),
        settings=s.local,
        seed=derive_seed(s.seed, "personalize", name),
        progress=lambda share: reporter.part("personalize", share, name),
        shared=shared,
        prepared=prepared,
    )


def steps(phase: str, total: int, name: str) -> OnStep:
    """A callback that reports the share of a client's steps that are done."""
    reporter, done = current(), 0

    def on_step(_loss: float) -> None:
        nonlocal done
        done += 1
        reporter.part(phase, done / max(1, total), name)

    return on_step


def _trained(
    message: Message, arrays: ArrayRecord, metrics: dict[str, float], examples: int, name: str
) -> Message:
    record = MetricRecord({EXAMPLES: examples, **metrics})
    about = ConfigRecord({"client": name})
    return reply_with(message, RecordDict({ARRAYS: arrays, METRICS: record, ABOUT: about}))
