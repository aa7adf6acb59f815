"""Every refusal in OpenAI's shape: 400 for what no server could do, 422 for what this one does not do, 429 where it is busy.

OpenAI's client raises its own exception for each, and tries again on 429, 408 and from 500 on.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from headfold.runtime.errors import (
    BusyError,
    CapacityError,
    ClosedError,
    DeadlineError,
    HeadfoldError,
    InputError,
    printable,
)
from headfold.runtime.server.protocol.responses import ErrorBody, ErrorFacts

logger = logging.getLogger("headfold.server")
_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
_TYPES |= {504: "timeout_error"}


class Refused(Exception):
    """A request that is not answered: HTTP's status, what is wrong, and in which field."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> ErrorBody:
        """As it is sent."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorBody(
            error=ErrorFacts(message=printable(str(self), 2000), type=kind, param=self.param, code=self.code)
        )

    def response(self) -> Response:
        """As it is sent, if nothing was yet."""
        headers = {"retry-after": "1"} if self.status == 429 else {}
        headers |= {"www-authenticate": "Bearer"} if self.status == 401 else {}
        text = json.dumps(self.body().model_dump())  # in ASCII: a client may have sent what has no UTF-8
        return Response(text, self.status, headers, "application/json")


def unsupported(param: str, what: str) -> Refused:
    """What OpenAI's servers do, and this one does not."""
    return Refused(422, what, param=param, code="unsupported_parameter")


def refusal_of(error: Exception, began: bool = False) -> Refused:
    """What an error of the runtime is to a client; `began`: its tokens had been accepted by then."""
    match error:
        case Refused():
            return error
        case BusyError():
            return Refused(429, str(error), code="queue_full")
        case DeadlineError():
            return Refused(504, str(error), code="deadline_exceeded")
        case CapacityError() if began:  # no memory for the cache
            return Refused(503, str(error), code="no_memory")
        case CapacityError():
            return Refused(400, str(error), code="context_length_exceeded")
        case ClosedError():
            return Refused(503, "The server is about to end.", code="server_ending")
        case InputError():
            return Refused(400, str(error))
        case RecursionError():
            return Refused(400, "The request is nested too deeply.")
        case HeadfoldError():  # of the bundle
            logger.error("%s", error)
            return Refused(500, str(error))
    logger.error("a bug of headfold's", exc_info=error)
    return Refused(500, "An internal error; the server's log has it.")


def invalid(errors: Sequence[Any]) -> Refused:
    """What pydantic says of a body, about the first field that is wrong: a union's branches are wrong each in their way."""
    if not errors:
        return Refused(400, "The request is malformed.")
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refused(400, f"The body is no JSON: {first['ctx']['error']}.")
    if not place:
        return Refused(400, f"The body is wrong: {first['msg']}. Send a JSON object as application/json.")
    field = printable(place[0], 100)
    if first["type"] == "extra_forbidden":
        path = printable(".".join(place), 100)
        return Refused(400, f"Unrecognized request argument: {path}", param=path, code="unknown_parameter")
    alike = [
        error["msg"] for error in errors if [str(part) for part in error["loc"] if part != "body"][:1] == place[:1]
    ]
    where = printable(".".join(place), 200)
    return Refused(400, f"Invalid '{where}': {printable('; or: '.join(dict.fromkeys(alike)))}.", param=field)
