"""S3 and what speaks its language: pyarrow reads and lists, boto3 writes, conditionally where it matters.

Both know every way by which AWS gives credentials (profiles, SSO, roles), and readers go without boto3. Streams of
pyarrow are never used for writing: an exception inside one publishes the truncated object.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from probelog.errors import UsageError
from probelog.storage.backends.backend import ArrowBackend, Bucket, without_keys

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class S3(ArrowBackend, Bucket):
    advice = "Check the bucket, the AWS_* credentials and AWS_ENDPOINT_URL."
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

    _client: S3Client | None = None

    def _open_filesystem(self) -> pafs.FileSystem:
        endpoint = _endpoint()
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options: dict[str, Any] = {"region": region} if region else {}
        if endpoint:
            split = urlsplit(endpoint)
            options |= {"endpoint_override": split.netloc, "scheme": split.scheme}
        return pafs.S3FileSystem(**options)

    @property
    def client(self) -> S3Client:
        with self._lock:
            if self._client is None:
                try:
                    import boto3
                except ImportError as error:
                    raise UsageError("writing to s3:// needs boto3: install probelog[index]") from error
                self._client = boto3.client("s3", endpoint_url=_endpoint())
            return self._client

    def read(self, name: str) -> bytes:
        with self.open(name) as stream:
            return bytes(stream.read())

    def time(self) -> dt.datetime:
        # Below the store's own prefix: credentials may be good for nothing else.
        listing = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.object_key(""), MaxKeys=1)
        return parsedate_to_datetime(listing["ResponseMetadata"]["HTTPHeaders"]["date"])

    def tagged(self, name: str) -> tuple[bytes | None, str | None]:
        client = self.client
        try:
            response = client.get_object(Bucket=self.bucket, Key=self.object_key(name))
            return response["Body"].read(), str(response["ETag"])
        except client.exceptions.NoSuchKey:
            return None, None

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.object_key(name), Body=data)

    def put_if(self, name: str, data: bytes, tag: str | None) -> bool:
        from botocore.exceptions import ClientError

        key = self.object_key(name)
        try:
            if tag is None:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
            else:
                self.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfMatch=tag)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                return False
            raise
        return True

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.object_key(name))

    @classmethod
    def lance_options(cls) -> dict[str, str]:
        endpoint = _endpoint()
        if endpoint is None:
            return {}
        return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}

    def errors(self) -> tuple[type[Exception], ...]:
        loaded = sys.modules.get("botocore.exceptions")  # readers go without
        return (*super().errors(), *((loaded.BotoCoreError, loaded.ClientError) if loaded else ()))


def _endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    return None if endpoint is None else without_keys("AWS_ENDPOINT_URL", endpoint, S3.keys)
