"""What must stay secret, found by its kind, and taken out of text before the text leaves the program.

A credential is known by its form (a token of a known service, `user:password@` in a URL, a signed address), by the name
of what it is given to (`...token=`, `Authorization:`), or because a variable of the environment holds it.
"""

import json
import os
import re
from collections.abc import Iterator

HIDDEN = "***"
# What a variable holds is hidden everywhere where it looks like this: a word would garble messages.
HELD = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[^\s/~.]\S{11,}")
# Headers of HTTP that say nothing secret; any other one may.
HARMLESS_HEADERS = {
    "accept", "accept-encoding", "accept-language", "cache-control", "connection", "range", "user-agent",
}  # fmt: skip

_WORDS = (
    # eos_token and bos_token are of a tokenizer, sas is a method; Azure's signatures are named sig, or sas_token.
    r"secret|(?<!eos_)(?<!bos_)token|password|passwd|passphrase|pwd|credentials?|authorization|auth|cookie|signature|sig|"
    r"api[-_]?key|(?:secret|access|account|private|shared|session)[-_]?key(?:[-_]?id)?|key[-_]?pair[-_]?id|"
    r"awsaccesskeyid|accountkey|sharedaccesssignature|connection[-_]?string|x[-_](?:api|amz|goog|auth)[-_][-\w]+"
)
NAME = re.compile(rf"(?:.*[^A-Za-z])?(?:{_WORDS})", re.IGNORECASE | re.DOTALL)
"""Names (by `fullmatch`) whose value is a secret."""
FORMS = re.compile(
    r"(?<![\w-])(?:hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|"
    r"AIza[\w-]{30,}|ya29\.[\w-]{16,}|xox[abpors]-[\w-]{10,}|sk-[\w-]{20,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?",
    re.DOTALL,
)
# On the hub what precedes an @ is the name of a data set.
USERINFO = re.compile(r"(?<=://)(?<!hf://)(?<!datasets://)[^/\s?#@'\"]+@")
QUERY = re.compile(r"(\w[\w+.-]*)(://[^\s?#'\"]*\?)([^\s#'\"]+)")
# What nobody chose by hand: long, and of letters and digits.
RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w%+/=~-]{16,}")
# What says which content is meant is random and public.
PUBLIC = {"versionid", "version", "revision", "generation", "commit", "etag", "sha256", "md5", "hash"}
_NAMED = r"((?<![A-Za-z])(?:{words}))"
ASSIGNED = re.compile(
    _NAMED.format(words=_WORDS) + r"(\s*=\s*)(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^\s,;&'\"\])}]+)", re.IGNORECASE
)
HEADER = re.compile(r"((?<![A-Za-z.])(?:authorization|cookie))(['\"]?\s*[=:]\s*)([^\s'\")][^\n'\")]*)", re.IGNORECASE)
QUOTED = re.compile(_NAMED.format(words=_WORDS) + r"(['\"]\s*[:,]\s*)(\"[^\"]*\"|'[^']*')(?!\s*:)", re.IGNORECASE)
LINE = re.compile(r"(?m)^(\s*(?:[\w-]+[-_])?(?:" + _WORDS + r"))(:[ \t]+)(?!null$|\{\}$)(\S.*)$", re.IGNORECASE)
SCHEME = re.compile(r"\b(Bearer|Basic)( +)([\w+/=.~-]{8,})")
VARIABLE = re.compile(
    r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|KEY_ID|CREDENTIALS?|AUTH|COOKIE|SAS|CONNECTION_STRING)"
)


def redacted(text: str) -> str:
    """`text` with every credential in it replaced by ***."""
    for value in sorted(set(_held()), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = USERINFO.sub(f"{HIDDEN}@", text)
    text = QUERY.sub(lambda match: match[1] + match[2] + _query(match[1], match[3]), text)
    text = SCHEME.sub(rf"\1\2{HIDDEN}", FORMS.sub(HIDDEN, text))
    for pattern in (HEADER, ASSIGNED, QUOTED, LINE):
        text = pattern.sub(_keep_quotes, text)
    return text


def is_secret(name: str, value: object) -> bool:
    """Whether something of this name and value would be hidden; the name may be a path with dots."""
    if isinstance(value, str) and redacted(value) != value:
        return True
    return value not in (None, "", False, True) and NAME.fullmatch(name) is not None


def carries_secret(url: str) -> bool:
    """Whether a URL or path has a password, a signature or a token in it."""
    return redacted(url) != url


def _query(scheme: str, query: str) -> str:
    parts = []
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        random = scheme in ("http", "https") and name.lower() not in PUBLIC and RANDOM.fullmatch(value)
        secret = NAME.fullmatch(name) or random
        parts.append(f"{name}{equals}{HIDDEN}" if equals and secret else part)
    return "&".join(parts)


def _keep_quotes(match: re.Match[str]) -> str:
    quote = match[3][0] if match[3][0] in "\"'" else ""
    return f"{match[1]}{match[2]}{quote}{HIDDEN}{quote}"


def _held() -> Iterator[str]:
    """Values of variables of the environment that are named like secrets, or are within fsspec's."""
    for name, value in os.environ.items():
        if VARIABLE.fullmatch(name.upper()):
            if HELD.fullmatch(value):
                yield value
        elif name.startswith("FSSPEC_") and value.startswith("{"):
            try:
                yield from _leaves("", json.loads(value))
            except ValueError:
                continue


def _leaves(name: str, value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # All headers but those that every client sends may be credentials.
            yield from _leaves(key if name != "headers" or key.lower() in HARMLESS_HEADERS else "secret", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(name, inner)
    elif isinstance(value, str) and HELD.fullmatch(value) and (NAME.fullmatch(name) or name == "key"):
        yield value
