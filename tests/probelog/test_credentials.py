"""What is cut from texts, and what is left in them."""

from __future__ import annotations

import time

import pytest

from probelog.credentials import redacted, split_login, with_login, without_logins


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pass@host:80/a", "https://***@host:80/a"),
        ("https://token@host", "https://***@host"),
        ("https://me:p@ss@host/a@b", "https://***@host/a@b"),
        ("s3://KEY:SEC/RET+x@bucket/a", "s3://***@bucket/a"),
        ("('http://a:b@c', 'd@e')", "('http://***@c', 'd@e')"),
        (
            "https://h/a?X-Amz-Signature=1f&X-Amz-Expires=60",
            "https://h/a?X-Amz-Signature=***&X-Amz-Expires=60",
        ),
        ("https://h/a?x=1&access_token=t&Policy=p#end", "https://h/a?x=1&access_token=***&Policy=***#end"),
        ("Authorization: Basic bWU6cGFzcw==", "Authorization: Basic ***"),
        ("{'authorization': 'Bearer abcdefghij'}", "{'authorization': 'Bearer ***'}"),
        ("hf_abcdefghijklmnopqrstuvwxyz is wrong", "*** is wrong"),
        ("no key AKIAABCDEFGHIJKLMNOP", "no key ***"),
    ],
)
def test_credentials_are_cut(text: str, expected: str) -> None:
    assert redacted(text) == redacted(redacted(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://host:80/a@b",
        "http://host:80",
        "http://[::1]:80/a@b",
        "s3://bucket/prefix/a@b",
        "mail me@host",
        "ratio 3://4",
        "https://h/api/models?author=me&cursor=abc&sort=likes",
        "a basic idea, a bearer of news",
        "hf_short",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == without_logins(text) == text


def test_what_the_environment_holds_is_cut_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": "wJalr/XUtn+FEMI",
        "HTTPS_PROXY": "http://me:pr%40xypass@proxy:3128",
        "HF_ENDPOINT": "operator:mirrorpass@mirror",  # no scheme: not usable, and shown in the refusal
        "DATABASE_PASSWORD": "short",
        "HF_TOKEN_PATH": "/home/me/token",
    }.items():
        monkeypatch.setenv(name, value)
    text = "wJalr/XUtn+FEMI pr@xypass pr%40xypass 'operator:mirrorpass@mirror' short /home/me/token"
    assert redacted(text) == "*** *** *** '***@mirror' short /home/me/token"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ordinary")
    assert redacted("extraordinary") == "extraordinary"


@pytest.mark.parametrize(
    "text", ["://a:b", "?token", "?" + "a" * 100, "authorization: ", "bearer ", "@", "://", "a:"]
)
def test_long_texts_take_time_in_proportion(text: str) -> None:
    text *= 200_000 // len(text)
    started = time.process_time()
    redacted(text)
    assert time.process_time() - started < 5  # a quadratic pattern takes minutes


def test_a_login_is_taken_out_and_put_back() -> None:
    address = "https://me:p%40%3A%2Fss@host:8443/hub"
    assert split_login(address) == ("https://host:8443/hub", ("me", "p@:/ss"))
    assert with_login(*split_login(address)) == address
    assert split_login("https://token@host") == ("https://host", ("token", ""))
    for other in ("https://host/a@b", "/data/me@home", "http://[", ""):
        assert split_login(other) == (other, None)
        assert with_login(other, None) == other
