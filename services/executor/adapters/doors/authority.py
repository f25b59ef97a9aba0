"""Who is a node, and who is the front door: certificates, under an authority that the installation's door key makes.

All of it follows from that key, the same wherever and whenever it is made: a restart changes no certificate, and who
has another key is a stranger. They have no end of their own; a new key ends them all.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.executor.domain.doors import name_below

FROM, UNTIL = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2020, 2120))
_AUTHORITY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Nabla nodes")])


class DoorAuthority:
    """Args: key: the installation's door key, 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._private = self._derived("authority")

    @property
    def certificate(self) -> str:
        """The authority's own, in PEM: what nodes and the front door believe each other by."""
        builder = _builder(_AUTHORITY, self._private.public_key(), b"authority")
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return self._signed(builder.add_extension(usage, critical=True))

    def of_node(self, node_id: str) -> tuple[str, str]:
        """Certificate and private key of the node, in PEM: it may answer for every name below its own."""
        private = self._derived(f"node {node_id}")
        names = x509.SubjectAlternativeName([x509.DNSName(name_below(node_id, "*"))])
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = _builder(_named("node"), private.public_key(), f"node {node_id}".encode())
        signed = self._signed(builder.add_extension(names, critical=False).add_extension(purpose, critical=False))
        return signed, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()

    def of_front_door(self, public_key: str) -> str:
        """A certificate for the front door's own key, which stays where it is.

        Args:
            public_key: an Ed25519 one, in PEM.

        Raises:
            ValueError: it is none.
        """
        try:
            public = load_pem_public_key(public_key.encode())
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from None
        if not isinstance(public, Ed25519PublicKey):
            raise ValueError("the key is not an Ed25519 one")
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = _builder(_named("front door"), public, public_key.encode())
        return self._signed(builder.add_extension(purpose, critical=False))

    def _derived(self, purpose: str) -> Ed25519PrivateKey:
        seed = hmac.new(self._key, f"key of {purpose}".encode(), hashlib.sha256).digest()
        return Ed25519PrivateKey.from_private_bytes(seed)

    def _signed(self, builder: x509.CertificateBuilder) -> str:
        return builder.sign(self._private, algorithm=None).public_bytes(Encoding.PEM).decode()


def _builder(subject: x509.Name, public: Ed25519PublicKey, seed: bytes) -> x509.CertificateBuilder:
    number = int.from_bytes(hashlib.sha256(seed).digest()[:8]) + 1
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY)
        .public_key(public)
        .serial_number(number)
        .not_valid_before(FROM)
        .not_valid_after(UNTIL)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
