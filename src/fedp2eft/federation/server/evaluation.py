"""The server's part of personalization: ask, send, and keep the scores that come back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.data.clients import SEEN
from fedp2eft.errors import UserError, shortened
from fedp2eft.federation.server.admission import FIRST_ENDS, Failures
from fedp2eft.federation.server.exchange import Member, exchange, read_replies
from fedp2eft.federation.server.held_out import asked
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.session import Session
from fedp2eft.federation.server.sums import SecureSum
from fedp2eft.federation.wire import messages as wire
from fedp2eft.federation.wire.layouts import survey_layout
from fedp2eft.files import write_folder
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS, Method
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.metrics import metric_of
from fedp2eft.results.surveys import read_survey, write_survey
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.tasks.text_scores import TEXT_SCORES

Shared = Mapping[str, Mapping[str, Tensor]]
"""Parameters by name, of each phase ("psg", or a method's own)."""


@dataclass(frozen=True)
class Instruction:
    """What a client receives before it personalizes with one method and budget.

    Args:
        at: The method, and at which budget.
        shared: Parameters of the method's federation; empty if it has none.
        prepared: What the surveys gave so far; empty if there were none.
        question: In a survey, which of the method's it is, counted from 0.
        label_prior: q; empty if it is not known.
    """

    at: AtBudget
    shared: ArrayRecord
    prepared: ArrayRecord
    question: int = 0
    label_prior: Sequence[float] = ()

    def message(self, node: int, kind: str) -> Message:
        """Return a message of that kind to one node."""
        config = ConfigRecord({"method": self.at.method, "rank": self.at.rank})
        if kind == wire.SURVEY:
            config["question"] = self.question
        config = wire.with_label_prior(config, self.label_prior)
        content = {wire.ARRAYS: self.shared, wire.PREPARED: self.prepared, wire.CONFIG: config}
        return Message(RecordDict(content), node, kind, group_id=str(self.at))  # type: ignore[arg-type]


def prepare(
    grid: Grid,
    shared: Shared,
    at: AtBudget,
    members: list[Member],
    timeout: float,
    failures: Failures = FIRST_ENDS,
    label_prior: Sequence[float] = (),
    privacy: PrivacySettings | None = None,
) -> Instruction:
    """Gather what the clients must receive; ask the seen clients if the method has surveys.

    Args:
        grid: The engine.
        shared: Trained parameters by federation.
        at: The method, and at which budget.
        members: All clients of the federation.
        timeout: Seconds without any reply after which no more are waited for.
        failures: Receives clients that fail. Without it, the first one raises.
        label_prior: q; empty if it is not known.
        privacy: Whether answers are summed securely; they are not if absent.
    """
    method, kind = at.method, METHODS[at.method]
    instruction = Instruction(at, _parameters(shared, kind), ArrayRecord(), label_prior=label_prior)
    if kind.surveys and not any(member.pool == SEEN for member in members):
        raise UserError(f"Method {method} needs seen clients, and there are none: leave it out.")
    prepared: dict[str, Tensor] = {}
    for number, survey in enumerate(kind.surveys):
        instruction = replace(instruction, prepared=wire.to_arrays(prepared), question=number)
        clients = asked(survey, members)
        messages = [instruction.message(node, wire.SURVEY) for node in clients]
        what = f"survey of {method}"
        if privacy and privacy.secure:
            secure = SecureSum(grid, list(clients.values()), privacy, timeout, what, failures, True)
            found = secure.run(messages, partial(survey_layout, survey))
            sums = {name: torch.from_numpy(value) for name, value in found.values.items()}
            prepared |= survey.combine(sums, len(found.clients))
            continue
        replies = {
            member.client: wire.the_arrays(reply)
            for member, reply in exchange(
                grid, messages, clients, timeout, what, failures, renewed=True
            )
        }
        answers = alike_answers(replies, what, failures)
        failures.check(len(answers), len(messages), what)
        prepared |= survey.combine(summed(answers), len(answers))
    return replace(instruction, prepared=wire.to_arrays(prepared), question=0)


def kept_answers(
    run: Path, shared: Shared, at: AtBudget, phi: str | None, label_prior: Sequence[float]
) -> Instruction | None:
    """Return what `prepare` gave, from the answers that a run folder keeps; None if it keeps none.

    Args:
        run: The run folder.
        shared: Trained parameters by federation.
        at: The method, and at which budget.
        phi: Digest of the parameters that the method starts from, if any.
        label_prior: q; empty if it is not known.
    """
    kept = read_survey(run, at, phi)
    if kept is None:
        return None
    prepared = wire.to_arrays({name: torch.tensor(value) for name, value in kept.items()})
    parameters = _parameters(shared, METHODS[at.method])
    return Instruction(at, parameters, prepared, label_prior=label_prior)


def keep_answers(run: Path, instruction: Instruction, phi: str | None) -> None:
    """Keep what the surveys gave; arguments as in `kept_answers`."""
    if instruction.prepared:
        write_survey(run, instruction.at, phi, as_lists(instruction))


def as_lists(instruction: Instruction) -> dict[str, Any]:
    """Return what the surveys gave, as nested lists by name."""
    answers = wire.any_arrays(instruction.prepared, f"The survey of {instruction.at.method}")
    return {name: value.tolist() for name, value in answers.items()}


def _parameters(shared: Shared, kind: Method) -> ArrayRecord:
    return wire.to_arrays(shared[kind.shared]) if kind.shared else ArrayRecord()


def summed(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums of answers of the same names and shapes, float64."""
    return {name: sum(answer[name].double() for answer in answers) for name in answers[0]}  # type: ignore[misc]


def alike_answers(
    replies: Mapping[str, ArrayRecord], what: str, failures: Failures = FIRST_ENDS
) -> list[dict[str, Tensor]]:
    """Return the answers to one question, in the order of the clients' names.

    All must have the names and shapes that most have: one client that answers something else is
    left out, and does not decide for the rest.

    Raises:
        UserError: An answer is not what it should be, where a failure ends the run.
    """
    kinds = Counter(_kind(record) for record in replies.values())
    answers = []
    for client in sorted(replies):
        whose = f"Answer of client {client} in the {what}"
        try:
            if kinds and _kind(replies[client]) != kinds.most_common(1)[0][0]:
                raise UserError(f"{whose} has other parameters than most.")
            answers.append(wire.any_arrays(replies[client], whose))
        except UserError as error:
            failures.add(client, str(error), "refused")
    return answers


def _kind(record: ArrayRecord) -> tuple[object, ...]:
    return tuple(sorted((name, tuple(array.shape)) for name, array in record.items()))


def personalize(
    grid: Grid,
    instruction: Instruction,
    members: list[Member],
    timeout: float,
    failures: Failures = FIRST_ENDS,
) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Have clients personalize with one method and budget; yields each one's scores as they come.

    Args:
        grid: The engine.
        instruction: Method, budget and what it starts from.
        members: The clients to personalize.
        timeout: Seconds without any reply after which no more are waited for.
        failures: Receives clients that fail. Without it, the first one raises.
    """
    messages = [instruction.message(member.node, wire.PERSONALIZE) for member in members]
    by_node = {member.node: member for member in members}
    what = "personalization"
    for member, scores in read_replies(
        grid, messages, by_node, timeout, what, lambda _, reply: scores_of(reply), failures, True
    ):
        failures.usable(member.client)
        yield member, scores


def scores_of(reply: Message) -> dict[str, Any]:
    """Return the scores that a client sends, and nothing else of its reply.

    Raises:
        UserError: One is missing, or cannot be.
    """
    metrics = wire.scalars(reply)
    units = [name for name in ("correct", "tokens") if name in metrics]
    if len(units) != 1:
        raise UserError("its scores are neither those of a classification nor of a causal LM.")
    examples = wire.whole(metrics, wire.EXAMPLES)
    scores: dict[str, Any] = {"examples": examples, "loss": _number(metrics, "loss")}
    scores |= {name: wire.whole(metrics, name) for name in (*units, "parameters")}
    scores["seconds"] = _number(metrics, "seconds")
    if "steps" in metrics:
        scores["steps"] = wire.whole(metrics, "steps")
    if choice := reply.content.config_records.get(wire.ABOUT, ConfigRecord()).get(wire.CHOICE):
        if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", str(choice)):
            raise UserError(f"its choice {shortened(str(choice))} is not a valid name.")
        scores["choice"] = str(choice)
    texts = {name: _number(metrics, name) for name in TEXT_SCORES if name in metrics}
    if max(texts.values(), default=0.0) > examples * (1 + 1e-6):
        raise UserError(f"each of {examples} texts scores at most 1, and its sums are {texts}.")
    scores |= texts
    if scores.get("correct", 0) > examples:
        raise UserError(f"{scores['correct']} of {examples} rows cannot be right.")
    return scores


def _number(metrics: Mapping[str, int | float], name: str) -> float:
    value = metrics.get(name, -1.0)
    if value < 0:
        raise UserError(f"its {name} is {metrics.get(name)}, not a number of 0 or more.")
    return value


def personalize_all(session: Session, shared: Shared) -> None:
    """Personalize every client of the chosen pools, for every missing method and budget."""
    run, reporter, failures = session.run, session.reporter, session.failures()
    evaluation, timeout = session.settings.evaluation, session.settings.federation.timeout
    digests = {
        name: wire.array_digest(wire.to_arrays(parameters)) for name, parameters in shared.items()
    }
    run.drop_cells_of_other_phi(
        {name: digests[kind.shared] for name, kind in METHODS.items() if kind.shared in digests}
    )
    chosen = [member for member in session.members if member.pool in evaluation.pools]
    wanted = [
        AtBudget(method, rank)
        for method in evaluation.methods
        for rank in (evaluation.ranks if METHODS[method].ranked else [0])
    ]
    missing = {at: [m for m in chosen if run.cell(at, m.client) is None] for at in wanted}
    left, total = sum(map(len, missing.values())), len(wanted) * len(chosen)
    reporter.start("personalize", total, total - left)
    for at, without in missing.items():
        clients = [member for member in without if member.client not in run.faults.quarantined]
        if not clients:
            continue
        phi = digests.get(METHODS[at.method].shared or "")
        instruction = _instruction(session, shared, at, phi, failures)
        for member, metrics in personalize(session.grid, instruction, clients, timeout, failures):
            about = {"client": member.client, "language": member.language, "pool": member.pool}
            if phi:
                about["phi"] = phi
            run.write_cell(at, member.client, {**about, **metrics})
            metric = metric_of(metrics)
            score = metric.shown(metric.value([metrics])) if metrics["examples"] else "–"
            reporter.advance("personalize", f"{at.method} {member.client} {score}")
    _keep_with_psg(run, digests, wanted)


def _instruction(
    session: Session, shared: Shared, at: AtBudget, phi: str | None, failures: Failures
) -> Instruction:
    """Return a method's instruction; answers that are kept are asked for once."""
    keep, run, s = METHODS[at.method].kept, session.run, session.settings
    kept = kept_answers(run.path, shared, at, phi, run.label_prior) if keep else None
    if kept is not None:
        return kept
    made = prepare(
        session.grid, shared, at, session.members, s.federation.timeout, failures,
        run.label_prior, s.privacy,
    )  # fmt: skip
    if keep:
        keep_answers(run.path, made, phi)
    return made


def _keep_with_psg(run: RunFolder, digests: Mapping[str, str], wanted: Sequence[AtBudget]) -> None:
    """Write what the surveys gave into the PSG's config, for clients that come later."""
    choices = {}
    for at in wanted:
        kind = METHODS[at.method]
        kept = read_survey(run.path, at, digests.get(kind.shared or "")) if kind.kept else None
        if kept is not None:
            choices[str(replace(at, budget=run.settings.evaluation.budget))] = kept
    if choices:
        trained = PSG.from_pretrained(run.psg)
        psg = PSG(replace(trained.config, choices=choices))
        psg.set_phi(trained.phi())
        write_folder(run.psg, psg.save_pretrained)
