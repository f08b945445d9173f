"""A root certificate and one to sign with, made anew for each run of the tests."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign")


def make(folder: Path) -> tuple[Path, Path]:
    """Files of a chain, the signing certificate first, and of its private key (es256)."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _about("Test root", "Test root", root_key.public_key(), authority=True).sign(root_key, hashes.SHA256())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    signing = _about("Test signer", "Test root", key.public_key(), authority=False).add_extension(issuer, critical=False)
    chain = [signing.sign(root_key, hashes.SHA256()), root]
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*pem))
    return folder / "chain.pem", folder / "key.pem"


def _about(subject: str, issuer: str, key: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.CertificateBuilder:
    now, uses = dt.datetime.now(dt.UTC), ("key_cert_sign", "crl_sign") if authority else ("digital_signature",)
    usage = x509.KeyUsage(**{name: name in uses for name in USES}, encipher_only=False, decipher_only=False)
    about = x509.CertificateBuilder(_name(issuer), _name(subject), key, x509.random_serial_number())
    about = about.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=7))
    about = about.add_extension(x509.BasicConstraints(authority, None), critical=True).add_extension(usage, critical=True)
    about = about.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    if authority:
        return about
    return about.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, common_name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "renderfarm's tests")]
    )
