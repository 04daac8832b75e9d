"""What an object store's failure means: one line that names the variable to set, where one is missing or wrong."""

import re

# What the errors of the clients say -> what to do. The first that is found counts.
_ADVICE = (
    ("URL scheme is not allowed|BadScheme", "for a store without TLS set AWS_ALLOW_HTTP=true"),
    ("Missing (?:AccessKeyId|SecretAccessKey)", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|Forbidden|Unauthorized|lacked the necessary privileges"
        "|valid authentication credentials|ExpiredToken",
        "mend AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the rights of the account",
    ),
    (
        "169.254.169.254|instance metadata|no providers in chain|CredentialsNotLoaded",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    ("NoSuchBucket", "make the bucket, or mend the lake's URI or AWS_ENDPOINT_URL"),
    (
        r"conditional put|PutMode|S3PutConditional|LockClient|NotImplemented|not (?:yet )?implemented",
        "set AWS_CONDITIONAL_PUT=etag; where the store itself knows no conditional put, use another one",
    ),
    ("PermanentRedirect|AuthorizationHeaderMalformed|[Mm]issing region", "set AWS_REGION to the bucket's region"),
    (
        "Connect|dns error|error sending request|timed out|timeout",
        "set AWS_ENDPOINT_URL to the address of a store that answers, or run again when it does",
    ),
)
_OF_A_STORE = re.compile(r"Generic (?:S3|GCS|MicrosoftAzure|HTTP|Config) error|Error performing|PutMode")
_OTHERS = {"gs": "GOOGLE_…", "az": "AZURE_…", "abfs": "AZURE_…", "abfss": "AZURE_…"}


def store_problem(uri: str, error: Exception) -> str | None:
    """The line for an error of the store at `uri`; None where the store answered, and what it holds is at fault."""
    whole = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    text = whole.split(" Debug source:")[0]
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, whole)), None)
    if "://" not in uri or not (_OF_A_STORE.search(text) or advice):
        return None
    if variables := _OTHERS.get(uri.split("://")[0]):
        advice = f"check the variables {variables}"
    elif advice is None:
        advice = "check AWS_ENDPOINT_URL and the other AWS_… variables"
    code = re.search(r"<Code>(\w+)</Code>", text)
    found = code[1] if code else re.split(r" ↳ |: ", text.rstrip(": "))[-1].rstrip(")")
    return f"{uri}: expected an object store that answers, found: {found}; {advice}"
