# SPDX-License-Identifier: Apache-2.0
"""HTTPS, certificates of clients, and the health check of the images, which follows both."""

import http.client
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from server.state import Phase

HEALTHCHECK = Path(__file__).resolve().parents[2] / "deploy" / "healthcheck.py"


@pytest.fixture
def certificate(tmp_path):
    """Return the paths of a certificate for 127.0.0.1 that signs itself, and of its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    certificate_path, key_path = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate_path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    no_password = serialization.NoEncryption()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    key_path.write_bytes(key.private_bytes(*form, no_password))
    return certificate_path, key_path


@pytest.mark.parametrize("ask_client", [False, True])
def test_https_and_client_certificates(start, certificate, ask_client):
    certificate_path, key_path = certificate
    settings = {"ssl_ca_certs": certificate_path} if ask_client else {}
    server = start(ssl_certfile=certificate_path, ssl_keyfile=key_path, **settings)
    context = ssl.create_default_context(cafile=str(certificate_path))

    def get():
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context)
        connection.request("GET", "/x")
        return connection.getresponse().status

    if ask_client:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            get()
        context.load_cert_chain(certificate_path, key_path)
    assert get() == 200


@pytest.mark.parametrize("tls", [False, True])
def test_the_health_check_of_the_images_follows_port_and_tls(start, certificate, tls):
    server = start(**dict(zip(("ssl_certfile", "ssl_keyfile"), certificate, strict=True)) if tls else {})
    variables = {
        "PVQ_PORT": str(server.port),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    if tls:
        variables["PVQ_SSL_CERTFILE"] = str(certificate[0])

    def status():
        command = [sys.executable, str(HEALTHCHECK)]
        return subprocess.run(command, env=os.environ | variables, timeout=60, check=False).returncode

    assert status() == 0
    server.state.enter(Phase.LOADING)
    assert status() == 1
