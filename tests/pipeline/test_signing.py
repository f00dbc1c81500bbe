"""Statements and bills of materials in the eyes of others: in-toto, model-signing, CycloneDX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import loratools as lt
from loratools_formats.disk.provenance import PROVENANCE_FILE, sha256_of

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"


@pytest.fixture
def both(tmp_path):
    """Return a folder that was made in two steps, with all ranks kept."""
    lt.merge({LLAMA / "lora": 0.5, LLAMA / "rslora": 0.5}, output=tmp_path / "sum")
    lt.merge({tmp_path / "sum": 1.0, LLAMA / "lora": -0.5}, output=tmp_path / "both")
    return tmp_path / "both"


def signing(*words):
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_finished_folder_is_signed_and_verified_with_a_key_offline(both, tmp_path):
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private, public, signature = (tmp_path / name for name in ("key.pem", "key.pub", "both.sig"))
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    done = signing("sign", "key", both, "--private_key", private, "--signature", signature)
    assert done.returncode == 0, done.stderr
    check = ["verify", "key", both, "--public_key", public, "--signature", signature]
    assert signing(*check).returncode == 0
    assert lt.replay(both, input=[LLAMA]).identical
    place = both / PROVENANCE_FILE
    place.write_bytes(place.read_bytes().replace(b'"operation": "merge"', b'"operation": "murge"'))
    spoiled = signing(*check)
    assert spoiled.returncode != 0
    assert "provenance.json" in spoiled.stdout + spoiled.stderr


def test_in_toto_takes_the_statement(both):
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    statement = Statement.copy_from_pb(
        json_format.Parse((both / PROVENANCE_FILE).read_text(), Message())
    )
    statement.validate()
    digests = {one.name: dict(one.digest) for one in statement.pb.subject}
    weights = both / "adapter_model.safetensors"
    assert digests[weights.name] == {"sha256": sha256_of(weights)}


def test_cyclonedx_takes_the_bill_of_materials(both, monkeypatch):
    pytest.importorskip("cyclonedx")
    pytest.importorskip("jsonschema")
    from cyclonedx.model.bom import Bom
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    text = lt.provenance(both).cyclonedx()
    assert text == lt.provenance(both).cyclonedx()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = Bom.from_json(json.loads(text))
    assert bom.metadata.component.name == "both"
    assert bom.metadata.component.type == "machine-learning-model"
    (digest,) = bom.metadata.component.hashes
    assert digest.content == sha256_of(both / "adapter_model.safetensors")
    named = {str(one.bom_ref): one.name for one in (*bom.components, bom.metadata.component)}
    needs = {
        named[str(one.ref)]: {named[str(other.ref)] for other in one.dependencies}
        for one in bom.dependencies
    }
    assert needs["both"] == {"lora", "sum"}
    assert needs["sum"] == {"lora", "rslora"}
    originals = {one.name: one for one in bom.components if str(one.bom_ref).startswith("orig")}
    hashes = {name: next(iter(one.hashes)).content for name, one in originals.items()}
    assert hashes == {
        name: sha256_of(LLAMA / name / "adapter_model.safetensors") for name in ("lora", "rslora")
    }
    assert "timestamp" not in text
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    timed = lt.provenance(both).cyclonedx()
    assert json.loads(timed)["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(lt.LoratoolsError, match="SOURCE_DATE_EPOCH is not a time"):
        lt.provenance(both).cyclonedx()
