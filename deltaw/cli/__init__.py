"""The command line: parse, one call of the api, print. Heavy imports stand inside the verbs, so that --help is instant.

Results go to stdout, talk to stderr. Exit codes are drawn in deltaw/errors.py.
"""

from deltaw.cli import adapters, data, runs
from deltaw.cli.group import main

# As --help lists them; the modules stand in the order of the alphabet.
_VERBS = (
    *("demo", "train", "plan", "sweep", "eval", "generate", "chat", "merge"),
    *("inspect", "rank", "compress", "combine", "verify", "bench", "doctor", "data"),
)
assert set(main.commands) == set(_VERBS)
main.commands = {name: main.commands[name] for name in _VERBS}

__all__ = ["adapters", "data", "main", "runs"]
