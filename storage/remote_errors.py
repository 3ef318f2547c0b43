"""What an error of a service's library means: what is to be said of it, and whether waiting helps."""

from .address import shown

GONE, FORBIDDEN, NO_CREDENTIALS, LOST, OTHER = range(5)
# Errors of libraries that may not be installed, by name.
_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
    "GatedRepoError",
}
_LOST_WORDS = ("connect", "timeout", "timedout", "endpoint", "incomplete", "payload", "protocol")


def kind_of(error: BaseException) -> int:
    """Whether something is gone, forbidden, lacks credentials, or the connection is lost."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _CREDENTIAL_ERRORS:
        return NO_CREDENTIALS
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return GONE
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return FORBIDDEN
    if status is not None and (status in (408, 425, 429) or status >= 500):
        return LOST
    if status is not None and status >= 400:
        return OTHER
    if isinstance(error, OSError | TimeoutError):
        return LOST
    text = " ".join(names).lower()
    return LOST if any(word in text for word in _LOST_WORDS) else OTHER


def is_by_choice(error: BaseException) -> bool:
    """Whether the user has cut the connection himself, by HF_HUB_OFFLINE: waiting brings nothing."""
    return type(error).__name__ == "OfflineModeIsEnabled"


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the libraries."""
    response = getattr(error, "response", None)
    found = [getattr(error, "status", None), getattr(response, "status_code", None)]
    found.append(getattr(error, "status_code", None))
    if isinstance(response, dict):  # botocore
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    status = next((value for value in found if type(value) is int), None)
    if status is None and error.__cause__ is not None and error.__cause__ is not error:
        return _status(error.__cause__)
    return status


def reason(error: BaseException) -> str:
    """An error of a library in a few words, with nothing in it that could be a credential."""
    text = shown(str(error).strip().partition("\n")[0]).rstrip(". ")
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name
