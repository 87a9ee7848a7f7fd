"""A client's generated texts: made, kept beside its adapters, and scored. Only the scores leave.

generations/<method>-r<rank>/<client>.json of the run folder (of a SuperNode's own folder in a
deployment): {"client", "language", "pool", "method", "rank",
"rows": [{"prompt", "reference", "generated"}]}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import nn

from fedp2eft.data.clients import check_client_name
from fedp2eft.files import write_json
from fedp2eft.progress import current
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.generation import Question, generate
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.text_scores import text_scores


def generation_path(run: Path, method: str, rank: int, client: str) -> Path:
    """Return the file of the texts that one client's model wrote with a method and budget."""
    check_client_name(client)
    return run / "generations" / str(AtBudget(method, rank)) / f"{client}.json"


def answering(
    workspace: Workspace, name: str, method: str, rank: int
) -> Callable[[nn.Module], Mapping[str, float]] | None:
    """Return a client's `ClientSide.answer`; None if the settings ask for no texts."""
    if not workspace.settings.evaluation.generate:
        return None

    def answer(model: nn.Module) -> Mapping[str, float]:
        s, client, reporter = workspace.settings, workspace.client(name), current()
        questions = _questions(workspace, name)
        texts = generate(
            model, workspace.tokenizer, questions,
            s.evaluation.max_new_tokens, s.local.eval_batch_size,
            partial(reporter.part, "personalize", text=f"{name} writes"),
        )  # fmt: skip
        if workspace.run is not None:
            rows = [
                {"prompt": asked.prompt, "reference": asked.reference, "generated": text}
                for asked, text in zip(questions, texts, strict=True)
            ]
            kept = {
                "client": name, "language": client.language, "pool": client.pool,
                "method": method, "rank": rank, "rows": rows,
            }  # fmt: skip
            write_json(generation_path(workspace.run, method, rank, name), kept)
        return text_scores(texts, [asked.reference for asked in questions])

    return answer


def _questions(workspace: Workspace, name: str) -> list[Question]:
    """Return the prompts of a client's test rows that leave room for a response."""
    task = workspace.task
    assert isinstance(task, CausalLM)  # the settings refuse another
    rows = workspace.data.texts_and_answers(
        workspace.client(name).test, workspace.settings.model.task
    )
    return list(task.questions(Prompts(workspace.tokenizer), *rows))
