"""A small client of OpenAI-compatible chat endpoints: retries, a bound on requests, and no key in any message."""

from __future__ import annotations

import email.message
import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from duet.errors import UserError

URL_VARIABLES = ("OPENAI_API_BASE", "OPENAI_API_URL")
KEY_VARIABLE = "OPENAI_API_KEY"
_PATH = "/chat/completions"
_MAX_REPLY_BYTES = 1 << 20
_RETRIED = frozenset({408, 409, 425, 429})
_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_FILTERED = frozenset({"content_filter", "content_policy_violation"})


class EndpointError(UserError, RuntimeError):
    """No request to this endpoint will succeed, or none may be sent any more: stop."""


class RequestFailed(RuntimeError):
    """This one request got no usable reply in all its attempts."""


class Refused(RequestFailed):
    """The server will not answer this text; the endpoint itself is well."""


class _Again(Exception):
    """An attempt that may succeed later; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        url: full address of the chat completions.
        key: sent as a bearer token; empty for servers that want none.
        timeout: seconds that a connection or a read may take.
    """

    url: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0

    @classmethod
    def from_environment(cls, timeout: float = 60.0) -> Endpoint:
        """Read OPENAI_API_BASE, or else OPENAI_API_URL, and OPENAI_API_KEY.

        The address is `https://host/v1` or the same with `/chat/completions`.

        Raises:
            EndpointError: neither address is set, one is malformed, or the key holds a character that no header can.
        """
        given = {name: os.environ.get(name, "").strip() for name in URL_VARIABLES}
        name = next((name for name, value in given.items() if value), None)
        if name is None:
            raise EndpointError(
                "no judge endpoint is set; set OPENAI_API_BASE to an OpenAI-compatible address such as "
                "http://127.0.0.1:8000/v1, and OPENAI_API_KEY if it wants a key. Without a judge, "
                "python -m llava.eval scores by rules"
            )
        parts = urllib.parse.urlsplit(given[name])
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{name} must be an address such as https://host/v1; it is not one")
        path = parts.path.rstrip("/")
        path = path if path.endswith(_PATH) else path + _PATH
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key.isascii() or any(not letter.isprintable() or letter.isspace() for letter in key):
            raise EndpointError(f"{KEY_VARIABLE} holds a space, a line break or a letter outside ASCII; set it again")
        return cls(urllib.parse.urlunsplit(parts._replace(path=path)), key, timeout)

    @property
    def shown(self) -> str:
        """The address without user name, password and query."""
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or ""
        return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


@dataclass(frozen=True)
class Reply:
    """One reply: its text, and the model that the server says wrote it."""

    text: str
    model: str


@dataclass
class Usage:
    """What has been spent: requests sent (retries included), and tokens as the server counts them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat:
    """Asks one model; may be used from several threads.

    Args:
        endpoint: where.
        model: its name there.
        options: further fields of the request's body; None removes one of ours (`temperature`, `max_tokens`).
        max_calls: requests that may be sent, retries included.
        attempts: requests for one reply.
        pause: first wait between two attempts in seconds; doubles each time.
        longest_pause: bound on a wait. A server that asks for more ends the run.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        options: Mapping[str, Any] | None = None,
        max_calls: int = 1000,
        attempts: int = 6,
        pause: float = 1.0,
        longest_pause: float = 120.0,
    ) -> None:
        self.endpoint = endpoint
        self.model = model
        self.max_calls = max_calls
        self.usage = Usage()
        body = {"temperature": 0, "max_tokens": 64} | dict(options or {})
        self.options = {name: value for name, value in body.items() if value is not None}
        self._attempts, self._pause, self._longest_pause = attempts, pause, longest_pause
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._why_stopped = ""
        self._opener = urllib.request.build_opener(_StayHere)

    def stop(self, why: str = "stopped") -> None:
        """Let everyone who waits or asks next fail with EndpointError and the first reason given."""
        with self._lock:
            self._why_stopped = self._why_stopped or why
        self._stop.set()

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Send one conversation and return the reply.

        Raises:
            EndpointError: the endpoint refuses for good (key, address, quota), or `max_calls` is reached; from then on
                nothing is sent any more.
            RequestFailed: no usable reply in all attempts.
            Refused: the server will not answer this text.
        """
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        try:
            return self._attempt(body)
        except EndpointError as error:
            self.stop(str(error))
            raise

    def _attempt(self, body: bytes) -> Reply:
        reason = ""
        for attempt in range(self._attempts):
            self._count_call()
            try:
                return self._once(body)
            except _Again as error:
                reason = str(error)
                wait = self._wait_for(attempt, error.wait)
            if attempt + 1 < self._attempts and self._stop.wait(wait):
                raise EndpointError(self._why_stopped)
        raise RequestFailed(f"no usable reply in {self._attempts} attempts, the last: {reason}")

    def _wait_for(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait: what the server asks for, but no less than our own pause."""
        if asked is not None and asked > self._longest_pause:
            raise EndpointError(f"{self.endpoint.shown} asks to wait {asked:.0f} s; run the same command again then")
        own = min(self._longest_pause, self._pause * 2**attempt) * random.uniform(0.5, 1.0)
        return max(own, asked or 0.0)

    def _count_call(self) -> None:
        if self._stop.is_set():
            raise EndpointError(self._why_stopped)
        with self._lock:
            if self.usage.requests >= self.max_calls:
                raise EndpointError(f"the limit of {self.max_calls} requests (--max-calls) is reached")
            self.usage.requests += 1

    def _once(self, body: bytes) -> Reply:
        try:
            status, headers, content = self._post(body)
        except (http.client.HTTPException, OSError) as error:  # OSError covers timeouts and urllib's own errors
            raise _Again(self._hide(f"{type(error).__name__}: {error}")) from None
        if status == 200:
            return self._read(content)
        detail = self._hide(content.decode("utf-8", "replace"))[:300]
        code = _error_code(content)
        where = f"{self.endpoint.shown} answered {status}: {detail}"
        if (status in _RETRIED or status >= 500) and code not in _QUOTA:
            raise _Again(where, _retry_after(headers.get("Retry-After")))
        if code in _FILTERED:
            raise Refused(where)
        hint = (
            f"; check {KEY_VARIABLE}"
            if status in (401, 403)
            else "; check the address, the model and --request-options"
        )
        raise EndpointError(where + hint)

    def _post(self, body: bytes) -> tuple[int, email.message.Message, bytes]:
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        request = urllib.request.Request(self.endpoint.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                return response.status, response.headers, response.read(_MAX_REPLY_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read(_MAX_REPLY_BYTES)

    def _read(self, content: bytes) -> Reply:
        try:
            data = json.loads(content)
            text, model = data["choices"][0]["message"]["content"], data.get("model")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise _Again("the reply is no chat completion in JSON, or is cut off") from None
        if not isinstance(text, str):
            raise _Again(f"the reply's content is {type(text).__name__}, expected text")
        spent = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        with self._lock:
            self.usage.prompt_tokens += _count(spent.get("prompt_tokens"))
            self.usage.completion_tokens += _count(spent.get("completion_tokens"))
        return Reply(_storable(text), _storable(model) if isinstance(model, str) else self.model)

    def _hide(self, text: str) -> str:
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text


def _storable(text: str) -> str:
    """The text with halves of surrogate pairs, which no file can hold, made question marks."""
    return text.encode("utf-8", "replace").decode()


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _error_code(content: bytes) -> str:
    """The `code` or `type` of an OpenAI error body, or nothing."""
    try:
        error = json.loads(content)["error"]
        return str(error.get("code") or error.get("type") or "")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it holds neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
