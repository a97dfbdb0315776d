"""Credentials that stand in addresses and in the environment: taken out of every text that leaves the process.

Errors, log messages, progress lines and records pass through here where they are made, so that no caller has to think
of it. What is cut becomes ``***``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote, unquote

CUT = "***"

# Up to the last "@" before the path: a password may hold one. Else a slash that should have been %2F (AWS's keys hold
# some), if no port stands there. No quote and no backslash: JSON stays JSON.
_LOGIN = re.compile(r'(?<=://)(?:[^\s/?#"\\<>]*@|[^\s/?#"\\<>:\[\]]+:(?!\d*[/?#\s])[^\s"\\<>]{0,300}@)')
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*://)(?P<login>[^/?#]*)@(?P<rest>.*)", re.DOTALL)
# Signatures of storage hosts, and what services take as a key in an address.
_PARAMETER = re.compile(
    r"(?<=[?&;])("
    r"[\w.-]{0,60}(?:token|secret|signature|credential|passw|api[_-]?key|access[_-]?key)[\w.-]{0,60}"
    r"|auth|authorization|jwt|key|key-pair-id|policy|pwd|sig)"
    r'=[^\s&;#"\'\\<>()]+',
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(authorization[\"']*\s*[:=]\s*[\"']*(?:bearer|basic)|\bbearer)\s+[\w.~+/=-]{8,}", re.IGNORECASE
)
# Tokens that say what they are: of the Hub, of AWS.
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")

_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|(?:ACCESS|ACCOUNT|STORAGE|MASTER|SAS|ENCRYPTION)_KEY|ACCESS_KEY_ID)$",
    re.IGNORECASE,
)
_ADDRESS_NAME = re.compile(r"HF_ENDPOINT|AWS_ENDPOINT_URL\w*|\w+_PROXY", re.IGNORECASE)
#: A shorter one may be an ordinary word, which must not vanish from texts.
_SHORTEST = 8


def redacted(text: str) -> str:
    """A text without credentials: those in addresses and headers, and those that the environment holds.

    >>> redacted("https://me:secret@mirror.example/a?X-Amz-Signature=0af3&part=1 answered 500")
    'https://***@mirror.example/a?X-Amz-Signature=***&part=1 answered 500'
    """
    for secret in sorted(_secrets(os.environ), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", CUT, text)
    text = _PARAMETER.sub(rf"\1={CUT}", without_logins(text))
    return _TOKEN.sub(CUT, _HEADER.sub(rf"\1 {CUT}", text))


def without_logins(text: str) -> str:
    """A text whose addresses name no user and no password. Unlike `redacted` it leaves everything else as it is."""
    return _LOGIN.sub(f"{CUT}@", text)


def split_login(address: str) -> tuple[str, tuple[str, str] | None]:
    """An address without its user and password, and these, decoded; None where it has none.

    >>> split_login("https://me:p%40ss@mirror.example/hub")
    ('https://mirror.example/hub', ('me', 'p@ss'))
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return address, None
    user, _, password = match["login"].partition(":")
    return match["scheme"] + match["rest"], (unquote(user), unquote(password))


def with_login(address: str, login: tuple[str, str] | None) -> str:
    """The reverse of `split_login`."""
    if login is None:
        return address
    scheme, mark, rest = address.partition("://")
    user, password = (quote(part, safe="") for part in login)
    return f"{scheme}{mark}{user}:{password}@{rest}"


def _secrets(environment: Mapping[str, str]) -> set[str]:
    return {secret for secret in _held(environment) if len(secret) >= _SHORTEST}


def _held(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if _SECRET_NAME.search(name):
            yield value
        elif "@" in value and _ADDRESS_NAME.fullmatch(name):
            login = value.rpartition("@")[0].rpartition("/")[2]
            password = login.partition(":")[2] or login
            yield from (login, password, unquote(password))
