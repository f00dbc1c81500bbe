"""A scheduler that talks TLS only, with certificates made here and Dask's own settings for them."""

import datetime as dt

import pytest
from fleet_runs import Cluster, contents, fleet, run

x509 = pytest.importorskip("cryptography.x509")
pytest.importorskip("distributed")
pytestmark = pytest.mark.slow
RANK = ("--", "--rank", "2")


def certificate(folder, name, issuer=None):
    """Write a key and a certificate, its own issuer's if none is given; returns both objects."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer, signed_by = (key, subject) if issuer is None else (issuer[0], issuer[1].subject)
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(encoding, *private))
    (folder / f"{name}.pem").write_bytes(made.public_bytes(encoding))
    return key, made


def settings(folder, authority, name):
    """Return Dask's settings for TLS as variables."""
    start = "DASK_DISTRIBUTED__COMM__TLS__"
    found = {f"{start}CA_FILE": str(folder / f"{authority}.pem")}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        found[f"{start}{role}__CERT"] = str(folder / f"{name}.pem")
        found[f"{start}{role}__KEY"] = str(folder / f"{name}.key")
    return {**found, "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    certificate(folder, "fleet", certificate(folder, "authority"))
    certificate(folder, "stranger", certificate(folder, "another"))
    ours = settings(folder, "authority", "fleet")
    made = Cluster(folder, 1, ours, ("--protocol", "tls"))
    yield made.address, ours, settings(folder, "another", "stranger")
    made.close()


def test_a_fleet_goes_over_tls_and_strangers_do_not(tls, adapters, singles, tmp_path):
    address, ours, others = tls
    assert address.startswith("tls://")
    given = ("squeeze", "adapters/*", "-o", "out", "--scheduler", address, *RANK)
    found = fleet(*given, cwd=tmp_path, **ours)
    assert (found["made"], found["failed"]) == (6, 0)
    assert contents(tmp_path / "out") == singles()
    for variables, told in ((others, "cannot be reached"), ({}, "certificate")):
        code, _, err = run("fleet", *given, cwd=tmp_path, DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT
                           ="5s", **variables)  # fmt: skip
        assert (code, err.startswith("error: the scheduler cannot be reached")) == (2, True), err
        assert told in err
