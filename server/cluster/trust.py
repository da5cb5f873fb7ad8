"""The cluster's secret: a key and a certificate of it, made once by the conductor and handed out through Ray.

Connections between gateways and agents are TLS 1.3 in which both ends show this certificate and trust no other one, so
whoever does not have the secret neither reads nor says anything. It lies in the conductor's state, which only its user
can read; to change it, stop the cluster and delete that folder.
"""

from __future__ import annotations

import ssl
import tempfile
from datetime import datetime, timedelta, timezone
from functools import lru_cache

CERTIFICATE = "-----BEGIN CERTIFICATE-----"
YEARS = 30


def make() -> str:
    """A new secret, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "spectral cluster")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of machines differ
        .not_valid_after(now + timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return (private + made.public_bytes(serialization.Encoding.PEM)).decode()


@lru_cache(maxsize=8)
def listening(secret: str) -> ssl.SSLContext:
    """For the end that is connected to. Raises ValueError for what is no secret."""
    return _context(secret, ssl.PROTOCOL_TLS_SERVER)


@lru_cache(maxsize=8)
def dialling(secret: str) -> ssl.SSLContext:
    """For the end that connects. Raises ValueError for what is no secret."""
    return _context(secret, ssl.PROTOCOL_TLS_CLIENT)


def _context(secret: str, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # who shows the certificate has the key, whatever the machine is called
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=secret[secret.index(CERTIFICATE) :])
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # it takes nothing but a file, which is 0600
            file.write(secret)
            file.flush()
            context.load_cert_chain(file.name)
    except (ValueError, ssl.SSLError) as error:
        raise ValueError(f"this is no secret of a cluster: {error}") from error
    return context
