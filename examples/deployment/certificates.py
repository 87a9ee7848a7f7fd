"""A certificate authority of your own, a server certificate, and a key pair for each SuperNode.

    python examples/deployment/certificates.py FOLDER --host NAME_OR_ADDRESS --node fr-00

Writes ca.pem (public, goes to every machine), ca.key (secret: whoever has it can pose as the
server; keep it off all of them), server.pem and server.key (to the SuperLink's machine), and for
each node keys/NAME (secret, stays on its machine: better make it there) and keys/NAME.pub
(registered with the SuperLink). Files that are there already are kept.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS, AUTHORITY = 365, "fedp2eft federation"


def write_secret(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(data)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def builder(name: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The certificate authority of a folder, made if absent."""
    key_file, file = folder / "ca.key", folder / "ca.pem"
    if file.exists():
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key, x509.load_pem_x509_certificate(file.read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    made = builder(AUTHORITY, key, 10 * DAYS)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        made.issuer_name(common_name(AUTHORITY))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identity, critical=False)
        .sign(key, hashes.SHA384())
    )
    write_secret(key_file, pem(key))
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def server(folder: Path, hosts: list[str]) -> None:
    """server.pem and server.key for these names and addresses."""
    if (folder / "server.pem").exists():
        return
    ca_key, ca = authority(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    signer = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    names = x509.SubjectAlternativeName([general_name(host) for host in hosts])
    certificate = (
        builder(hosts[0], key, DAYS)
        .issuer_name(ca.subject)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    write_secret(folder / "server.key", pem(key))
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def node(folder: Path, name: str) -> None:
    """keys/NAME and keys/NAME.pub in OpenSSH's formats; `ssh-keygen -t ecdsa -b 384` makes such."""
    private = folder / "keys" / name
    if private.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_secret(private, secret)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    private.with_suffix(".pub").write_bytes(public + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", action="append", help="name or address of the SuperLink")
    parser.add_argument("--node", action="append", default=[], help="name of a SuperNode's key")
    options = parser.parse_args()
    server(options.folder, options.host or ["localhost", "127.0.0.1", "::1"])
    for name in options.node:
        node(options.folder, name)
    print(f"{options.folder}: ca.pem, server.pem, {len(options.node)} key pairs")


if __name__ == "__main__":
    main()
