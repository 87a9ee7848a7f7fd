"""The ClientApp: what a node does with a message. The same on every engine.

A node's config names its client: `client` (a name), or Flower's own `partition-id` (a number, in
the order of the sorted names of all clients). With `data.dataset: nodes` it names the client's file
and a folder of its own, too (`fedp2eft.data.nodes`, `fedp2eft.federation.client.node`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    MetricRecordValues,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import Tensor

from fedp2eft.adapters.export import PEFT_TASKS, save_adapter
from fedp2eft.bases import copy_numbers, rate
from fedp2eft.bases.parts import own_rows
from fedp2eft.client.side import ClientSide
from fedp2eft.client.training import OnStep, train_round
from fedp2eft.data.nodes import NODES
from fedp2eft.errors import TellableError, UserError
from fedp2eft.federation.client.mods import end_with_supernode, keep_private, tell_errors
from fedp2eft.federation.client.node import keep_base, kept_base, own_folder
from fedp2eft.federation.client.round import local_run, set_phi
from fedp2eft.federation.client.state import ClientState, release_state, shared_state
from fedp2eft.federation.client.texts import answering
from fedp2eft.federation.wire.messages import (
    ABOUT,
    ARRAYS,
    EXAMPLES,
    METRICS,
    PREPARED,
    VALIDATION_LOSS,
    alike_arrays,
    from_arrays,
    reply_with,
    the_arrays,
    the_config,
    to_arrays,
)
from fedp2eft.methods import METHODS, method_named
from fedp2eft.methods.fedl2p.method import train_round as train_meta_net
from fedp2eft.methods.fedl2p.settings import FedL2PSettings
from fedp2eft.progress import current
from fedp2eft.results.cards import adapter_card, origin_of
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import check_rank
from fedp2eft.settings.reading import settings_of_run

app = ClientApp(mods=[end_with_supernode, tell_errors])
logger = logging.getLogger(__name__)


def open_workspace(context: Context) -> Workspace:
    """The workspace of the process for the run that `context` belongs to."""
    return open_state(context).workspace


def open_state(context: Context) -> ClientState:
    """What the process keeps for the run that `context` belongs to."""
    config = context.run_config
    settings, run = settings_of_run(config), str(config.get("run") or "")
    if settings.data.dataset == NODES:
        node = dict(context.node_config)
        return shared_state(settings, own_folder(node, settings, run), node)
    return shared_state(settings, Path(run) if run else None)


def client_name(context: Context, workspace: Workspace) -> str:
    """Which client this node is."""
    node = context.node_config
    if "client" in node:
        return workspace.client(str(node["client"])).name
    names = sorted(workspace.clients)
    if "partition-id" not in node:
        raise TellableError("The node config names no client: add client='NAME'.")
    number, nodes = int(node["partition-id"]), int(node.get("num-partitions", len(names)))
    if nodes != len(names) or not 0 <= number < len(names):
        raise TellableError(
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
    if workspace.node is not None:
        about["base"] = kept_base(workspace)
    counts = MetricRecord({EXAMPLES: len(client.train), "num-tests": len(client.test)})
    return reply_with(message, RecordDict({ABOUT: about, METRICS: counts}))


@app.query("base")
def take_base(message: Message, context: Context) -> Message:
    """Keep the run's finished base in this client's own folder."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    about = ConfigRecord({"client": name, "base": keep_base(workspace, message)})
    release_state()  # what was made of another base before
    return reply_with(message, RecordDict({ABOUT: about}))


@app.train("base")
def train_base(message: Message, context: Context) -> Message:
    """One round of the base's training: what travels of it in, and out again trained."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s, base, model = workspace.settings, workspace.base, workspace.trainable_base
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    mine, staying = base.travelling(model, s.base), base.staying(model)
    copy_numbers(mine, from_arrays(the_arrays(message), mine, "The base from the server"))
    work = workspace.local_work(name, derive_seed(s.seed, "base", round_, name))
    total = -(-len(work.order()) // s.local.accumulate)
    work = replace(work, on_step=steps("base", total, name))
    files = workspace.private.files
    with own_rows(staying, files.before(name, round_) or {} if staying else {}) as rows:
        trained = base.trained(model, s.base).values()
        loss = work.fine_tune(model, trained, rate(s.base, round_))
    if staying:
        files.write(name, round_, rows)
    return _trained(message, to_arrays(mine), {"loss": loss}, len(work.data), name)


@app.train("psg", mods=[keep_private])
def train_psg(message: Message, context: Context) -> Message:
    """One round of FedP²EFT: φ in, φ out. Neither text, ξ, λ nor an adapter leaves."""
    state = open_state(context)
    workspace = state.workspace
    name = client_name(context, workspace)
    s = workspace.settings
    workspace.for_client(name)
    received = set_phi(workspace, message)
    run = local_run(workspace, message, name)
    result = state.ahead.take(message) or train_round(
        workspace.bt, workspace.task, run.data, workspace.features(name), workspace.psg, run.order,
        s.local, s.generator, workspace.profile, seed=run.seed,
        on_step=steps("psg", -(-len(run.order) // s.local.accumulate), name),
    )  # fmt: skip
    metrics = {
        "psg-loss": result.psg_loss,
        "stage1-first": result.stage1_losses[0] if result.stage1_losses else 0.0,
        "stage1-last": result.stage1_losses[-1] if result.stage1_losses else 0.0,
        **{f"stage1-{name}": value for name, value in asdict(result.stage1_terms).items()},
    }
    wire, arrays = s.federation.wire, to_arrays(result.phi)
    if wire != "fp32":
        round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
        change = {key: value - received[key] for key, value in result.phi.items()}
        arrays = state.feedback.send(name, round_, change, wire)
    return _trained(message, arrays, metrics, result.examples, name)


@app.train("fedl2p")
def train_fedl2p(message: Message, context: Context) -> Message:
    """One round of FedL2P: the meta-net's numbers in, and out."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s, net = workspace.settings, workspace.meta_net
    net.load_state_dict(the_meta_net(workspace, message))
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    reporter = current()
    client = replace(
        client_side(workspace, message, name),
        progress=lambda share: reporter.part("fedl2p", share, name),
    )
    result = train_meta_net(
        client, net, s.section(FedL2PSettings), derive_seed(s.seed, "fedl2p", round_, name)
    )
    metrics = {"loss": result.loss, VALIDATION_LOSS: result.validation_loss}
    return _trained(message, to_arrays(net.numbers()), metrics, len(client.train), name)


def the_meta_net(workspace: Workspace, message: Message) -> dict[str, Tensor]:
    """FedL2P's numbers that a message brings, checked."""
    like = workspace.meta_net.state_dict()
    return from_arrays(the_arrays(message), like, "The meta-net from the server")


def train_psg_ahead(messages: Sequence[Message], contexts: Sequence[Context]) -> None:
    """Train the clients of several waiting `train.psg` messages in one batch.

    For an engine that has the messages of many clients in one process: `train_psg` takes what was
    computed here, and computes what was not.
    """
    try:
        state = open_state(contexts[0])
        workspace = state.workspace
        names = [client_name(context, workspace) for context in contexts]
        state.ahead.train(workspace, messages, names)
    except UserError:
        return  # `train_psg` says it, of the client whose mistake it is


@app.query("survey")
def answer_survey(message: Message, context: Context) -> Message:
    """Answer what a method asks the seen clients before it is used."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    method, rank = what_is_asked(message, workspace)
    surveys = METHODS[method].surveys
    number = int(the_config(message).get("question", 0))  # type: ignore[arg-type]
    if not 0 <= number < len(surveys):
        raise UserError(f"Method {method!r} does not ask its clients question {number}.")
    answer = surveys[number].ask(client_side(workspace, message, name), rank)
    return reply_with(message, RecordDict({ARRAYS: to_arrays(answer)}))


@app.evaluate("personalize")
def personalize_and_score(message: Message, context: Context) -> Message:
    """Fit this client's own adapter with the method and budget asked for; only scores leave."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s = workspace.settings
    method, rank = what_is_asked(message, workspace)
    start = time.perf_counter()
    client = client_side(workspace, message, name)
    client = replace(client, answer=answering(workspace, name, method, rank))
    outcome = METHODS[method].fit(client, rank)
    scores = outcome.scores.numbers()
    metrics: dict[str, MetricRecordValues] = {
        EXAMPLES: scores.pop("examples"),
        **scores,
        "parameters": outcome.weights.parameters() if outcome.weights else 0,
        "seconds": round(time.perf_counter() - start, 3),
    }
    keep = s.evaluation
    if outcome.weights and method == "fedp2eft" and keep.save_adapters and workspace.run:
        save_adapter(
            workspace.private.carried(name, outcome.weights),
            workspace.run / "adapters" / name / f"{method}-r{rank}",
            base=str(Path(workspace.base_source.path).resolve()),
            revision=workspace.psg_config.base_revision,
            layout=keep.layout,
            task_type=PEFT_TASKS[s.model.task],
            facts={
                "method": method,
                "rank": rank,
                "client": name,
                "language": workspace.client(name).language,
                "task": s.model.task,
                "labels": list(workspace.labels),
                "max_length": s.local.max_length,
                **outcome.scores.facts(),
                "test_rows": outcome.scores.examples,
                "train_rows": len(workspace.encoded(name, "train")),
                "origin": origin_of(s, workspace.source),
            },
            card=adapter_card,
        )
    about = ConfigRecord({"client": name})
    return reply_with(message, RecordDict({ABOUT: about, METRICS: MetricRecord(metrics)}))


def what_is_asked(message: Message, workspace: Workspace) -> tuple[str, int]:
    """Method and rank budget that a message names, checked."""
    config = the_config(message)
    method, rank = str(config["method"]), int(config["rank"])  # type: ignore[arg-type]
    if method_named(method).ranked or rank:
        check_rank(rank, workspace.settings.adapter.r_max)
    return method, rank


def client_side(workspace: Workspace, message: Message, name: str) -> ClientSide:
    """What a method may look at, for one client: the one that a message names, if it does."""
    workspace.for_client(name)
    s, psg = workspace.settings, workspace.psg
    reporter = current()
    shared: dict[str, Tensor] = {}
    method = the_config(message).get("method")
    federation = METHODS[str(method)].shared if method else None
    own = METHODS[str(method)].settings if method else None
    if federation == "psg":
        shared = from_arrays(the_arrays(message), psg.state_dict(), "φ from the server")
        psg.set_numbers(shared)
    elif federation == "fedl2p":
        shared = the_meta_net(workspace, message)
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
        own=s.section(own) if own else None,
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
