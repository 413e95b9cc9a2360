"""Everything that can be wrong with a data set, once: its name, how bad it is, and what to do about it.

An error of a row leaves the row out; an error of the set is a fault of template or tokenizer that touches every row,
and stops the run; a warning is worth a look. Any of them can be allowed by its name. docs/reference/findings.md is
made from this list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import UsageError

ROW, SET, WARNING = "error", "error of the set", "warning"
EXAMPLES_KEPT = 20


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    severity: str
    title: str
    advice: str


CATALOGUE: dict[str, Kind] = {
    "unreadable": Kind(
        ROW,
        "rows that cannot be read",
        "Mend or delete them: UTF-8, one object a line in JSON lines, as many cells as the header in a table.",
    ),
    "unknown-format": Kind(ROW, "rows of no known format", "Rename the columns with --columns canonical=yours."),
    "wrong-shape": Kind(
        ROW, "rows whose values have the wrong shape", "Mend these values; the data guide shows each format."
    ),
    "wrong-role": Kind(ROW, "rows with an unknown role", "Use system, developer, user, assistant and tool."),
    "empty-answer": Kind(ROW, "rows with an empty answer", "Delete them, or write the answer that is wanted."),
    "nothing-trained": Kind(
        ROW, "rows in which nothing would be trained", "Check --train-on and the weights of the messages."
    ),
    "control-tokens": Kind(
        ROW,
        "rows whose text contains control tokens of the tokenizer",
        "Such text would end or fake a turn. Remove it, or keep it on purpose with --allow control-tokens.",
    ),
    "template-refuses": Kind(
        ROW, "rows that the chat template refuses", "The template's own words say what it cannot print."
    ),
    "mask-unclear": Kind(
        ROW,
        "rows whose trained tokens cannot be told apart",
        "The template prints earlier turns differently later on. Try --train-on last, or split the conversation.",
    ),
    "answer-missing": Kind(
        ROW,
        "rows whose answer the chat template does not print",
        "The template expects another shape of message (parts, or a field of its own), or belongs to another model.",
    ),
    "masks-disagree": Kind(
        ROW,
        "rows in which the template's marks and its renderings disagree about what is an answer",
        "The {% generation %} marks of the template are wrong for these rows; mend or remove them.",
    ),
    "too-long": Kind(ROW, "rows too long to keep any of their answer", "Raise --max-length, or shorten the rows."),
    "chosen-equals-rejected": Kind(ROW, "pairs whose two answers are equal", "They teach nothing; delete them."),
    "prompts-differ": Kind(ROW, "pairs whose two prompts differ", "Both answers must follow the same prompt."),
    "no-rows": Kind(SET, "data without a usable row", "Check that this is the file you mean, and the findings above."),
    "end-of-turn": Kind(
        SET,
        "answers that do not end in a control token, so the model would never learn to stop",
        "Use the template that belongs to the base, or give it an end-of-turn token.",
    ),
    "double-bos": Kind(
        SET, "rows that begin with two BOS tokens", "Remove the BOS from the template or from the texts."
    ),
    "missing-bos": Kind(
        SET, "rows without the BOS token that this tokenizer puts first", "Add bos_token to the template."
    ),
    "foreign-template": Kind(
        SET,
        "control words of the chat template that this tokenizer does not know as tokens",
        "The template belongs to another model: give the base its own (chat_template.jinja in its folder).",
    ),
    "unknown-tokens": Kind(
        WARNING, "rows with text that the tokenizer cannot express", "It becomes the unknown token."
    ),
    "not-round-trip": Kind(
        WARNING,
        "rows whose text does not come back from its tokens",
        "The tokenizer normalises text; the model will write the normalised form.",
    ),
    "answer-cut": Kind(
        WARNING, "rows cut within an answer", "The model does not see how these answers end; raise --max-length."
    ),
    "duplicate": Kind(
        WARNING, "rows that occur more than once", "They count several times; delete copies unless that is meant."
    ),
    "overlap": Kind(
        WARNING, "validation rows that are also training rows", "The validation loss would be too good; part the files."
    ),
    "repeated-role": Kind(
        WARNING,
        "rows with two turns of the user or the assistant in a row",
        "Join them, or check where a turn was lost.",
    ),
    "generation-prompt": Kind(
        WARNING,
        "rows whose answer does not begin where the generation prompt ends",
        "At use the model is asked with a prompt that training never shows; see one with `deltaw data show`.",
    ),
    "not-printed": Kind(
        WARNING,
        "rows of which the template leaves something out",
        "The model never sees that message or thought; move it to where the template prints it.",
    ),
    "tools-missing": Kind(
        WARNING,
        "rows whose tools the chat template does not print",
        "The model would learn calls without seeing what may be called; use a base whose template prints tools.",
    ),
    "empty-source": Kind(WARNING, "files without rows", "Check that these are the files you mean."),
    "mixed-formats": Kind(
        WARNING, "files with rows of several formats", "Check that every row was understood as meant."
    ),
    "mostly-context": Kind(
        WARNING, "sets of which less than 1 % is trained", "Most of the time goes into context; shorten it if you can."
    ),
}


@dataclass
class Found:
    """One kind of finding in one data set: how often, in which rows, and what some of them say."""

    code: str
    count: int = 0
    rows: list[tuple[str, int]] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """What the catalogue says of it."""
        return CATALOGUE[self.code]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every row, as [file, row]."""
        return {
            "code": self.code,
            "severity": self.kind.severity,
            "title": self.kind.title,
            "advice": self.kind.advice,
            "count": self.count,
            "rows": [list(row) for row in self.rows],
            "examples": self.examples,
        }


class Findings:
    """What was found in a data set, by code, in the order of the catalogue; `allowed` ones never stop a run."""

    def __init__(self, allowed: Collection[str] = ()) -> None:
        self.allowed = frozenset(allowed)
        self._found: dict[str, Found] = {}

    def add(self, code: str, file: str = "", row: int = 0, what: str = "") -> None:
        """One more occurrence; row 0 stands for the whole file, or set."""
        assert code in CATALOGUE, code
        found = self._found.setdefault(code, Found(code))
        found.count += 1
        if file:
            found.rows.append((file, row))
        if what and len(found.examples) < EXAMPLES_KEPT:
            place = f"{file}, row {row}: " if row else f"{file}: " if file else ""
            found.examples.append(place + what)

    def __iter__(self) -> Any:
        return iter(sorted(self._found.values(), key=lambda found: list(CATALOGUE).index(found.code)))

    def count(self, code: str) -> int:
        """How often this was found."""
        return self._found[code].count if code in self._found else 0

    def errors(self) -> list[Found]:
        """Errors of rows and of the set that are not allowed."""
        return [found for found in self if found.kind.severity != WARNING and found.code not in self.allowed]

    def errors_of_the_set(self) -> list[Found]:
        """Errors of the set that are not allowed."""
        return [found for found in self.errors() if found.kind.severity == SET]

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [{**found.as_dict(), "allowed": found.code in self.allowed} for found in self]

    @classmethod
    def from_list(cls, entries: Iterable[dict[str, Any]], allowed: Collection[str]) -> Findings:
        """What `as_list` gave, with another set of allowed ones."""
        findings = cls(allowed)
        for entry in entries:
            rows = [(str(file), int(row)) for file, row in entry["rows"]]
            findings._found[entry["code"]] = Found(entry["code"], entry["count"], rows, list(entry["examples"]))
        return findings


def refuse_unknown(names: Iterable[str]) -> None:
    """Raises UsageError when one of the names that shall be allowed is no finding."""
    if unknown := [name for name in names if name not in CATALOGUE]:
        raise UsageError(f"No such finding: {', '.join(unknown)}. There are: {', '.join(CATALOGUE)}.")
