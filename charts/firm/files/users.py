"""Make the users of chart platform's MinIO, or set their keys and rights again.

Usage: ``users.py BUCKET KFP_PREFIX LOGS_PREFIX``. In the environment: FIRM_S3_ENDPOINT, and keys as
``NAME_ACCESS_KEY`` and ``NAME_SECRET_KEY`` of ROOT, FIRM and PIPELINES.
"""

import os
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import MinioAdmin
from minio.credentials import StaticProvider
from minio.error import MinioAdminException

from firm.certificates import tls_context

PATIENCE_S = 1800.0  # MinIO's image may have to be pulled
OBJECTS = [
    "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts",
]  # fmt: skip
BUCKET = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
SPECIFICATIONS = "kfp/pipelines"  # of pipelines: KFP's API server alone reads and writes them


def policies(bucket: str, kfp: str, logs: str, shared: bool = False) -> dict[str, dict[str, Any]]:
    """Rights by user: FIRM's own code has all that is not KFP's; KFP's driver, launcher and logs have the rest.

    With ``shared`` keys FIRM is both.
    """
    foreign = [SPECIFICATIONS] if shared else [kfp, logs, SPECIFICATIONS]

    def within(*prefixes: str) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{prefix}/*" for prefix in prefixes]

    listing = {"Effect": "Allow", "Action": BUCKET, "Resource": [f"arn:aws:s3:::{bucket}"]}
    statements = {
        "FIRM": [
            {"Effect": "Allow", "Action": OBJECTS, "Resource": [f"arn:aws:s3:::{bucket}/*"]},
            {"Effect": "Deny", "Action": ["s3:*"], "Resource": within(*foreign)},
        ],
        "PIPELINES": [
            {"Effect": "Allow", "Action": OBJECTS, "Resource": within(kfp, logs)},
            {"Effect": "Deny", "Action": ["s3:*"], "Resource": within(SPECIFICATIONS)},
        ],
    }
    return {user: {"Version": "2012-10-17", "Statement": [listing, *more]} for user, more in statements.items()}


def make(admin: MinioAdmin, rights: dict[str, dict[str, Any]], keys: dict[str, tuple[str, str]]) -> None:
    """Set the rights and keys of every user that has keys."""
    for user, (access, secret) in keys.items():
        name = f"firm-{user.lower()}"
        admin.policy_add(name, policy=rights[user])
        admin.user_add(access, secret)
        admin.policy_set(name, user=access)


def main() -> None:
    """Wait for the server, and make the users."""
    env = os.environ
    endpoint = urlsplit(env["FIRM_S3_ENDPOINT"])
    root = StaticProvider(env["ROOT_ACCESS_KEY"], env["ROOT_SECRET_KEY"])
    secure = endpoint.scheme == "https"
    pool = urllib3.PoolManager(timeout=10, retries=False, ssl_context=tls_context() if secure else None)
    admin = MinioAdmin(endpoint=endpoint.netloc, credentials=root, secure=secure, http_client=pool)
    keys = {
        user: (env[f"{user}_ACCESS_KEY"], env[f"{user}_SECRET_KEY"])
        for user in ("PIPELINES", "FIRM")
        if f"{user}_ACCESS_KEY" in env
    }
    if shared := keys["FIRM"] == keys.get("PIPELINES"):
        del keys["PIPELINES"]  # a key that is at work must not have the narrower rights for a moment
    rights = policies(*sys.argv[1:], shared)
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return make(admin, rights, keys)
        except (urllib3.exceptions.HTTPError, MinioAdminException) as error:
            if time.monotonic() > end:
                sys.exit(f"MinIO at {endpoint.netloc} made no users: {error}")
            sys.stderr.write(f"waiting for MinIO: {error}\n")
            time.sleep(2)


if __name__ == "__main__":
    main()
