"""The commands by name: their help, and the function behind each."""

from __future__ import annotations

from collections.abc import Callable

HELP = """\
usage: fedp2eft COMMAND [OPTIONS]

Federated personalization of language models: clients train a network together that predicts the
LoRA ranks each of them needs, and every client gets its own PEFT adapter.

  quickstart    run the whole pipeline on real text in a few minutes
  train         train base model and PSG, then personalize and score every client
  compare       compute a table of methods, base models, ranks and seeds, also in several processes
  report        write an HTML report of a run or comparison, and its figures
  show          print settings, progress and results of a run or comparison
  personalize   fit one client's adapter with a trained PSG
  evaluate      score a base model, with or without an adapter
  export        change the layout of an adapter: portable, compact or merged
  data          list, describe and partition data sets
  doctor        print what this machine has and what a run will use
  completion    print a completion script for bash, zsh or fish

fedp2eft COMMAND --help shows the options. Start with: fedp2eft quickstart
"""
GROUP_HELP = {
    "data": """\
usage: fedp2eft data list | describe | partition [OPTIONS]

  list          list the data sets
  describe      show clients, rows and labels of a data set
  partition     write which row belongs to which client, as JSON
"""
}
EXPERIMENTS = ("quickstart", "train", "compare")
"""Commands whose options are the settings; functions of `fedp2eft.commands.run`."""
FUNCTIONS = {
    "report": ("report", "report"),
    "show": ("report", "show"),
    "personalize": ("adapters", "personalize"),
    "evaluate": ("adapters", "evaluate"),
    "export": ("adapters", "export"),
    "data list": ("datasets", "list_datasets"),
    "data describe": ("datasets", "describe"),
    "data partition": ("datasets", "partition"),
    "doctor": ("doctor", "doctor"),
    "completion": ("completion", "completion"),
}
"""Commands whose options are a function's arguments: module of `fedp2eft.commands`, function."""
WATCH_HELP = "keep report.html of the run folder up to date during the run"
POSITIONAL = ("completion", "report", "show")
"""Commands of `FUNCTIONS` whose required arguments are positional."""


def function_of(command: str) -> Callable[..., None]:
    """Return the function that a command calls."""
    from importlib import import_module

    module, name = FUNCTIONS.get(command, ("run", command))
    function: Callable[..., None] = getattr(import_module(f"fedp2eft.commands.{module}"), name)
    return function
