"""Sends a pruned checkpoint to the Hub: what `verify` does not pass is not sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

import llmprune
from llmprune import hub
from llmprune.errors import Failure, UserError
from llmprune.model.source import CARRIED
from llmprune.model.writer import ALLOCATION, JOURNAL, PAGE
from llmprune.progress import Progress, Silent
from llmprune.report import page
from llmprune.report.card import is_ours, known_results, known_speed, make_card, marked
from llmprune.report.private import ANSWERS, OWN_PLACE, RECORDS, TOKENIZER, Names
from llmprune.report.results import find_dense, read_results, read_run, read_speed
from llmprune.report.verify import Verdict, read_report, verify

LEFT_OUT = [
    *(".*", "*/.*", JOURNAL, f"*/{JOURNAL}", "lm_eval.json", "*/lm_eval.json"),
    *("request.json", "*/request.json", "points/*.json", "*/points/*.json"),
    *(f"*/{PAGE}", "*/sweep.html", "*/search.html"),
]
"""Drafts, locks, journals, what lm-eval says of each single document, what sweeps and searches keep to go on with, and
pages of other runs in inner folders."""

OUTDATED = ["model.safetensors", "model-?????-of-?????.safetensors"]
"""Weights that are taken out of the repository where OUT has none of that name: `model.safetensors` of an earlier push
would be loaded instead of the shards."""

CARD = "README.md"

Card = Literal["keep", "new"]


@dataclass
class Pushed:
    """What was sent, or for a dry run would be.

    Attributes:
        to: the repository, owner/name.
        url: of the commit; None for a dry run.
        commit: its hash.
        pull_request: its address, where one was opened.
        files: name to bytes.
        card: the README.md.
        notes: what the user should know.
    """

    to: str
    files: dict[str, int]
    card: str
    notes: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dict(vars(self))


def push(
    folder: str | Path,
    to: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: Card = "keep",
    base_model: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Verify a pruned checkpoint, write its model card, and send it to the Hub.

    Sending goes on where an earlier call was cut off: files that have arrived are not sent again.

    Args:
        folder: written by `prune`.
        to: the repository, owner/name; it is made where there is none.
        private: make it a private one.
        revision: the branch; it is made where there is none.
        create_pr: open a pull request against the main branch instead.
        card: `keep` a README.md in the folder that was written or changed by hand, or write a `new` one over it.
        base_model: the dense model's name on the Hub, where the run does not know it.
        license: for the card, instead of that of the dense model.
        dry_run: send nothing and write nothing.
        trust_remote_code: run code that comes with the model, to verify it.
        progress: where to show how far the work is.

    Raises:
        UserError: the folder, the token or the repository does not allow it; nothing was sent.
        Failure: the checkpoint is not as promised (then nothing was sent either), or sending broke off.
    """
    hub.check_name(to)
    if create_pr and revision is not None:
        raise UserError("a pull request is opened against the main branch: give --create-pr or --revision, not both")
    place, shown = Path(folder).expanduser(), progress or Silent()
    read_report(place)  # before the Hub is asked
    if not dry_run:
        with shown.waiting("asking the Hub"):
            hub.check_may_write(to, private=private, create_pr=create_pr)
    verdict = verify(place, progress=shown, trust_remote_code=trust_remote_code)
    if not verdict.ok:
        raise Failure(f"nothing was pushed: {verdict.problems[0]} (`llmprune verify {folder}` shows all)")
    pushed = Pushed(to, {}, "")
    if verdict.changed:
        pushed.notes.append("the weights were changed since they were pruned: figures of the run are not on the card")
    with _for_others(place, verdict.shards, trust_remote_code) as ready:
        if card == "keep" and (own := _own_card(place)) is not None:
            pushed.card = own
            pushed.notes.append(f"{CARD} was written or changed by hand and is kept (--card new writes a new one)")
        else:
            pushed.card = _new_card(ready, to, verdict, base_model, license, pushed.notes)
            for folder_of_card in (ready,) if dry_run else (ready, place):
                _write(folder_of_card / CARD, pushed.card)
        pushed.files = _files(ready)
        if not dry_run:
            _send(ready, pushed, private, revision, create_pr)
    return pushed


def _own_card(place: Path) -> str | None:
    """The text of a README.md that is none of ours, or no longer."""
    if not (place / CARD).is_file():
        return None
    text = (place / CARD).read_text(encoding="utf-8")
    return None if is_ours(text) else text


def _new_card(
    ready: Path, to: str, verdict: Verdict, base_model: str | None, license: str | None, notes: list[str]
) -> str:
    """A card of what is sent, which tells no more of this machine than that does."""
    report = read_report(ready)
    base = _base(report, base_model, license, notes)
    results = known_results(ready, report, verdict.shards)
    speed = known_speed(read_speed(ready), verdict.shards)
    return marked(make_card(report, results, to, base, bool(verdict.changed), speed))


@contextmanager
def _for_others(place: Path, shards: dict[str, str], trusted: bool) -> Iterator[Path]:
    """A folder that has what is sent: links to the files, and new ones instead of those that tell of this machine."""
    with ExitStack() as stack:
        try:
            ready = Path(stack.enter_context(TemporaryDirectory(prefix="llmprune-push-")))
            _fill(ready, place, shards, trusted)
        except OSError as error:
            raise Failure(f"what is to be sent cannot be put together: {error}; nothing was pushed") from None
        yield ready


def _fill(ready: Path, place: Path, shards: dict[str, str], trusted: bool) -> None:
    files = list(_files(place))
    told = {file: _read(place / file) for file in files if Path(file).name in (*RECORDS, TOKENIZER)}
    looked = {file: _of_places(data) if Path(file).name == TOKENIZER else data for file, data in told.items()}
    names = Names(looked, [Path.cwd(), *place.resolve().parents])
    new: dict[str, str] = {}
    for file, data in looked.items():
        clean = names(data, answers=Path(file).name == ANSWERS)
        if clean != data:
            new[file] = json.dumps(clean if data is told[file] else {**told[file], **clean}, indent=2) + "\n"
    new |= {file: names((place / file).read_text(encoding="utf-8")) for file in files if Path(file).name == ALLOCATION}
    for file in files:
        (ready / file).parent.mkdir(parents=True, exist_ok=True)
        if file in new:
            (ready / file).write_text(new[file], encoding="utf-8")
        else:
            (ready / file).symlink_to((place / file).resolve())
    if PAGE in files:  # it says where the folder lies, and may show linears that were asked for
        source = find_dense(read_run(place), trusted)
        results = read_results(ready, shards)
        results.report.out = Path(place.resolve().name)
        linears = page.drawn_on((place / PAGE).read_text(encoding="utf-8"), results.report)
        drawn, _ = page.made(ready, results, source, linears, trusted)
        (ready / PAGE).unlink()
        (ready / PAGE).write_bytes(drawn)


def _of_places(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer's config says of its own place."""
    return {key: data[key] for key in OWN_PLACE if key in data}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}; nothing was pushed") from None


def _send(place: Path, pushed: Pushed, private: bool, revision: str | None, create_pr: bool) -> None:
    to, api = pushed.to, hub.client()
    try:
        ModelCard(pushed.card).validate()
        if not create_pr:
            api.create_repo(to, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(to, branch=revision, exist_ok=True)
        sent = api.upload_folder(
            repo_id=to,
            folder_path=place,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=list(LEFT_OUT),
            delete_patterns=OUTDATED,
            commit_message=f"Upload a model pruned with llmprune {llmprune.__version__}",
        )
    except Exception as error:
        raise hub.failed(error, to, f"pushing to {to}") from None
    pushed.url, pushed.commit, pushed.pull_request = sent.commit_url, sent.oid, sent.pr_url


def _files(place: Path) -> dict[str, int]:
    """What would be sent, with its size in bytes."""
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    return {name: (place / name).stat().st_size for name in filter_repo_objects(names, ignore_patterns=LEFT_OUT)}


def _base(report: Mapping[str, Any], base_model: str | None, license: str | None, notes: list[str]) -> dict[str, Any]:
    """What the dense model's card says: as the run noted it, or else as the Hub tells."""
    base = dict(report.get("base") or {})
    if base_model is not None:
        hub.check_name(base_model)
        base = base if base.get("name") == base_model else {"name": base_model}
    name = base.get("name")
    if name and "license" not in base:
        try:
            told = HfApi().model_info(name).card_data
            base |= {key: told.get(key) for key in CARRIED if told and told.get(key)}
        except Exception as error:
            notes.append(str(hub.failed(error, name, f"asking for the card of {name}")))
    if license is not None:
        base = {key: value for key, value in base.items() if not key.startswith("license")} | {"license": license}
    if not name:
        notes.append("the dense model's name on the Hub is not known and not on the card (--base-model owner/name)")
    if "license" not in base:
        notes.append("the licence of the dense model is not known and not on the card (--license NAME)")
    return base


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.rename(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise Failure(f"the model card cannot be written to {path}: {error.strerror}; nothing was pushed") from None
