"""Says where the tokens of a run come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megaopus.data.mixture import parse_stages
from megaopus.data.schemes import SCHEMES
from megaopus.settings import FIXED, HARMLESS, TRAINING, address_refusal, setting

ORDERS = ("auto", "highest", "lowest")
SAMPLE = 1 << 20
"""Sequences of the pool that text features are fitted to, where there are more."""

HUB_NAME = "write hf:NAME for a data set of the hub"


def _no_addresses(sources: list[str]) -> str | None:
    found = ((source, address_refusal(source, SCHEMES)) for source in sources)
    return next((f"{source} {refusal[0]}" for source, refusal in found if refusal), None)


@dataclass(slots=True, kw_only=True)
class PrepareConfig:
    """Says what `prepare --data NAME` reads of configs/data/NAME.yaml; training does not."""

    RESUME: ClassVar[str] = HARMLESS

    sources: list[str] = setting(
        [],
        check=_no_addresses,
        hint=f"{HUB_NAME}; copy anything else here, or mount it, and name that path",
        doc="Each as `--source` takes it: [DOMAIN=]PATH, s3://BUCKET/PATH too, or hf:NAME[:CONFIG[:SPLIT]] on the "
        "Hugging Face hub; "
        "`,text=FIELD`, `,id=FIELD` and `,domain=FIELD` after it name fields of this source alone.",
    )
    exclude: list[str] = setting(
        [], doc="Globs of files and folders to leave aside in a source that is a folder, as `--exclude`."
    )
    folder_domains: bool = setting(False, doc="Sub-folders of a source name domains, as `--folder-domains`.")
    on_error: str = setting(
        "stop", choices=("stop", "skip"), doc="At a row that cannot be read: stop, or skip it and count it."
    )
    text_field: str = setting(
        "text", doc="Field of a table that holds the text; `doc.text` is the field text of what doc holds."
    )
    id_field: str = setting("id", doc="Field that names a document.")
    domain_field: str = setting("domain", doc="Field that names its domain.")
    keep: list[str] = setting([], doc="Fields to keep in the document table.")
    tokenizer: str | None = setting(None, schemes=(), doc="As `--tokenizer`; null: one is trained.")


@dataclass(slots=True, kw_only=True)
class FilterConfig:
    """Says which documents of the pool are trained on, by a score of each (docs/data.md)."""

    RESUME: ClassVar[str] = FIXED

    column: str | None = setting(
        None,
        doc="A score column: the NAME of `score --name`, or a field that `prepare --keep` kept; null: every document.",
    )
    keep: float | None = setting(
        None,
        above=0,
        max=1,
        doc="The best documents whose tokens are at most this fraction of the pool's; null: all within the bounds.",
        hint="0.3 keeps the best 30 % of the tokens",
    )
    at_least: float | None = setting(None, doc="The lowest score to keep.")
    at_most: float | None = setting(None, doc="The highest score to keep.")
    order: str = setting(
        "auto",
        choices=ORDERS,
        doc="Which scores are best: highest; lowest; auto: as the column says (perplexity's lowest, all others' "
        "highest).",
    )
    temperature: float | None = setting(
        None,
        above=0,
        doc="Draw documents for `keep` without replacement, chances as exp(score / temperature); null: take the best.",
        hint="1 draws as DSIR does; null takes the best",
    )
    per_domain: bool = setting(False, doc="Take the fraction `keep` of every domain's tokens by itself.")
    seed: int = setting(0, doc="Seed of the draw.")

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield ``(key, reason, remedy)`` for settings that do not go together."""
        given = [name for name in ("keep", "at_least", "at_most", "temperature") if getattr(self, name) is not None]
        if self.column is None:
            if given or self.per_domain:
                yield "column", "no column named for the filter", "data.filter.column=NAME (see 'score --help')"
            return
        if not set(given) & {"keep", "at_least", "at_most"}:
            yield "column", "nothing says which scores to keep", "data.filter.keep=0.3, or data.filter.at_least=2.5"
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            yield "at_least", f"above data.filter.at_most = {self.at_most}", "exchange them"
        for key in ("temperature", "per_domain"):
            if getattr(self, key) and self.keep is None:
                yield key, "says how data.filter.keep is taken, which is not set", "data.filter.keep=0.3"


def _stages(value: list[Any]) -> str | None:
    try:
        parse_stages(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """A prepared corpus (`python -m megaopus prepare`) and how it is cut into sequences."""

    RESUME: ClassVar[str] = TRAINING

    path: str = setting(
        "",
        check=lambda value: None if value else "no corpus named",
        schemes=SCHEMES,
        resume=FIXED,  # by the corpus's fingerprint: it may move
        doc="Folder of the prepared corpus: manifest.json, tokens.bin/.idx, documents.jsonl, tokenizer.json; "
        "s3://BUCKET/FOLDER: one in an object store.",
        hint="data.path=FOLDER made by 'python -m megaopus prepare'",
    )
    seq_len: int = setting(
        256, min=2, resume=FIXED, doc="Tokens per training sequence.", hint="256 suits a laptop, 1024 to 8192 a cluster"
    )
    first_token_loss: bool = setting(
        True,
        doc="Whether the first token of a document counts in the loss; nothing of the document foretells it.",
    )
    document_mask: bool = setting(
        False,
        doc="Documents that lie in one sequence do not see each other, and each begins at position 0; scoring and"
        " validation too. false: a token sees all that is before it in its sequence.",
    )
    target_domains: list[str] = setting(
        [],
        doc="Domains that training is for: the proxy comes from them, and the target loss, unless the proxy's corpus "
        "has a held-out target (`proxy --held-out`); empty: every domain.",
    )
    weights: list[Any] = setting(
        [],
        check=_stages,
        doc="Stages [[0, {DOMAIN: WEIGHT, ...}], [STEP, {...}], ...] of how often candidates are of each domain; one "
        "not named: never. Empty: every sequence alike.",
        hint="write 'data.weights=[[0,{books:2,code:1}],[1000,{books:1}]]'",
    )
    filter: FilterConfig = field(default_factory=FilterConfig)
    proxy_path: str | None = setting(
        None,
        schemes=SCHEMES,
        doc="Another prepared corpus to draw the proxy from, whose held-out target is the run's; null: the split "
        "'proxy' of `path`.",
    )
    text_features_path: str | None = setting(
        None,
        schemes=(),
        resume=HARMLESS,
        doc="Where text features of the sequences are kept (a prescreen needs them); null: beside `path`, in "
        "NAME.traits.",
    )
    text_features_sample: int = setting(
        SAMPLE,
        min=1,
        doc="Sequences of the pool that text features are fitted to: of so many n-grams are counted where there are "
        "more. A smaller pool is counted whole.",
        hint=f"{SAMPLE} (2^20) is usual",
    )
    validation_path: str | None = setting(
        None,
        schemes=SCHEMES,
        resume=HARMLESS,
        doc="Another prepared corpus to validate on; null: the split 'validation' of `path`.",
    )
    read_ahead_mb: int = setting(
        256,
        min=0,
        resume=HARMLESS,
        doc="Most MiB of tokens that each process keeps: of this step, and read ahead for the next; 0: none.",
        hint="256 holds 30000 sequences of 2048 tokens, of two steps together",
    )
    store_cache_mb: int = setting(
        1024,
        min=1,
        resume=HARMLESS,
        doc="Most MiB of each token file in an object store that each process keeps on this machine's disk, in "
        "MEGAOPUS_CACHE or ~/.cache/megaopus.",
    )
    store_patience_s: float = setting(
        600.0, min=0, resume=HARMLESS, doc="Seconds for which an object store that does not answer is asked again."
    )
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
