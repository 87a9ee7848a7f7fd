"""The ClientApp: what a node does with a message. The same on every engine.

A node's config names its client: `client` (a name), or Flower's own `partition-id` (a number, in
the order of the sorted names of all clients). With `data.dataset: nodes` it names the client's file
and a folder of its own, too (`fedp2eft.data.nodes`, `fedp2eft.federation.client.node`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, MetricRecordValues, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedp2eft.adapters.export import PEFT_TASKS, auto_mapping, column_facts, save_adapter
from fedp2eft.client.descent import steps_taken
from fedp2eft.client.phase import Phase, Turn
from fedp2eft.client.side import ClientSide, check_size
from fedp2eft.data.nodes import NODES
from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.client.mods import end_with_supernode, keep_private, send_errors
from fedp2eft.federation.client.node import keep_base, kept_base, own_folder
from fedp2eft.federation.client.state import ClientState, release_state, shared_state
from fedp2eft.federation.client.sums import give_masked, serve_sums
from fedp2eft.federation.client.texts import answering
from fedp2eft.federation.server.labels import noise
from fedp2eft.federation.wire.compression import DOWN, unpack
from fedp2eft.federation.wire.layouts import (
    LABELS,
    Part,
    labels_layout,
    noise_key,
    phase_layout,
    phase_part,
    survey_layout,
)
from fedp2eft.federation.wire.messages import (
    ABOUT,
    ARRAYS,
    CHOICE,
    EXAMPLES,
    LABEL_PRIOR,
    METRICS,
    PREPARED,
    any_arrays,
    from_arrays,
    the_arrays,
    the_config,
    to_arrays,
)
from fedp2eft.methods import METHODS, method_named
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.cards import adapter_card, origin_of
from fedp2eft.runtime.phases import BASE, PSG_PHASE, shared_phases
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import check_rank
from fedp2eft.settings.reading import settings_of_run
from fedp2eft.tasks.label_prior import label_counts, predicted_counts, with_classes

app = ClientApp(mods=[end_with_supernode, send_errors])
serve_sums(app)
logger = logging.getLogger(__name__)


def open_workspace(context: Context) -> Workspace:
    """Return the process's workspace for the run that `context` belongs to."""
    return open_state(context).workspace


def open_state(context: Context) -> ClientState:
    """Return what the process keeps for the run that `context` belongs to."""
    config = context.run_config
    settings, run = settings_of_run(config), str(config.get("run") or "")
    if settings.data.dataset == NODES:
        node = dict(context.node_config)
        return shared_state(settings, own_folder(node, settings, run), node)
    return shared_state(settings, Path(run) if run else None)


def client_name(context: Context, workspace: Workspace) -> str:
    """Return the name of this node's client."""
    node = context.node_config
    if "client" in node:
        return workspace.client(str(node["client"])).name
    names = sorted(workspace.clients)
    if "partition-id" not in node:
        raise ShareableError("The node config names no client: add client='NAME'.")
    number, nodes = int(node["partition-id"]), int(node.get("num-partitions", len(names)))
    if nodes != len(names) or not 0 <= number < len(names):
        raise ShareableError(
            f"The experiment has {len(names)} clients and the federation {nodes} SuperNodes: "
            f"start it with --federation-config 'num-supernodes={len(names)}'."
        )
    return names[number]


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Answer name, language, pool and number of rows of this client."""
    workspace = open_workspace(context)
    client = workspace.client(client_name(context, workspace))
    if not len(client.test):
        logger.warning(
            "Client %s has no test rows: its adapter is made and not scored.", client.name
        )
    about = ConfigRecord({"client": client.name, "language": client.language, "pool": client.pool})
    if workspace.node is not None:
        about["base"] = kept_base(workspace)
    # With secure sums N is a weight that only a sum reveals.
    rows = 0 if workspace.settings.privacy.secure else len(client.train)
    counts = MetricRecord({EXAMPLES: rows, "num-tests": len(client.test)})
    return Message(RecordDict({ABOUT: about, METRICS: counts}), reply_to=message)


@app.query("base")
def take_base(message: Message, context: Context) -> Message:
    """Keep the run's finished base in this client's own folder."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    about = ConfigRecord({"client": name, "base": keep_base(workspace, message)})
    release_state()  # what was made of another base before
    return Message(RecordDict({ABOUT: about}), reply_to=message)


def serve(phase: Phase) -> None:
    """Answer the messages of a phase; one that is served already is not served twice."""
    if phase.name in _served:
        return
    _served.add(phase.name)

    @app.train(phase.name, mods=[keep_private] if phase.private else [])
    def train(message: Message, context: Context) -> Message:
        state = open_state(context)
        name = client_name(context, state.workspace)
        turn = turn_of(state.workspace, phase, message, name)
        trained = state.ahead.take(message) or phase.train(turn)
        examples = len(state.workspace.encoded(name, "train"))
        privacy = state.workspace.settings.privacy
        if privacy.secure:
            part = phase_part(
                phase, turn.parameters, trained.parameters, trained.metrics, examples, privacy,
                noise_key(privacy, phase.name, turn.round, name),
            )  # fmt: skip
            layout_of = partial(phase_layout, phase, turn.parameters, privacy)
            return give_masked(message, context, privacy, part, layout_of)
        found, wire = trained.parameters, phase.wire_of(state.workspace.settings)
        arrays = to_arrays(found)
        if wire != "fp32":
            change = {key: value - turn.parameters[key] for key, value in found.items()}
            arrays = state.feedback.send(name, turn.round, change, wire)
        content = {
            ARRAYS: arrays,
            METRICS: MetricRecord({EXAMPLES: examples, **trained.metrics}),
            ABOUT: ConfigRecord({"client": name}),
        }
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]


def serve_phases() -> None:
    """Answer the messages of the run's own phases and of all methods'."""
    for phase in (BASE, *shared_phases().values()):
        serve(phase)


_served: set[str] = set()
serve_phases()


def train_psg_ahead(messages: Sequence[Message], contexts: Sequence[Context]) -> None:
    """Train the clients of several waiting `train.psg` messages in one batch.

    For an engine that has the messages of many clients in one process: the handler takes what was
    computed here, and computes what was not.
    """
    try:
        state = open_state(contexts[0])
        turns = [
            turn_of(state.workspace, PSG_PHASE, message, client_name(context, state.workspace))
            for message, context in zip(messages, contexts, strict=True)
        ]
        state.ahead.train(state.workspace, messages, turns)
    except UserError:
        return  # the handler reports it, for the client whose mistake it is


@app.query("labels")
def answer_labels(message: Message, context: Context) -> Message:
    """Answer what q is made of: this client's label counts, or what the base predicts of its text.

    With differential privacy they are shares, which sum to 1, and noised if clients add the noise.
    """
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s, data = workspace.settings.privacy, workspace.encoded(name, "train")
    if the_config(message).get("source") == "predicted":
        workspace.for_client(name)
        size = workspace.settings.local.eval_batch_size
        answer = predicted_counts(workspace.bt, workspace.task, data, size)
    else:
        with_classes(workspace.task, "The label prior")
        answer = label_counts(data, len(workspace.labels))
    if s.on:
        answer = answer / max(1, len(data))
    if s.secure:
        part = Part({LABELS: answer}, noise_key=noise_key(s, "labels", name))
        return give_masked(message, context, s, part, partial(labels_layout, len(answer), s))
    if s.on and s.noise == "client":
        answer = answer + noise(s, len(answer), name)
    about = ConfigRecord({"client": name})
    content = RecordDict({ARRAYS: to_arrays({"labels": answer}), ABOUT: about})
    return Message(content, reply_to=message)


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
    survey, s = surveys[number], workspace.settings.privacy
    answer = survey.ask(client_side(workspace, message, name), rank)
    if s.secure:
        shapes = {key: tuple(value.shape) for key, value in answer.items()}
        return give_masked(
            message, context, s, Part(answer), lambda _clients: survey_layout(survey, shapes)
        )
    return Message(RecordDict({ARRAYS: to_arrays(answer)}), reply_to=message)


@app.evaluate("personalize")
def personalize_and_score(message: Message, context: Context) -> Message:
    """Fit this client's own adapter with the method and budget asked for; only scores leave."""
    workspace = open_workspace(context)
    name = client_name(context, workspace)
    s = workspace.settings
    method, rank = what_is_asked(message, workspace)
    start = time.perf_counter()
    client = client_side(workspace, message, name)
    # Its own part of the base, if it had none yet, is trained by now, and is not the method's cost.
    before = steps_taken()
    # The method itself: fit and score.
    client = replace(client, answer=answering(workspace, name, method, rank))
    outcome = METHODS[method].fit(client, rank)
    if outcome.weights:
        check_size(client, outcome.weights, rank)
    weights = client.carrying(outcome.weights) if outcome.weights else None
    scores = outcome.scores.metrics()
    # Scores and costs leave the client; text, λ and adapter do not.
    metrics: dict[str, MetricRecordValues] = {
        EXAMPLES: scores.pop("examples"),
        **scores,
        "parameters": weights.parameters() if weights else 0,
        "seconds": round(time.perf_counter() - start, 3),
        "steps": steps_taken() - before,
    }
    # The adapter stays on this machine.
    keep = s.evaluation
    kept = keep.save_adapters and method in ("fedp2eft", "prior", "calibrated-prior", "auto")
    fits = weights is not None and (weights.offset is None or workspace.has_head)
    if weights and kept and fits and workspace.run:
        save_adapter(
            workspace.carried(name, weights),
            workspace.run / "adapters" / name / str(AtBudget(method, rank)),
            base=str(Path(workspace.base_source.path).resolve()),
            revision=workspace.psg_config.base_revision,
            layout=keep.layout,
            task_type=PEFT_TASKS[s.model.task],
            loads=auto_mapping(workspace.bt.model.get_base_model()),
            facts={
                "method": method,
                "rank": rank,
                "budget": s.evaluation.budget,
                "client": name,
                "language": workspace.client(name).language,
                "task": s.model.task,
                "labels": list(workspace.labels),
                **column_facts(workspace.data, s.model.task),
                "max_length": s.local.max_length,
                **outcome.scores.facts(),
                "test_rows": outcome.scores.examples,
                "train_rows": len(workspace.encoded(name, "train")),
                "origin": origin_of(s, workspace.source),
            },
            card=adapter_card,
        )
    about = ConfigRecord({"client": name})
    if outcome.choice:
        about[CHOICE] = outcome.choice
    return Message(RecordDict({ABOUT: about, METRICS: MetricRecord(metrics)}), reply_to=message)


def learn(workspace: Workspace, message: Message) -> None:
    """Take q from a message, if the server sent it."""
    q = the_config(message).get(LABEL_PRIOR)
    if isinstance(q, list):
        workspace.know_label_prior(q)  # type: ignore[arg-type]


def turn_of(workspace: Workspace, phase: Phase, message: Message, name: str) -> Turn:
    """Return client `name`'s turn in the round of the message, its parameters checked."""
    learn(workspace, message)
    s = workspace.settings
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    whose = f"What the server sent ({phase.title})"
    parameters = unpack(the_arrays(message), workspace.shapes(phase), DOWN[phase.wire_of(s)], whose)
    seed = derive_seed(s.seed, phase.name, round_, name)
    return Turn(workspace, name, phase.name, round_, seed, parameters)


def what_is_asked(message: Message, workspace: Workspace) -> tuple[str, int]:
    """Return the method and rank budget that a message names, checked."""
    config = the_config(message)
    method, rank = str(config["method"]), int(config["rank"])  # type: ignore[arg-type]
    if method_named(method).ranked or rank:
        check_rank(rank, workspace.settings.adapter.r_max)
    return method, rank


def client_side(workspace: Workspace, message: Message, name: str) -> ClientSide:
    """Return what the method that a message names may look at, for one client."""
    learn(workspace, message)
    method = METHODS[str(the_config(message)["method"])]
    shared: dict[str, Tensor] = {}
    if method.phase:
        whose = f"What the server sent ({method.phase.title})"
        shared = from_arrays(the_arrays(message), workspace.shapes(method.phase), whose)
    elif method.shared:
        shared = from_arrays(the_arrays(message), workspace.psg.state_dict(), "φ from the server")
        workspace.psg.set_phi(shared)
    return replace(
        workspace.side(name, method=method),
        shared=shared,
        prepared=any_arrays(the_arrays(message, PREPARED), "What the server prepared"),
    )
