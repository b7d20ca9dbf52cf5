"""Certificates, keys and credential files, made anew for a test."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from server import ACCOUNT

USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Certificates(NamedTuple):
    """PEM files: certificates of an authority, of a server on loopback and of a client, and the keys of both."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path

    def context(self, client: bool = False) -> ssl.SSLContext:
        """Make the server's TLS context, which may demand the client's certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server, self.server_key)
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.authority)
        return context

    def client_environment(self) -> dict[str, str]:
        """Write the file that names the client's certificate; the environment with which the library sends it."""
        path = self.authority.with_name("certificate_config.json")
        workload = {"cert_path": str(self.client), "key_path": str(self.client_key)}
        path.write_text(json.dumps({"version": 1, "cert_configs": {"workload": workload}}))
        return {"GOOGLE_API_USE_CLIENT_CERTIFICATE": "true", "GOOGLE_API_CERTIFICATE_CONFIG": str(path)}


def pem(key: rsa.RSAPrivateKey) -> bytes:
    """Write a private key."""
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def make_certificates(directory: Path) -> Certificates:
    """Write new certificates, valid for a day, that trust no one but each other."""
    made = Certificates(*(directory / f"{part}.pem" for part in Certificates._fields))
    authority = rsa.generate_private_key(65537, 2048)
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    for path, key_path in ((made.authority, None), (made.server, made.server_key), (made.client, made.client_key)):
        key = rsa.generate_private_key(65537, 2048) if key_path else authority
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"WattIf test {name}")])
            for name in (path.stem, "authority")
        )
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=not key_path, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        usage = dict.fromkeys(USAGES, False)
        usage["digital_signature" if key_path else "key_cert_sign"] = True
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        issuing = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        builder = builder.add_extension(issuing, critical=False)
        path.write_bytes(builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        if key_path:
            key_path.write_bytes(pem(key))
    return made


def metadata_environment(url: str) -> dict[str, str]:
    """The environment of a VM whose metadata server is at a URL."""
    host = url.partition("://")[2]
    return {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host, "NO_GCE_CHECK": "false"}


def service_account(directory: Path, url: str) -> dict[str, str]:
    """Write a service account's key, with the token endpoint at a URL; the environment that names it."""
    made = {
        "type": "service_account",
        "project_id": "a-project",
        "private_key_id": "1",
        "private_key": pem(rsa.generate_private_key(65537, 2048)).decode(),
        "client_email": ACCOUNT,
        "client_id": "1",
        "token_uri": f"{url}/token",
    }
    return credential_file(directory / "service_account.json", made)


def external_account(directory: Path, url: str) -> dict[str, str]:
    """Write credentials that exchange a token from a file at a URL's STS; the environment that names them."""
    subject = directory / "subject_token"
    subject.write_text("subject-token")
    made = {
        "type": "external_account",
        # Of a workforce: with a workload's, the library asks the real service for the project's name.
        "audience": "//iam.googleapis.com/locations/global/workforcePools/pool/providers/provider",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{url}/sts",
        "credential_source": {"file": str(subject)},
    }
    return credential_file(directory / "external_account.json", made)


def credential_file(path: Path, made: dict[str, str]) -> dict[str, str]:
    """Write a credential file; the environment that names it."""
    path.write_text(json.dumps(made))
    return {"GOOGLE_APPLICATION_CREDENTIALS": str(path), "GOOGLE_CLOUD_PROJECT": "a-project"}
