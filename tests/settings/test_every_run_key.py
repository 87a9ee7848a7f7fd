"""Every key of the other sections of the settings: changing it changes what a run leaves.

The cases are made from the types, so that a new key fails here until it has another value in
`OTHER`, or the name of a test in `SHOWN` that shows what it does without changing a result.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fedp2eft.experiment.train import train
from fedp2eft.settings.reading import settings_class
from tiny_run import World, outcome

TESTS = Path(__file__).parents[1]
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef
OTHER: dict[str, Any] = {
    "seed": 4,
    "model.seed": 1,
    "model.precision": "bf16",
    "base.kind": "fedit",
    "base.rounds": 2,
    "base.clients_per_round": 1,
    "base.epochs": 2,
    "base.steps": 3,
    "base.batch_size": 4,
    "base.lr": 1e-3,
    "base.schedule": "cosine",
    "base.train_embeddings": False,
    "base.target_modules": ["classifier"],
    "base.lora_rank": 2,
    "base.lora_alpha": 2.0,
    "base.lora_dropout": 0.5,
    "base.logit_adjustment": "own",
    "adapter.r_max": 3,
    "adapter.scaling": 1.0,
    "adapter.target_modules": ["query"],
    "adapter.lambda_min": 0.9,
    "adapter.lambda_max": 0.4,
    "adapter.layerwise": True,
    "adapter.seed": 1,
    "generator.hidden_multiplier": 1,
    "generator.init_lambda": 0.2,
    "generator.log_quantity": True,
    "generator.label_features": True,
    "generator.feature_tokens": 6,
    "generator.steps": 1,
    "generator.lr": 1e-3,
    "generator.seed": 1,
    "local.epochs": 2,
    "local.batch_size": 4,
    "local.accumulate": 2,
    "local.lr": 1e-3,
    "local.lambda_lr": 0.01,
    "local.personalize_lr": 1e-3,
    "local.personalize_epochs": 1,
    "local.alpha_task": 0.5,
    "local.alpha_s": 1.0,
    "local.alpha_p": 1.0,
    "local.max_grad_norm": 1e-3,
    "local.dropout": False,
    "local.logit_adjustment": "own",
    "local.label_prior": "uniform",
    "local.max_length": 3,
    "federation.rounds": 2,
    "federation.clients_per_round": 1,
    "federation.profile": "reference",
    "federation.wire": "int8",
    "aggregation.kind": "fedyogi",
    "aggregation.server_lr": 0.1,
    "aggregation.momentum": 0.1,
    "aggregation.beta1": 0.1,
    "aggregation.beta2": 0.1,
    "aggregation.tau": 0.5,
    "privacy.clipping": "adaptive",
    "privacy.noise_multiplier": 2.0,
    "privacy.lambda_max": 0.4,
    "privacy.clip_norm": 0.01,
    "privacy.quantile": 0.9,
    "privacy.clip_lr": 1.0,
    "privacy.delta": 1e-3,
    "privacy.epsilon": 1e-3,
    "privacy.test_seed": 2,
    "evaluation.methods": ["base"],
    "evaluation.ranks": [1],
    "evaluation.budget": "parameters",
    "evaluation.pools": ["unseen"],
    "evaluation.save_adapters": False,
    "evaluation.layout": "compact",
    "fedl2p.rounds": 2,
    "fedl2p.rank": 1,
    "fedl2p.hidden": 5,
    "fedl2p.steps": 1,
    "fedl2p.validation": 0.5,
    "fedl2p.hyper_lr": 0.5,
    "fedl2p.terms": 1,
    "fedl2p.meta_lr": 1e-2,
    "fedl2p.lr_lr": 1e-3,
    "fedl2p.init_lr": 1e-2,
    "fedl2p.seed": 1,
    "adalora.lr": 1e-2,
    "adalora.orth": 5.0,
    "adalora.tinit": 0.4,
    "adalora.init_multiple": 2.0,
    "tuning.lrs": [1e-2],
    "tuning.scales": [3.0],
    "tuning.taus": [1.5],
}
"""Setting -> a value that is not the tiny run's."""
BESIDE: dict[str, dict[str, Any]] = {
    "fedl2p": {
        "evaluation__methods": ["fedl2p"],
        "fedl2p__rounds": 1,
        "fedl2p__rank": 2,
        "fedl2p__steps": 2,
        "federation__rounds": 0,
    },
    "adalora": {
        "evaluation__methods": ["adalora"],
        "federation__rounds": 0,
        "local__batch_size": 2,
    },
    "tuning": {
        "evaluation__methods": ["lora-tuned", "fedp2eft-tuned", "label-prior"],
        "tuning__lrs": [1e-3, 3e-2],
        "tuning__taus": [0.5],
        "federation__rounds": 0,
    },
    "base": {
        "base__kind": "standard-fl",
        "base__rounds": 1,
        "federation__rounds": 0,
        "evaluation__methods": ["base"],
    },
    "base.lora": {"base__kind": "fedit"},
    "base.schedule": {"base__rounds": 2},
    "aggregation": {"aggregation__kind": "fedadam", "federation__rounds": 2},
    "aggregation.momentum": {"aggregation__kind": "fedavgm"},
    "local.label_prior": {"local__logit_adjustment": "own"},
    "privacy": {"privacy__clipping": "fixed", "privacy__test_seed": 1},
    "privacy.quantile": {"privacy__clipping": "adaptive", "federation__rounds": 2},
    "privacy.clip_lr": {"privacy__clipping": "adaptive", "federation__rounds": 2},
}
"""Beginning of a setting's name -> what the two runs that differ by it have beside."""
SHOWN: dict[str, str] = {
    "base.held_out": "federation/test_held_out_clients.py::test_a_run_with_held_out_clients",
    "auto.kinds": "methods/test_auto.py::test_candidates_come_cheapest_first",
    "auto.lrs": "methods/test_auto.py::test_candidates_come_cheapest_first",
    "auto.epochs": "methods/test_auto.py::test_candidates_come_cheapest_first",
    "auto.ranks": "methods/test_auto.py::test_candidates_come_cheapest_first",
    "auto.folds": "methods/test_auto.py::test_more_folds_leave_more_rows_to_train_on",
    "auto.guard": "methods/test_auto.py::test_guard_turns_a_harmful_adapter_down",
    "auto.hold_out": "methods/test_auto.py::test_half_check_never_costs_more_than_one_fine_tuning",
    "auto.try_adapter": "methods/test_auto.py::test_a_client_tries_the_best_adapter_itself",
    "auto.min_rows": "methods/test_auto.py::test_clients_answer_sums_alone",
    "auto.noise": "methods/test_auto.py::test_guard_turns_a_harmful_adapter_down",
    "model.name": "runtime/test_inputs.py::test_a_change_of_the_model_is_named",
    "model.revision": "models/test_model_sources.py::test_branch_is_fixed_to_its_commit_and_found_"
    "again_offline",
    "model.task": "models/test_model_loading.py::test_encoder_is_no_causal_lm",
    "model.quantize": "models/test_quantized.py::test_the_settings_quantize_the_base_that_adapters"
    "_sit_on",
    "model.gradient_checkpointing": "models/test_quantized.py::test_gradient_checkpointing_computes"
    "_blocks_twice_and_changes_no_number",
    "model.states_mib": "client/test_kept_states.py::test_a_cohort_in_which_one_client_has_too_"
    "much_text_is_computed_whole",
    "model.device": "commands/test_bad_input.py::test_yaml",
    "local.eval_batch_size": "adapters/test_causal_layers.py::test_features_are_of_prompt_and_"
    "response_without_padding",
    "federation.keep_checkpoints": "federation/test_run_folders.py::test_what_only_adds_to_a_run_"
    "may_change",
    "federation.timeout": "federation/test_faults.py::test_a_late_reply_is_left_out_and_ignored_"
    "when_it_comes",
    "federation.min_clients": "federation/test_faults.py::test_too_few_clients_are_waited_for_and_"
    "given_up",
    "federation.wait": "federation/test_faults.py::test_too_few_clients_are_waited_for_and_given_"
    "up",
    "federation.cohort": "federation/test_cohort_round.py::test_a_federation_in_cohorts_is_the_one_"
    "of_single_clients",
    "peers.failures": "federation/test_admission.py::test_a_failure_on_the_local_engine_stops_the_"
    "run",
    "peers.min_share": "federation/test_admission.py::test_a_round_needs_its_share_of_clients",
    "peers.quarantine": "federation/test_faults.py::test_quarantine_can_be_off",
    "peers.max_norm": "federation/test_admission.py::test_norms_are_compared_with_the_median_of_"
    "the_round",
    "peers.max_examples": "federation/test_admission.py::test_examples_count_up_to_a_multiple_of_"
    "the_median",
    "aggregation.hostile": "federation/test_aggregation.py::test_each_kind_computes_what_it_is_"
    "named_for",
    "privacy.clip_on": "federation/test_dp.py::test_no_larger_change_leaves_where_clients_clip",
    "privacy.noise": "federation/test_dp.py::test_what_leaves_is_mostly_noise_where_clients_add_it",
    "privacy.sampling": "federation/test_dp.py::test_a_secret_sample_is_another_each_time",
    "privacy.secure_sums": "federation/test_secure_rounds.py::test_a_run_with_secure_sums_is_the_"
    "plain_one",
    "privacy.secure_neighbors": "federation/test_secure_masks.py::test_neighbors_are_mutual_and_as_"
    "many_as_asked",
    "privacy.secure_threshold": "federation/test_secure_masks.py::test_the_threshold_is_a_share_of_"
    "the_neighbors",
    "privacy.secure_clip": "federation/test_secure_rounds.py::test_changes_and_weights_are_cut_and_"
    "counted",
    "privacy.secure_bits": "federation/test_secure_rounds.py::test_the_average_is_the_plain_one",
    "privacy.secure_max_examples": "federation/test_secure_rounds.py::test_changes_and_weights_are_"
    "cut_and_counted",
    "evaluation.generate": "experiment/test_generated_texts.py::test_settings_that_cannot_be",
    "evaluation.max_new_tokens": "experiment/test_generated_texts.py::test_more_text_than_the_model"
    "_reads_is_said_before_training",
    "fedl2p.patience": "federation/test_fedl2p_rounds.py::test_when_the_validation_loss_has_"
    "stalled",
    "adalora.tfinal": "methods/test_adalora.py::test_every_schedule_drops_ranks",
    "tuning.holdout": "methods/test_tuned.py::test_trials_see_the_same_rows_and_never_the_test",
    "compare.bases": "experiment/test_compare.py::test_the_plan_is_the_product",
    "compare.seeds": "experiment/test_compare.py::test_the_plan_is_the_product",
    "trackers": "federation/test_tracking.py::test_tensorboard_shows_rounds_and_results",
}
"""Settings that change no result, or none that a tiny run has: the test that shows what they do."""


def keys(kind: type, where: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from keys(hints[item.name], f"{item.name}.")
        else:
            yield where + item.name


KEYS = [key for key in keys(settings_class()) if not key.startswith("data.")]


@pytest.fixture(scope="module")
def runs(world: World, three_clients: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a tiny run with changes leaves, computed once."""
    home, kept = tmp_path_factory.mktemp("runs"), {}

    def run(changes: dict[str, Any]) -> Any:
        told = json.dumps(changes, sort_keys=True)
        if told not in kept:
            small = {
                "data__path": str(three_clients), "base__kind": "none", "federation__rounds": 1,
                "evaluation__ranks": [2], "evaluation__methods": ["fedp2eft"],
            }  # fmt: skip
            folder = home / str(len(kept))
            train(world.settings(**(small | changes)), folder)
            kept[told] = {  # numbers: a setting that is only written down does nothing
                name: value if name.endswith((".safetensors", ".jsonl")) or "cells/" in name else ""
                for name, value in outcome(folder).items()
            }
        return kept[told]

    return run


@pytest.mark.parametrize("key", sorted(OTHER))
def test_every_setting_changes_the_numbers_of_a_run(runs: Any, key: str) -> None:
    beside: dict[str, Any] = {}
    for beginning in sorted(BESIDE, key=len):
        if key.startswith(beginning):
            beside |= BESIDE[beginning]
    assert runs(beside | {key.replace(".", "__"): OTHER[key]}) != runs(beside)


def test_every_setting_is_among_the_cases_or_shown_by_a_test() -> None:
    assert sorted(KEYS) == sorted([*OTHER, *SHOWN])
    for key, where in SHOWN.items():
        file, name = where.split("::")
        text = with_what_it_uses((TESTS / file).read_text(encoding="utf-8"), name)
        assert text, f"{key}: no test {where}"
        assert re.search(rf"\b(\w+__)?{key.rpartition('.')[2]}\b", text), f"{where} has no {key}"


def with_what_it_uses(file: str, name: str) -> str:
    """Source of a test, and of the fixtures, functions and constants of its file that it names."""
    known: dict[str, ast.stmt] = {}
    for node in ast.parse(file).body:
        if isinstance(node, DEFINITION):
            known[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            known |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    used, found = [name], {}
    while used:
        if (one := used.pop()) in known and one not in found:
            found[one] = ast.unparse(known[one])
            used += re.findall(r"\w+", found[one])
    return "\n".join(found.values()) if name in found else ""
