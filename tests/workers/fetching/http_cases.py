"""Hostile URLs and answers of servers: one case a line, with the outcome that a clip must have."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.workers.fetching.http_world import CLIP, PUBLIC, PUBLIC_6, Talk, answer, raw

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_BYTES = 1_000_000
OK = ("ok",)
BLOCKED = ("blocked_address",)
BAD_URL = ("bad_url",)
#: Refused before or at the resolver: which depends on how the form parses.
NEVER_DIALLED = ("blocked_address", "bad_url", "dns")


@dataclass(frozen=True)
class Case:
    name: str
    url: str
    outcomes: tuple[str, ...]
    script: Callable[[Talk], None] = field(default_factory=answer)
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    #: Plain requests dials a refused address here: without this the case would prove nothing.
    plain_dials: bool = False


def every_case() -> list[Case]:
    groups = [
        addresses(),
        named(),
        unicode_hosts(),
        tricks(),
        schemes(),
        ports(),
        redirects(),
        bodies(),
        statuses(),
    ]
    return [case for group in groups for case in group]


# addresses and names ------------------------------------------------------------------------------

LITERALS = """
127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 0x7f.1 017700000001 0 0.0.0.0 127.8.9.10
10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 2852039166 0xa9fea9fe
169.254.170.2 100.64.0.1 100.100.100.200 192.0.0.192 192.0.0.8 168.63.129.16 224.0.0.1
239.255.255.250 255.255.255.255 240.0.0.1
198.18.0.1 198.19.255.255 192.88.99.1 192.0.2.1 198.51.100.1 203.0.113.1 0.1.2.3
[::] [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:93.184.216.34] [::127.0.0.1] [::5db8:d822]
[64:ff9b::7f00:1] [64:ff9b::5db8:d822] [64:ff9b:1::a00:1] [2002:7f00:1::] [2002:5db8:d822::1]
[2001:0:4136:e378:8000:63bf:3fff:fdd2] [::ffff:0:127.0.0.1] [fe80::1] [fd00::1] [fc00::1]
[fd00:ec2::254] [fd20:ce::254] [fec0::1] [ff02::1] [ff0e::1] [5f00::1] [100::1] [2001:db8::1]
[3fff::1] [2001:2::1] [4000::1]
"""

ANSWERS = {
    "private": ["10.0.0.1"],
    "loopback": ["127.0.0.1"],
    "metadata": ["169.254.169.254"],
    "azure": ["168.63.129.16"],
    "oracle": ["192.0.0.192"],
    "alibaba": ["100.100.100.200"],
    "ula": ["fd00:ec2::254"],
    "loopback6": ["::1"],
    "mapped": ["::ffff:10.0.0.1"],
    "nat64": ["64:ff9b::a9fe:a9fe"],
    "sixtofour": ["2002:a9fe:a9fe::1"],
    "site-local": ["fec0::1"],
    "good-then-bad": [PUBLIC, "10.0.0.1"],
    "bad-then-good": ["10.0.0.1", PUBLIC],
    "good4-bad6": [PUBLIC, "fd00::1"],
    "good6-bad4": [PUBLIC_6, "127.0.0.1"],
    "crowd-with-one-bad": [PUBLIC] * 499 + ["10.0.0.1"],
}


def addresses() -> list[Case]:
    cases = [
        Case(f"literal {host}", f"http://{host}/", BLOCKED, plain_dials=True)
        for host in LITERALS.split()
    ]
    cases += [
        Case("zone on link-local", "http://[fe80::1%25lo]/", BAD_URL),
        Case("zone on public", f"http://[{PUBLIC_6}%25lo]/", BAD_URL),
        Case("public", f"http://{PUBLIC}/", OK),
        Case("public decimal", "http://1572395042/", OK),
        Case("public 6", f"http://[{PUBLIC_6}]/", OK),
        Case("private over https", "https://10.0.0.1/", BLOCKED, plain_dials=True),
    ]
    return cases


def named() -> list[Case]:
    cases = [
        Case(
            f"name {name}",
            f"http://{name}.test/",
            BLOCKED,
            names={f"{name}.test": [found]},
            plain_dials=True,
        )
        for name, found in ANSWERS.items()
        if found[0] not in (PUBLIC, PUBLIC_6)
    ]
    cases += [
        Case(f"name {name}", f"http://{name}.test/", BLOCKED, names={f"{name}.test": [found]})
        for name, found in ANSWERS.items()
        if found[0] in (PUBLIC, PUBLIC_6)
    ]
    local = [["127.0.0.1", "::1"]]
    rebinding = {"rebind.test": [[PUBLIC], ["127.0.0.1"]]}
    cases += [
        Case(
            "localhost", "http://localhost/", BLOCKED, names={"localhost": local}, plain_dials=True
        ),
        Case(
            "localhost.",
            "http://localhost./",
            BLOCKED,
            names={"localhost": local},
            plain_dials=True,
        ),
        Case(
            "LOCALHOST", "http://LOCALHOST/", BLOCKED, names={"localhost": local}, plain_dials=True
        ),
        Case(
            "sub.localhost",
            "http://a.localhost/",
            BLOCKED,
            names={"a.localhost": local},
            plain_dials=True,
        ),
        Case(
            "metadata name",
            "http://metadata.google.internal/",
            BLOCKED,
            names={"metadata.google.internal": [["169.254.169.254"]]},
            plain_dials=True,
        ),
        Case("public then private", "http://rebind.test/", OK, names=rebinding),
        Case(
            "private then public",
            "http://rebind.test/",
            BLOCKED,
            names={"rebind.test": [["10.0.0.1"], [PUBLIC]]},
            plain_dials=True,
        ),
        Case(
            "500 public answers", "http://crowd.test/", OK, names={"crowd.test": [[PUBLIC] * 500]}
        ),
        Case("no answers", "http://none.test/", ("connect",), names={"none.test": [[]]}),
        Case("unknown name", "http://unknown.test/", ("dns",)),
        Case("trailing dot", "http://public.test./", OK),
        Case("255-byte label", f"http://{'a' * 255}.test/", BAD_URL),
        Case("254-byte name", f"http://{'.'.join(['a' * 62] * 4)}.test/", BAD_URL),
        Case("percent in name", "http://127.0.0.1%2f.test/", BAD_URL),
    ]
    return cases


def unicode_hosts() -> list[Case]:
    secret = {
        "xn--e1afmkfd.test": [["10.0.0.1"]],
        "localhost": [["127.0.0.1"]],
        "xn--pubic-n3a.test": [["10.0.0.1"]],
    }
    return [
        Case("IDN public", "http://bücher.test/", OK, names={"xn--bcher-kva.test": [[PUBLIC]]}),
        Case("IDN private", "http://пример.test/", BLOCKED, names=secret, plain_dials=True),
        Case(
            "punycode private", "http://xn--e1afmkfd.test/", BLOCKED, names=secret, plain_dials=True
        ),
        Case("homograph", "http://pubӏic.test/", NEVER_DIALLED, names=secret),
        Case("full-width digits", "http://１２７.0.0.1/", NEVER_DIALLED, names=secret),
        Case("circled digits", "http://①②⑦.⓪.⓪.①/", NEVER_DIALLED, names=secret),
        Case("circled letters", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", NEVER_DIALLED, names=secret),
        Case("ideographic dots", "http://127。0。0。1/", NEVER_DIALLED, names=secret),
        Case("soft hyphen", "http://local\u00adhost/", NEVER_DIALLED, names=secret),
        Case("zero-width space", "http://local\u200bhost/", NEVER_DIALLED, names=secret),
        Case("right-to-left override", "http://\u202epublic.test/", NEVER_DIALLED, names=secret),
        Case("surrogate", "http://public.test/\ud800", BAD_URL),
    ]


# the text of the URL ------------------------------------------------------------------------------


def tricks() -> list[Case]:
    refused = [
        "http://public.test@10.0.0.1/",
        "http://public.test:80@10.0.0.1/",
        "http://public.test%2f@10.0.0.1/",
        "http://user:password@public.test/",
        "http://@public.test/",
        "http://10.0.0.1\\@public.test/",
        "http://public.test\\@10.0.0.1/",
        "http://public.test\\.10.0.0.1/",
        "http://10.0.0.1:80:80/",
        "http://[::1]public.test/",
        "http://[::1/",
        "http://[10.0.0.1]/",
        "http://[v1.a]/",
        "http:///10.0.0.1/",
        "http:10.0.0.1/",
        "http:/10.0.0.1/",
        "http://10.0.0.1%00.public.test/",
        "http://10.0.0.1;public.test/",
        "http://10.0.0.1,public.test/",
        "http://10.0.0.1 .public.test/",
        "http://.public.test/",
        "http://*.test/",
        "http://public..test/",
        "http://",
        "http://?",
        "http://public.test/\tx",
        "http://public\n.test/",
        "http://public.test/ HTTP/1.1\r\nX-Injected: 1",
        "http://public.test/\x7f",
        "http://public.test/\x85",
        "http://public.test/\x00",
        " http://public.test/",
        "http://public.test/" + "a" * 4096,
    ]
    private = [
        "http://10.0.0.1#@public.test/",
        "http://10.0.0.1?@public.test/",
        "http://10.0.0.1/@public.test/",
    ]
    private += ["HTTP://10.0.0.1/", "http://10.0.0.1:/", "http://10.0.0.1:80/"]
    accepted = [
        "http://public.test#@10.0.0.1/",
        "http://public.test?@10.0.0.1/",
        "http://public.test/a b?c=ü#d",
    ]
    return [
        *(Case(f"trick {url[:40]!r}", url, BAD_URL) for url in refused),
        *(Case(f"trick {url}", url, BLOCKED, plain_dials=True) for url in private),
        *(Case(f"harmless {url}", url, OK) for url in accepted),
    ]


def schemes() -> list[Case]:
    urls = [
        "ftp://public.test/",
        "gopher://10.0.0.1/",
        "dict://10.0.0.1:11211/",
        "ldap://10.0.0.1/",
        "ws://public.test/",
    ]
    urls += [
        "data:audio/wav;base64,UklGRg==",
        "javascript:alert(1)",
        "jar:http://public.test!/",
        "blob:http://public.test/",
    ]
    urls += [
        "unix:///var/run/docker.sock",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
        "s3://bucket/key",
        "://public.test/",
    ]
    urls += [
        "//public.test:80",
        "public.test/clip.wav",
        "httpx://public.test/",
        "http",
        "",
        "file://public.test/etc/passwd",
    ]
    outcomes = {"//public.test:80": ("file_not_allowed",)}
    return [Case(f"scheme {url}", url, outcomes.get(url, BAD_URL)) for url in urls]


def ports() -> list[Case]:
    refused = [
        "0",
        "1",
        "22",
        "25",
        "6379",
        "8080",
        "65535",
        "65536",
        "99999999999",
        "-1",
        "+80",
        "8 0",
        "0x50",
        "８０",
    ]
    return [
        *(Case(f"port {port}", f"http://public.test:{port}/", BAD_URL) for port in refused),
        Case("port 80 stated", "http://public.test:80/", OK),
        Case("port left empty", "http://public.test:/", OK),
        Case("port with zeros", "http://public.test:00080/", OK),
        Case("https on 443 stated", "https://public.test:443/", OK),
        Case("http on the TLS port", "http://public.test:443/", ("connect", "http_error")),
    ]


# what servers answer ------------------------------------------------------------------------------


def redirect(location: str, status: str = "302 Found", body: bytes = b"") -> Callable[[Talk], None]:
    """Answer "/next" with the clip and anything else with a redirect."""

    def script(talk: Talk) -> None:
        if talk.path.startswith("/next"):
            return answer()(talk)
        return answer(body, f"Location: {location}", status=status)(talk)

    return script


def _redirect_with_body(head: bytes) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        if talk.path.startswith("/next"):
            return answer()(talk)
        talk.send(b"HTTP/1.1 302 Found\r\nLocation: /next\r\n" + head + b"\r\n")
        return talk.send_for_ever(bytes(65536))

    return script


def redirects() -> list[Case]:
    url = "http://public.test/clip.wav"
    names = {"inside.test": [["10.0.0.1"]]}
    hostile = {
        "http://127.0.0.1/": BLOCKED,
        "http://10.0.0.1/": BLOCKED,
        "http://169.254.169.254/latest/meta-data/": BLOCKED,
        "http://2130706433/": BLOCKED,
        "http://0177.0.0.1/": BLOCKED,
        "//10.0.0.1/next": BLOCKED,
        "http://[::ffff:10.0.0.1]/": BLOCKED,
        "http://[fd00:ec2::254]/": BLOCKED,
        "http://inside.test/": BLOCKED,
        "https://10.0.0.1/": BLOCKED,
    }
    refused = [
        "http://public.test@10.0.0.1/",
        "http://10.0.0.1\\@public.test/",
        "http://public.test:6379/",
        "ftp://a/",
    ]
    refused += [
        "file:///etc/passwd",
        "/\x01",
        "gopher://10.0.0.1/",
        "http://[",
        "data:,x",
        "//a b/",
    ]
    fine = [
        "/next",
        "next",
        "//public.test/next",
        f"http://{PUBLIC}/next",
        "/next#x",
        "/next?ü=1",
        "/./next",
    ]
    return [
        *(
            Case(f"redirect to {to}", url, outcome, redirect(to), names, plain_dials=True)
            for to, outcome in hostile.items()
        ),
        *(Case(f"redirect to {to!r}", url, BAD_URL, redirect(to), names) for to in refused),
        *(Case(f"redirect to {to!r}", url, OK, redirect(to), names) for to in fine),
        *(
            Case(
                f"redirect {status} inside",
                url,
                BLOCKED,
                redirect("http://10.0.0.1/", status),
                plain_dials=True,
            )
            for status in ("301 Moved", "303 See Other", "307 Temporary", "308 Permanent")
        ),
        Case("redirect 300", url, ("http_error",), redirect("http://10.0.0.1/", "300 Choices")),
        Case(
            "redirect from address to name",
            f"http://{PUBLIC}/",
            OK,
            redirect("http://public.test/next"),
        ),
        Case(
            "redirect to a rebinding name",
            "http://rebind.test/",
            # It leads to itself, at the address that was checked, until that is looked up again.
            ("http_error", *BLOCKED),
            _two_steps,
            {"rebind.test": [[PUBLIC], ["127.0.0.1"]]},
            plain_dials=True,
        ),
        Case(
            "redirect loop",
            url,
            ("http_error",),
            answer(b"", "Location: clip.wav", status="302 Found"),
        ),
        Case("redirect 5 hops", f"{url}?5", OK, _hops),
        Case("redirect 6 hops", f"{url}?6", ("http_error",), _hops),
        Case("redirect without Location", url, ("http_error",), answer(b"", status="302 Found")),
        Case("redirect to nothing", url, ("http_error",), redirect("")),
        Case(
            "redirect https to http",
            "https://public.test/",
            ("http_error",),
            redirect("http://public.test/next"),
        ),
        Case("redirect http to https", url, OK, redirect("https://public.test/next")),
        Case("redirect with endless body", url, OK, _redirect_with_body(b"")),
        Case(
            "redirect with endless chunk",
            url,
            OK,
            _redirect_with_body(b"Transfer-Encoding: chunked\r\n\r\nFFFFFFF"),
        ),
        Case("redirect with gzip bomb", url, OK, redirect("/next", body=GZIP_BOMB)),
        Case(
            "redirect in Latin-1",
            url,
            BAD_URL,
            raw(b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\n\r\n"),
        ),
        Case(
            "redirect folded over lines",
            url,
            ("http_error",),
            raw(b"HTTP/1.1 302 F\r\nLocation: http:\r\n //10.0.0.1/\r\n\r\n"),
        ),
        Case("Refresh header", url, OK, answer(CLIP, "Refresh: 0; url=http://10.0.0.1/")),
        Case("Location on 200", url, OK, answer(CLIP, "Location: http://10.0.0.1/")),
        Case("Location on 201", url, ("http_error",), redirect("http://10.0.0.1/", "201 Created")),
    ]


def _two_steps(talk: Talk) -> None:
    """Redirect from a name to itself on a new connection."""
    talk.send(
        b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\nLocation: /again\r\n\r\n"
    )
    talk.close()


def _hops(talk: Talk) -> None:
    left = int(talk.path.partition("?")[2])
    if left:
        answer(b"", f"Location: ?{left - 1}", status="302 Found")(talk)
    else:
        answer()(talk)


GZIP_HEAD = b"Content-Encoding: gzip\r\n\r\n"
GZIP_LIMIT, GZIP_MORE = gzip.compress(bytes(LIMIT_BYTES)), gzip.compress(bytes(LIMIT_BYTES + 1))
GZIP_CUT = gzip.compress(CLIP)[:-9]
GZIP_BOMB = gzip.compress(bytes(60_000_000))
GZIP_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(GZIP_BOMB), GZIP_BOMB)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _then_for_ever(start: bytes, more: bytes, every_s: float = 0.0) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.send(start)
        talk.send_for_ever(more, every_s=every_s)

    return script


def _headers(*lines: bytes, body: bytes = CLIP) -> Callable[[Talk], None]:
    return raw(b"HTTP/1.1 200 OK\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body)


def bodies() -> list[Case]:
    ok, head, length = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"Content-Length: 4096"
    chunk = b"1000\r\n" + CLIP + b"\r\n"
    scripts: dict[str, tuple[Callable[[Talk], None], str]] = {
        "slow header": (_then_for_ever(ok, b"X: y\r\n", 0.05), "timeout"),
        "slow header, byte by byte": (_then_for_ever(ok, b"X", 0.05), "timeout"),
        "slow status line": (_then_for_ever(b"HTTP", b" ", 0.05), "timeout"),
        "slow body": (_then_for_ever(ok + length + b"\r\n\r\n", b"a", 0.05), "timeout"),
        "slow chunks": (_then_for_ever(CHUNKED, b"1\r\na\r\n", 0.05), "timeout"),
        "slow trailers": (_then_for_ever(CHUNKED + chunk + b"0\r\n", b"a: b\r\n", 0.05), "timeout"),
        "silence": (_wait, "timeout"),
        "silence after headers": (_then_for_ever(ok + length + b"\r\n\r\n", b"", 0.05), "timeout"),
        "slow 100s": (_then_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05), "timeout"),
        "endless 100s": (_then_for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "http_error"),
        "endless headers": (_then_for_ever(ok, b"X: y\r\n" * 1000), "http_error"),
        "endless header": (_then_for_ever(ok + b"X: ", b"y" * 65536), "http_error"),
        "endless status line": (_then_for_ever(b"HTTP/1.1 200 ", b"y" * 65536), "http_error"),
        "5000 headers": (_headers(*[b"X: y"] * 5000), "http_error"),
        "200 kB header": (_headers(b"X: " + b"y" * 200_000), "http_error"),
        "99 long headers": (_headers(*[b"X: " + b"y" * 60_000] * 99), "http_error"),
        "endless body": (_then_for_ever(head, bytes(65536)), "too_large"),
        "endless chunks": (_then_for_ever(CHUNKED, chunk), "too_large"),
        "endless trailers": (
            _then_for_ever(CHUNKED + chunk + b"0\r\n", b"a: b\r\n" * 1000),
            "http_error",
        ),
        "endless trailer": (_then_for_ever(CHUNKED + chunk + b"0\r\n", b"a" * 65536), "incomplete"),
        "endless chunk extension": (_then_for_ever(CHUNKED + b"1000;", b"a" * 65536), "incomplete"),
        "chunk of -1": (_then_for_ever(CHUNKED + b"-1\r\n", bytes(65536)), "incomplete"),
        "chunk of -5": (_then_for_ever(CHUNKED + b"-5\r\n", bytes(65536)), "incomplete"),
        "chunk of FFFFFFFFFFFFFFFF": (
            _then_for_ever(CHUNKED + b"F" * 16 + b"\r\n", bytes(65536)),
            "too_large",
        ),
        "chunk of nothing known": (raw(CHUNKED + b"zz\r\n"), "incomplete"),
        "cut chunk": (raw(CHUNKED + b"1000\r\n" + CLIP[:99]), "incomplete"),
        "cut between chunks": (raw(CHUNKED + chunk), "incomplete"),
        "chunks": (raw(CHUNKED + chunk * 3 + b"0\r\n\r\n"), "ok"),
        "chunks and trailers": (raw(CHUNKED + chunk + b"0\r\nX: y\r\n\r\n"), "ok"),
        "exactly the limit": (answer(bytes(LIMIT_BYTES)), "ok"),
        "one byte more, declared": (answer(bytes(LIMIT_BYTES + 1)), "too_large"),
        "one byte more, undeclared": (raw(head + bytes(LIMIT_BYTES + 1)), "too_large"),
        "huge length": (_headers(b"Content-Length: 99999999999999999999"), "too_large"),
        "short": (_headers(b"Content-Length: 90000"), "incomplete"),
        "longer than declared": (_headers(b"Content-Length: 100"), "ok"),
        "reset in the body": (_reset(ok + length + b"\r\n\r\nabc"), "incomplete"),
        "reset in the headers": (_reset(ok), "connect"),
        "closed at once": (lambda talk: talk.close(), "connect"),
        "negative length": (_headers(b"Content-Length: -1"), "http_error"),
        "signed length": (_headers(b"Content-Length: +4096"), "http_error"),
        "length with underscore": (_headers(b"Content-Length: 4_096"), "http_error"),
        "length in hex": (_headers(b"Content-Length: 0x1000"), "http_error"),
        "length in words": (_headers(b"Content-Length: many"), "http_error"),
        "two lengths": (_headers(length, b"Content-Length: 100"), "http_error"),
        "length and chunks": (
            raw(ok + length + b"\r\n" + CHUNKED[17:] + chunk + b"0\r\n\r\n"),
            "ok",
        ),
        "huge length and chunks": (
            raw(ok + b"Content-Length: 999999999\r\n" + CHUNKED[17:] + chunk + b"0\r\n\r\n"),
            "ok",
        ),
        "no length": (raw(head + CLIP), "ok"),
        "HTTP/1.0": (raw(b"HTTP/1.0 200 OK\r\n\r\n" + CLIP), "ok"),
        "HTTP/0.9": (raw(CLIP), "http_error"),
        "HTTP/2 preface": (raw(b"\0\0\x12\4\0\0\0\0\0\0\3\0\0\0\x80"), "http_error"),
        "binary headers": (raw(ok + b"\0\xff: \xfe\r\nContent-Length: 4096\r\n\r\n" + CLIP), "ok"),
        "a line that is no header": (raw(ok + b"hello\r\n\r\n" + CLIP), "ok"),
        "empty": (answer(b""), "empty"),
        "empty chunks": (raw(CHUNKED + b"0\r\n\r\n"), "empty"),
        "unknown transfer encoding": (_headers(b"Transfer-Encoding: gzip, chunked"), "http_error"),
        "identity": (answer(CLIP, "Content-Encoding: identity"), "ok"),
        "gzip": (answer(gzip.compress(CLIP), "Content-Encoding: gzip"), "ok"),
        "gzip in capitals": (answer(gzip.compress(CLIP), "Content-Encoding: X-GZIP"), "ok"),
        "gzip of exactly the limit": (answer(GZIP_LIMIT, "Content-Encoding: gzip"), "ok"),
        "gzip of one byte more": (answer(GZIP_MORE, "Content-Encoding: gzip"), "too_large"),
        "gzip in two members": (answer(gzip.compress(CLIP) * 2, "Content-Encoding: gzip"), "ok"),
        "gzip and no compression": (
            answer(gzip.compress(CLIP), "Content-Encoding: aws-chunked,gzip"),
            "ok",
        ),
        "gzip cut short": (
            answer(gzip.compress(CLIP)[:-9], "Content-Encoding: gzip"),
            "http_error",
        ),
        "gzip damaged": (answer(b"\x1f\x8b" + CLIP, "Content-Encoding: gzip"), "http_error"),
        "gzip of nothing": (answer(gzip.compress(b""), "Content-Encoding: gzip"), "empty"),
        "gzip bomb": (answer(GZIP_BOMB, "Content-Encoding: gzip"), "too_large"),
        "gzip bomb in chunks": (
            raw(CHUNKED[:-2] + GZIP_HEAD + GZIP_CHUNK),
            "too_large",
        ),
        "nested gzip bomb": (
            answer(gzip.compress(GZIP_BOMB), "Content-Encoding: gzip, gzip"),
            "http_error",
        ),
        "early hints": (
            raw(b"HTTP/1.1 100 Continue\r\n\r\n" + ok + length + b"\r\n\r\n" + CLIP),
            "ok",
        ),
    }
    scripts |= {
        f"compressed with {coding}": (answer(CLIP, f"Content-Encoding: {coding}"), "http_error")
        for coding in ("deflate", "br", "zstd", "compress", "x-gzip", "GZIP")
    }
    scripts |= {
        f"coding that is no compression: {coding}": (
            answer(CLIP, f"Content-Encoding: {coding}"),
            "ok",
        )
        for coding in ("aws-chunked", "binary", "UTF-8", "none", ",", "audio/mpeg")
    }
    url = "http://public.test/clip.wav"
    # It ends at the limit of bytes, or before on a busy machine.
    endless = _then_for_ever(head[:-2] + GZIP_HEAD, gzip.compress(b"") * 1000)
    return [
        Case("body: endless empty gzip", url, ("http_error", "timeout"), endless),
        *(
            Case(f"body: {name}", url, (outcome,), script)
            for name, (script, outcome) in scripts.items()
        ),
    ]


def _wait(talk: Talk) -> None:
    talk.stopped.wait()


def _reset(data: bytes) -> Callable[[Talk], None]:
    def script(talk: Talk) -> None:
        talk.send(data)
        talk.stopped.wait(0.05)
        talk.reset()

    return script


def statuses() -> list[Case]:
    codes = {"not_found": (404, 410), "forbidden": (401, 403), "rate_limited": (429,)}
    codes |= {"server_error": (202, 408, 425, 500, 502, 503, 504, 520, 599), "ok": (203,)}
    codes |= {
        "http_error": (
            201,
            204,
            205,
            206,
            304,
            305,
            400,
            402,
            405,
            406,
            407,
            416,
            418,
            451,
            101,
            103,
        )
    }
    return [
        Case(
            f"status {status}",
            "http://public.test/",
            (code,),
            answer(CLIP, status=f"{status} Some Words"),
        )
        for code, group in codes.items()
        for status in group
    ]
