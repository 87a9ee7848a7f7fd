"""q, the label distribution that the base was trained on: asked of those clients once, as a sum.

The answer is kept in the run folder and sent to every client with each request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.federation.server.exchange import Member, read_replies
from fedp2eft.federation.server.held_out import training_base
from fedp2eft.federation.server.session import Session
from fedp2eft.federation.server.sums import SecureSum, fixed
from fedp2eft.federation.wire.layouts import LABELS, labels_layout, labels_noise
from fedp2eft.federation.wire.messages import ARRAYS, CONFIG, from_arrays, the_arrays
from fedp2eft.federation.wire.messages import LABELS as ASK_LABELS
from fedp2eft.files import read_json, write_json
from fedp2eft.methods import METHODS
from fedp2eft.runtime.client_rows import LABEL_PRIOR_FILE
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import PrivacySettings
from fedp2eft.tasks.label_prior import smoothed


def needs_label_prior(settings: Settings) -> bool:
    """Return whether anything in the run uses q."""
    return (
        settings.local.logit_adjustment != "none"
        or settings.base.logit_adjustment != "none"
        or settings.generator.label_features
        or (
            settings.model.task == "classification"
            and any(METHODS[name].label_prior for name in settings.evaluation.methods)
        )
    )


def learn_label_prior(session: Session) -> list[float]:
    """Return q, from the run folder or the seen clients' answers.

    With differential privacy every client answers with frequencies, whose norm is at most 1, and
    the sum gets noise of the standard deviation z: one more mechanism in the account.
    """
    path, s = session.run.path / LABEL_PRIOR_FILE, session.settings
    classes = len(session.workspace.labels)
    kept: Mapping[str, Any] = read_json(path) or {}
    if "q" in kept:
        return [float(value) for value in kept["q"]]
    source = s.local.label_prior
    if source == "uniform":
        q = torch.full((classes,), 1 / classes)
        write_json(path, {"source": source, "q": q.tolist()})
        return q.tolist()
    spent = dict(kept)

    def spend(**more: float) -> None:  # an answer counts once it may have been given
        spent.update(source=source, **{n: kept.get(n, 0) + value for n, value in more.items()})
        write_json(path, spent)

    if s.privacy.on and not s.privacy.secure:
        spend(asked=1)
    total = _asked(session, source, classes, spend)
    if s.privacy.on and s.privacy.noise == "server":
        total += noise(s.privacy, classes, "server")
    # Noise can leave less than nothing of a class.
    q = smoothed(total.clamp(min=0.0))
    write_json(path, {**spent, "source": source, "q": q.tolist()})
    return q.tolist()


def _asked(session: Session, source: str, classes: int, spend: Callable[..., None]) -> Tensor:
    """Return the sum of the seen clients' answers."""
    s, what, grid, failures = session.settings, "label prior", session.grid, session.failures()
    seen = {member.node: member for member in training_base(session.members)}
    if not seen:
        raise UserError("No seen client is in the federation to ask for its label counts.")
    content = RecordDict({CONFIG: ConfigRecord({"source": source})})
    messages = [Message(content, node, ASK_LABELS) for node in seen]
    if s.privacy.secure:
        layout = labels_layout(classes, s.privacy, len(seen))
        noised = labels_noise(s.privacy, len(seen))

        def before_unmasking(names: list[str]) -> None:
            if noised:
                spend(rho=noised.rho(len(names), classes))

        secure = SecureSum(
            grid, list(seen.values()), s.privacy, s.federation.timeout, what, failures
        )
        found = secure.run(messages, fixed(layout), before_unmasking)
        return torch.from_numpy(found.values[LABELS])
    answers: dict[str, Tensor] = {}

    def check(member: Member, reply: Message) -> Tensor:
        return counts_in(reply, member, classes, s.privacy)

    timeout = s.federation.timeout
    for member, answer in read_replies(grid, messages, seen, timeout, what, check, failures):
        failures.usable(member.client)
        answers[member.client] = answer
    failures.check(len(answers), len(messages), what)
    # Sums of floats depend on their order: the names fix it.
    return torch.stack([answers[name] for name in sorted(answers)]).double().sum(dim=0)


def counts_in(reply: Message, member: Member, classes: int, privacy: PrivacySettings) -> Tensor:
    """Return what a client answered, C values.

    Raises:
        UserError: It is no answer, or more than the client's rows can give.
    """
    like = {LABELS: torch.empty(classes, device="meta")}
    answer = from_arrays(the_arrays(reply, ARRAYS), like, "its answer")[LABELS]
    noisy = privacy.on and privacy.noise == "client"
    most = 1.0 if privacy.on else float(member.examples)
    if not noisy and (bool((answer < 0).any()) or float(answer.sum()) > most * 1.001):
        raise UserError("its counts are negative, or add up to more than its rows.")
    return answer


def noise(settings: PrivacySettings, classes: int, whose: str) -> Tensor:
    """Return Gaussian noise for one answer or for the sum, of standard deviation z."""
    test = settings.test_seed
    draw = np.random.default_rng(None if test is None else derive_seed(test, "labels", whose))
    return torch.from_numpy(draw.normal(0.0, settings.noise_multiplier, classes))
