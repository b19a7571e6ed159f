"""What the Hub's answers mean for a user, and whether an account may write; the token itself is never shown."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

import llmprune
from llmprune.errors import Failure, LLMPruneError, UserError

LOG_IN = "`hf auth login` or HF_TOKEN"

_TOKEN = re.compile(r"\b(hf_|api_org_)\w{8,}")


def client() -> HfApi:
    """The Hub's client, which sends the token of `hf auth login` or HF_TOKEN and refuses to go without one."""
    return HfApi(token=True, library_name="llmprune", library_version=llmprune.__version__)


def without_token(text: str) -> str:
    """A text in which no token stands."""
    token = get_token()
    return _TOKEN.sub("(token)", text.replace(token, "(token)") if token else text)


def failed(error: BaseException, name: str, doing: str) -> LLMPruneError:
    """What to tell a user of an error of the Hub's client.

    Args:
        error: as the client raised it; what caused it tells more.
        name: the repository.
        doing: what was tried, such as "downloading owner/name".
    """
    causes = list(_causes(error))
    refused = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    kinds = tuple(type(cause) for cause in causes)

    def any_is(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if any_is(LocalTokenNotFoundError):
        return UserError(f"{doing} needs a token of yours: {LOG_IN}")
    if any_is(GatedRepoError):
        return UserError(f"{name} is gated: accept its terms on its Hub page, then log in with {LOG_IN}")
    if any_is(RevisionNotFoundError):
        return UserError(f"{doing} failed: {name} has no such revision on the Hub")
    if any_is(HFValidationError):
        return UserError(f"{name!r} cannot be the name of a repository on the Hub (owner/name)")
    if any_is(RepositoryNotFoundError):
        return UserError(f"{doing} failed: there is no {name} on the Hub that your token may see ({LOG_IN})")
    if refused is not None:
        return _refused(refused, doing)
    if any_is(LocalEntryNotFoundError, OfflineModeIsEnabled):
        return Failure(f"{doing} failed: the Hub cannot be reached: check the connection (and HF_HUB_OFFLINE)")
    said = next((str(cause) for cause in reversed(causes) if str(cause).strip()), type(error).__name__)
    return Failure(f"{doing} failed: {_line(said)}; run the same command again to go on with it")


def _refused(error: HfHubHTTPError, doing: str) -> LLMPruneError:
    code = error.response.status_code
    said = _line(error.server_message or str(error))
    if code == 401:
        origin = next(filter(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")), "`hf auth login`")
        return UserError(
            f"{doing} failed: the Hub does not take the token from {origin} (401), which is wrong or has expired: "
            f"make a new one at https://huggingface.co/settings/tokens, then {LOG_IN}"
        )
    if code == 403 and _of_storage(error):
        return Failure(
            f"{doing} failed: the storage behind the Hub refused it (403): {said}; the addresses there are good for a "
            "while only: run the same command again to go on with it"
        )
    if code == 403:
        return UserError(f"{doing} is not allowed with this token (403): {said}; {LOG_IN} with one that may")
    if code == 429:
        when = _when(error.response.headers.get("Retry-After", "").strip())
        return Failure(f"{doing} failed: too many requests for now (429); run the same command again {when}")
    if code >= 500:
        return Failure(f"{doing} failed: the Hub is in trouble ({code}); run the same command again later")
    return Failure(f"{doing} failed ({code}): {said}")


def _of_storage(error: HfHubHTTPError) -> bool:
    """Whether an answer is of the service where large files lie: it sees no token, and is at another host."""
    asked, own = urlsplit(str(error.response.url)), urlsplit(constants.ENDPOINT)
    return (asked.hostname, asked.port) != (own.hostname, own.port)


def _when(told: str) -> str:
    """What a Retry-After says: seconds or a date."""
    if told.isdigit():
        return f"in {told} s"
    with contextlib.suppress(ValueError, TypeError):
        return f"after {parsedate_to_datetime(told):%Y-%m-%d %H:%M:%S %Z}"
    return "in some minutes"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _line(text: str) -> str:
    """A text as one line without a token."""
    return without_token("; ".join(line.strip() for line in text.splitlines() if line.strip()))


def check_may_write(to: str, *, private: bool = False, create_pr: bool = False) -> None:
    """See that a repository can be pushed to, before any work.

    Nothing is created. What a fine-grained token may do in a place where there is no repository yet is not known
    before it is made.

    Args:
        to: owner/name.
        private: it is to be private.
        create_pr: a pull request is to be opened, which needs no right to write.

    Raises:
        UserError: there is no token, it is wrong, or it may not write there.
        Failure: the Hub cannot be asked.
    """
    check_name(to)
    doing = f"pushing to {to}"
    api = client()
    try:
        account = api.whoami()
        token: dict[str, Any] = account.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise UserError(f"{doing} needs a token that may write, and yours may only read: {LOG_IN} with another")
        exists = _look(api, to)
        if not exists and create_pr:
            raise UserError(f"there is no {to} on the Hub to open a pull request at")
        if not exists:
            places = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
            if to.split("/")[0].lower() not in map(str.lower, places):
                raise UserError(f"{account['name']} cannot create {to}: it may do so under {', '.join(places)}")
        elif not create_pr:
            api.auth_check(to, write=True)
            if private and not exists["private"]:
                raise UserError(
                    f"{to} is public, and --private would not change that: make it private in its settings, or leave "
                    "out --private"
                )
    except LLMPruneError:
        raise
    except Exception as error:
        raise failed(error, to, doing) from None


def check_name(to: str) -> None:
    """See that a name is one of a repository.

    Raises:
        UserError: it is none.
    """
    try:
        validate_repo_id(to)
    except HFValidationError:
        to = ""
    if to.count("/") != 1:
        raise UserError("a repository to push to is named owner/name")


def _look(api: HfApi, to: str) -> dict[str, Any] | None:
    """What there is under a name; None where there is nothing."""
    try:
        return {"private": bool(api.model_info(to).private)}
    except GatedRepoError:
        return {"private": False}
    except RepositoryNotFoundError:
        return None
