# SPDX-License-Identifier: Apache-2.0
"""Nothing of an image is used before its signature was verified: attacks from outside, and cosign."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import media_types
from oci.cosign_tags import SIGNATURES, tag_of
from oci.layout import Layout
from oci.trust.bundle import MEDIA_TYPE, SIMPLE_MEDIA_TYPE, Bundle, SimpleSignature
from oci.trust.keys import PrivateKey, PublicKey
from oci.trust.statement import COSIGN_SIGN, PAYLOAD_TYPE, SNAPSHOT, Envelope, Statement
from rekindle.digest import Digest
from tests.conftest import COSIGN, COSIGN_2, Done, Rekindle, Replica, free_port
from tests.samples.cache import triton
from tests.samples.certificates import NAME, OwnAuthority
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.docker_registry import DockerRegistry
from tests.servers.registry.simulator import EMPTY, Registry

REPOSITORY = "models/horse"
TAG = "1"
TRUST, INTEGRITY, FORMAT = 22, 21, 20
INSECURE = ["--allow-insecure-registry", "--allow-http-registry"]
LOCALLY = ["--insecure-ignore-tlog=true", *INSECURE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prey:
    """A snapshot with a kernel cache in a local store, signed with `ours` too, and what a push of it gave.

    `parts` are the digests of its process image and of its cache, by their role.
    """

    home: Path
    ours: Path
    stranger: Path
    repositories: dict[str, Any]
    index: str
    parts: dict[str, list[str]]
    size: dict[str, int]


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Prey:
    place = tmp_path_factory.mktemp("trust")
    rekindle = Rekindle(place / "home", {"TMPDIR": str(place), "COSIGN_PASSWORD": ""})
    for name in ("ours", "stranger"):
        assert rekindle("generate-key-pair", "--output-key-prefix", str(place / name)).status == 0
    triton(place / "kernels")
    done = rekindle.snapshot_workhorse(
        "horse",
        free_port(),
        flags=["--sign-key", f"{place}/ours.key", "--no-prove"],
        env={"TRITON_CACHE_DIR": str(place / "kernels")},
    )
    assert done.status == 0, done.stderr
    with Registry() as registry:
        done = rekindle("push", "horse", f"{registry.host}/{REPOSITORY}:{TAG}")
        assert done.status == 0, done.stderr
        repositories = registry.repositories
    there = repositories[REPOSITORY]
    index = there.tags[TAG]
    parts: dict[str, list[str]] = {"manifest": [], "config": [], "layer": []}
    entries = json.loads(there.manifests[index][1])["manifests"]
    # The process first: readers that know nothing of it get the cache, which stands before it.
    for entry in sorted(entries, key=lambda each: media_types.ROLE in each.get("annotations", {})):
        manifest = json.loads(there.manifests[entry["digest"]][1])
        parts["manifest"].append(entry["digest"])
        parts["config"].append(manifest["config"]["digest"])
        parts["layer"] += [layer["digest"] for layer in manifest["layers"]]
    assert [len(parts["manifest"]), len(parts["config"])] == [2, 2]
    return Prey(
        home=place / "home",
        ours=place / "ours",
        stranger=place / "stranger",
        repositories=repositories,
        index=index,
        parts=parts,
        size={digest: len(there.blobs[digest]) for kind in ("config", "layer") for digest in parts[kind]},
    )


@dataclass(slots=True, kw_only=True)
class Scene:
    """A registry of its own that has the prey, and what an attacker does there."""

    prey: Prey
    registry: Registry
    rekindle: Rekindle
    flags: list[str]
    directory: Path
    _keys: dict[str, PrivateKey] = field(default_factory=dict)

    @property
    def image(self) -> str:
        return f"{self.registry.host}/{REPOSITORY}:{TAG}"

    @property
    def there(self) -> Any:
        return self.registry.repositories[REPOSITORY]

    def key(self, name: str) -> PrivateKey:
        if name not in self._keys:
            self._keys[name] = PrivateKey.read(getattr(self.prey, name).with_suffix(".key"), b"")
        return self._keys[name]

    def referrers(self, digest: str | None = None) -> list[str]:
        """The manifests that say that they refer to an image: to the index, unless said."""
        wanted = digest or self.prey.index
        return [
            name
            for name, (_, content) in self.there.manifests.items()
            if json.loads(content).get("subject", {}).get("digest") == wanted
        ]

    def strip(self) -> None:
        """Takes all signatures of the index away."""
        for digest in self.referrers():
            del self.there.manifests[digest]

    def attach(self, content: bytes, subject: str | None = None) -> str:
        """Attaches a bundle, whatever it says; returns its manifest's digest."""
        subject = subject or self.prey.index
        media_type, manifest = self.there.manifests[subject]
        bundle = self.registry.add_blob(REPOSITORY, content)
        config = self.registry.add_blob(REPOSITORY, b"{}")
        return self.registry.add_manifest(
            REPOSITORY,
            {
                "schemaVersion": 2,
                "mediaType": media_types.MANIFEST,
                "artifactType": MEDIA_TYPE,
                "config": {"mediaType": EMPTY, "digest": config, "size": 2},
                "layers": [{"mediaType": MEDIA_TYPE, "digest": bundle, "size": len(content)}],
                "subject": {"mediaType": media_type, "digest": subject, "size": len(manifest)},
            },
        )

    def bundle(self, by: str, kind: str = COSIGN_SIGN, about: str | None = None, **predicate: Any) -> bytes:
        """What is signed of an image, by a key."""
        subject = Digest.parse(about or self.prey.index)
        statement = Statement(subject=subject, predicate_type=kind, predicate=predicate)
        return Bundle.sign(statement, self.key(by)).content

    def signed(self, payload: bytes, payload_type: str = PAYLOAD_TYPE) -> dict[str, Any]:
        """A bundle around any payload, as a dictionary to be spoiled. Our key has signed it."""
        envelope = Envelope(payload=payload, payload_type=payload_type, signatures=())
        signature = self.key("ours").sign(envelope.signed)
        content = structs.replace(envelope, signatures=(signature,)).to_json()
        hint = self.key("ours").public.hint
        return {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}},
            "dsseEnvelope": content,
        }

    def other(self, **changes: Any) -> str:
        """Another index of the same images in the repository; returns its digest."""
        document = json.loads(self.there.manifests[self.prey.index][1])
        return self.registry.add_manifest(REPOSITORY, document | {"annotations": changes})

    def policy(self, text: str) -> None:
        """Instead of the key on the command line."""
        path = self.directory / "policy.toml"
        path.write_text(text)
        self.flags[:] = ["--policy", str(path)]

    def wipe(self) -> None:
        """Forgets what was seen, so that what follows stands alone."""
        (self.rekindle.home / "seen.json").unlink(missing_ok=True)


@pytest.fixture
def scene(prey: Prey, tmp_path: Path) -> Iterator[Scene]:
    rekindle = Rekindle(tmp_path / "home", {"TMPDIR": str(tmp_path), "COSIGN_PASSWORD": ""})
    with Registry() as registry:
        there = prey.repositories[REPOSITORY]
        registry.repositories[REPOSITORY] = type(there)(
            blobs=dict(there.blobs), manifests=dict(there.manifests), tags=dict(there.tags)
        )
        yield Scene(
            prey=prey,
            registry=registry,
            rekindle=rekindle,
            flags=["--verify-key", f"{prey.ours}.pub"],
            directory=tmp_path,
        )


VERBS = ("restore", "extract", "pull")


def use(verb: str, image: str, rekindle: Rekindle, directory: Path, flags: Sequence[str]) -> Done:
    """Asks for what is in an image, in one of the three ways that there are."""
    port = str(free_port())
    words = {
        "restore": ["restore", image, "--publish", port],
        "extract": ["extract", image, "--to", str(directory / "out")],
        "pull": ["pull", "--unpack", image],
    }[verb]
    return rekindle(*words, *flags, "--report", str(directory / "report.json"))


def require_nothing_used(rekindle: Rekindle, directory: Path) -> None:
    """No dump that is ready or half so, no cache, and no step was begun in which anything runs."""
    assert not (directory / "out").exists()
    assert not [path for path in (rekindle.home / "dumps").glob("*") if path.suffix != ".lock"]
    assert not list((rekindle.home / "run").glob("*/*"))
    if (directory / "report.json").exists():
        report = json.loads((directory / "report.json").read_text())
        assert report["outcome"] == "failed"
        assert not {"cell", "restore", "oracle"} & {phase["name"] for phase in report["phases"]}
        (directory / "report.json").unlink()


# What an attacker does, and with which exit statuses it may end. Nothing of it may need a layer.


def _unsigned(scene: Scene) -> None:
    scene.strip()


def _signed_by_a_stranger(scene: Scene) -> None:
    scene.strip()
    scene.attach(scene.bundle("stranger"))
    scene.attach(scene.bundle("stranger", SNAPSHOT, created="2026-01-02T03:04:05Z"))


def _signed_by_a_stranger_in_our_name(scene: Scene) -> None:
    scene.strip()
    document = json.loads(scene.bundle("stranger"))
    document["verificationMaterial"]["publicKey"]["hint"] = scene.key("ours").public.hint
    scene.attach(json.dumps(document).encode())


def _signature_of_another_image_moved_over(scene: Scene) -> None:
    scene.strip()
    scene.attach(scene.bundle("ours", about=scene.other()))


def _signature_of_the_cache_moved_over(scene: Scene) -> None:
    scene.strip()
    scene.attach(scene.bundle("ours", about=scene.prey.parts["manifest"][1]))


def _another_index_under_the_tag(scene: Scene) -> None:
    scene.there.tags[TAG] = scene.other(evil="yes")


def _signatures_attached_anew_to_another_index(scene: Scene) -> None:
    other = scene.other(evil="yes")
    for digest in scene.referrers():
        manifest = json.loads(scene.there.manifests[digest][1])
        manifest["subject"] |= {"digest": other, "size": len(scene.there.manifests[other][1])}
        scene.registry.add_manifest(REPOSITORY, manifest)
    scene.there.tags[TAG] = other


def _index_swapped_under_its_digest(scene: Scene) -> None:
    content = scene.there.manifests[scene.prey.index][1].replace(b"linux", b"Linux")
    scene.registry.misbehave(wrong.other_manifest(TAG, content))


def _referrers_swapped(scene: Scene) -> None:
    for digest in scene.referrers():
        content = scene.there.manifests[digest][1].replace(b"dsse-envelope", b"DSSE-envelope")
        scene.registry.misbehave(wrong.other_manifest(digest, content))


def _bundles_swapped(scene: Scene) -> None:
    for digest in scene.referrers():
        manifest = json.loads(scene.there.manifests[digest][1])
        scene.registry.misbehave(wrong.wrong_bytes(manifest["layers"][0]["digest"]))


def _referrers_that_lie(scene: Scene) -> None:
    other = scene.other()
    digest = scene.attach(scene.bundle("ours", about=other), other)
    scene.strip()
    scene.registry.misbehave(wrong.lying_referrers(scene.registry, REPOSITORY, digest))


def _referrers_that_lie_about_what_lies_elsewhere(scene: Scene) -> None:
    """A good statement about our image, in a manifest that is attached to another one."""
    digest = scene.attach(scene.bundle("ours"), scene.other())
    scene.strip()
    scene.registry.misbehave(wrong.lying_referrers(scene.registry, REPOSITORY, digest))


def _referrers_that_are_no_list(scene: Scene) -> None:
    headers = {"Content-Type": media_types.INDEX}
    scene.registry.misbehave(wrong.answers(wrong.REFERRERS, b'{"manifests": {}}', headers=headers))


def _bundle_with_two_signatures(scene: Scene) -> None:
    scene.strip()
    document, second = (json.loads(scene.bundle(name)) for name in ("stranger", "ours"))
    document["dsseEnvelope"]["signatures"] += second["dsseEnvelope"]["signatures"]
    scene.attach(json.dumps(document).encode())


def _bundle_without_a_signature(scene: Scene) -> None:
    scene.strip()
    document = json.loads(scene.bundle("ours"))
    document["dsseEnvelope"]["signatures"] = []
    scene.attach(json.dumps(document).encode())
    document["dsseEnvelope"]["signatures"] = [{"sig": ""}]
    scene.attach(json.dumps(document).encode())


def _bundle_with_another_payload(scene: Scene) -> None:
    scene.strip()
    document = json.loads(scene.bundle("ours", about=scene.other()))
    payload = json.loads(scene.bundle("stranger"))["dsseEnvelope"]["payload"]
    document["dsseEnvelope"]["payload"] = payload
    scene.attach(json.dumps(document).encode())


def _another_payload_type(scene: Scene) -> None:
    """A statement that was signed as something else, and one that is called so only afterwards."""
    scene.strip()
    statement = Statement(subject=Digest.parse(scene.prey.index), predicate_type=COSIGN_SIGN, predicate={})
    document = scene.signed(statement.to_bytes(), "application/json")
    scene.attach(json.dumps(document).encode())
    document["dsseEnvelope"]["payloadType"] = PAYLOAD_TYPE
    scene.attach(json.dumps(document).encode())


def _simple_signing_as_statement(scene: Scene) -> None:
    """The payload of an older signature, with that signature, and signed as the payload of an envelope."""
    scene.strip()
    simple = SimpleSignature.sign(Digest.parse(scene.prey.index), "x", scene.key("ours"))
    document = scene.signed(simple.payload)
    scene.attach(json.dumps(document).encode())
    envelope = Envelope(payload=simple.payload, payload_type=PAYLOAD_TYPE, signatures=(simple.signature,))
    scene.attach(json.dumps({**document, "dsseEnvelope": envelope.to_json()}).encode())


def _statement_as_simple_signing(scene: Scene) -> None:
    """What an envelope's signature is over, as the payload of an older signature; also one of a stranger."""
    scene.strip()
    bundle = Bundle.parse(scene.bundle("ours"))
    (signature,) = bundle.envelope.signatures
    foreign = SimpleSignature.sign(Digest.parse(scene.prey.index), "x", scene.key("stranger"))
    another = SimpleSignature.sign(Digest.parse(scene.other()), "x", scene.key("ours"))
    pairs = [
        (bundle.envelope.signed, signature),
        (bundle.envelope.payload, signature),
        (foreign.payload, foreign.signature),
        (another.payload, another.signature),
    ]
    legacy(scene, pairs)


def _nonsense_under_the_older_tag(scene: Scene) -> None:
    scene.strip()
    tag = tag_of(Digest.parse(scene.prey.index), SIGNATURES)
    scene.registry.add_manifest(REPOSITORY, b"no JSON", tag)


def legacy(scene: Scene, pairs: Sequence[tuple[bytes, bytes]]) -> None:
    """Signatures under cosign's older tag."""
    from base64 import b64encode

    scene.registry.add_image(
        REPOSITORY,
        tag_of(Digest.parse(scene.prey.index), SIGNATURES),
        layers=[
            {
                "mediaType": SIMPLE_MEDIA_TYPE,
                "digest": scene.registry.add_blob(REPOSITORY, payload),
                "size": len(payload),
                "annotations": {"dev.cosignproject.cosign/signature": b64encode(signature).decode()},
            }
            for payload, signature in pairs
        ],
    )


def _another_predicate(scene: Scene) -> None:
    scene.strip()
    scene.attach(scene.bundle("ours", "https://slsa.dev/provenance/v1"))


def _an_attestation_alone(scene: Scene) -> None:
    scene.strip()
    created = datetime.now(UTC).isoformat()
    scene.attach(scene.bundle("ours", SNAPSHOT, created=created))


def _made_in_the_future(scene: Scene) -> None:
    scene.strip()
    scene.attach(scene.bundle("ours"))
    scene.attach(scene.bundle("ours", SNAPSHOT, created=(datetime.now(UTC) + timedelta(days=1)).isoformat()))


def _a_policy_without_a_rule(scene: Scene) -> None:
    scene.policy(f'[[image]]\nname = "registry.example.com/*"\nkeys = ["{scene.prey.ours}.pub"]\n')


def _a_policy_with_identities_only(scene: Scene) -> None:
    scene.policy('[[image]]\nname = "*"\nidentities = [{ identity = "a@b.c", issuer = "https://b.c" }]\n')


def _a_policy_whose_first_rule_is_another_s(scene: Scene) -> None:
    scene.policy(
        f'[[image]]\nname = "127.0.0.1*/models/*"\nkeys = ["{scene.prey.stranger}.pub"]\n'
        f'[[image]]\nname = "*"\nkeys = ["{scene.prey.ours}.pub"]\n'
    )


def _too_old(scene: Scene) -> None:
    scene.policy(f'[[image]]\nname = "*"\nkeys = ["{scene.prey.ours}.pub"]\nmax_age_days = 30\n')
    scene.strip()
    scene.attach(scene.bundle("ours"))
    scene.attach(scene.bundle("ours", SNAPSHOT, created=(datetime.now(UTC) - timedelta(days=31)).isoformat()))


def _of_an_age_that_only_a_stranger_says(scene: Scene) -> None:
    scene.policy(f'[[image]]\nname = "*"\nkeys = ["{scene.prey.ours}.pub"]\nmax_age_days = 30\n')
    scene.strip()
    scene.attach(scene.bundle("ours"))
    scene.attach(scene.bundle("stranger", SNAPSHOT, created=datetime.now(UTC).isoformat()))


def _nobody_is_trusted(scene: Scene) -> None:
    scene.flags.clear()


ATTACKS: dict[Callable[[Scene], None], set[int]] = {
    _unsigned: {TRUST},
    _signed_by_a_stranger: {TRUST},
    _signed_by_a_stranger_in_our_name: {TRUST},
    _signature_of_another_image_moved_over: {TRUST},
    _signature_of_the_cache_moved_over: {TRUST},
    _another_index_under_the_tag: {TRUST},
    _signatures_attached_anew_to_another_index: {TRUST},
    _index_swapped_under_its_digest: {INTEGRITY},
    _referrers_swapped: {TRUST},
    _bundles_swapped: {TRUST},
    _referrers_that_lie: {TRUST},
    _referrers_that_lie_about_what_lies_elsewhere: {TRUST},
    _referrers_that_are_no_list: {FORMAT},
    _bundle_with_two_signatures: {TRUST},
    _bundle_without_a_signature: {TRUST},
    _bundle_with_another_payload: {TRUST},
    _another_payload_type: {TRUST},
    _simple_signing_as_statement: {TRUST},
    _statement_as_simple_signing: {TRUST},
    _nonsense_under_the_older_tag: {TRUST},
    _another_predicate: {TRUST},
    _an_attestation_alone: {TRUST},
    _made_in_the_future: {TRUST},
    _a_policy_without_a_rule: {TRUST},
    _a_policy_with_identities_only: {TRUST},
    _a_policy_whose_first_rule_is_another_s: {TRUST},
    _too_old: {TRUST},
    _of_an_age_that_only_a_stranger_says: {TRUST},
    _nobody_is_trusted: {TRUST},
}


@pytest.mark.criu
def test_an_image_that_nobody_attacks_is_used(scene: Scene) -> None:
    """What the rows below stand on: the same commands, and they work."""
    done = use("extract", scene.image, scene.rekindle, scene.directory, scene.flags)
    assert done.status == 0, done.stderr
    assert list((scene.directory / "out").rglob("*.json"))
    done = use("pull", scene.image, scene.rekindle, scene.directory, scene.flags)
    assert done.status == 0, done.stderr
    report = json.loads((scene.directory / "report.json").read_text())
    assert report["trust"] == {"verified": True, "by": f"key {scene.key('ours').public.hint}"}
    done = scene.rekindle("verify", scene.image, *scene.flags, "--json")
    assert done.json["image"]["digest"] == scene.prey.index


@pytest.mark.criu
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__.strip("_"))
def test_an_attack_ends_before_anything_is_fetched_extracted_or_started(
    scene: Scene, attack: Callable[[Scene], None]
) -> None:
    attack(scene)
    for verb in VERBS:
        scene.registry.requests.clear()
        done = use(verb, scene.image, scene.rekindle, scene.directory, scene.flags)
        assert done.status in ATTACKS[attack], f"{verb}: {done.status} {done.stderr}"
        assert "Traceback" not in done.stderr
        asked = {request.reference for request in scene.registry.requests}
        assert not asked & {d for digests in scene.prey.parts.values() for d in digests}, verb
        require_nothing_used(scene.rekindle, scene.directory)
    assert not (scene.rekindle.home / "seen.json").exists(), "an image that was refused counts for nothing"


@pytest.mark.criu
@pytest.mark.parametrize("part", ["manifest", "config", "layer"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_part_that_was_swapped_under_its_digest_is_not_used(scene: Scene, part: str, verb: str) -> None:
    for digest in scene.prey.parts[part]:
        if part == "manifest":
            content = scene.there.manifests[digest][1].replace(b"schemaVersion", b"schemaversion")
            scene.registry.misbehave(wrong.other_manifest(digest, content))
        else:
            scene.registry.misbehave(wrong.wrong_bytes(digest))
    done = use(verb, scene.image, scene.rekindle, scene.directory, scene.flags)
    assert done.status in ({INTEGRITY, FORMAT} if part == "layer" else {INTEGRITY}), done.stderr
    if part != "layer":
        assert not [d for d in scene.prey.parts["layer"] if scene.registry.downloads(d)]
    require_nothing_used(scene.rekindle, scene.directory)


def test_a_cache_image_with_a_foreign_layer_is_not_extracted(rekindle: Rekindle, tmp_path: Path) -> None:
    """Its index entry and signature are right; of the same size, and also as valid gzip."""
    triton(tmp_path / "kernels")
    assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "kernels")).status == 0
    triton(tmp_path / "others")
    (next((tmp_path / "others").rglob("*.cubin"))).write_bytes(b"evil")
    assert rekindle("pack-cache", "others", "--dir", str(tmp_path / "others")).status == 0
    store = Layout(rekindle.home / "store")
    paths = []
    for name in ("kernels", "others"):
        root = store.resolve(f"{name}:latest")
        manifest = json.loads(store.read(root, limit_bytes=1 << 20))
        hexes = [layer["digest"].partition(":")[2] for layer in manifest["layers"]]
        paths.append([rekindle.home / "store/blobs/sha256" / hex_ for hex_ in hexes])
    for ours, foreign in zip(*paths, strict=True):
        size = ours.stat().st_size
        ours.write_bytes(foreign.read_bytes()[:size].ljust(size, b"\0"))
    done = rekindle("extract", "kernels", "--to", str(tmp_path / "out"))
    assert done.status in {INTEGRITY, FORMAT}, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.criu
def test_nonsense_beside_a_signature_hinders_nobody(scene: Scene) -> None:
    """Whoever may push to a repository may attach anything to an image, and must not break it."""
    for content in (b"", b"{}", b"null", b"[" * 100_000, os.urandom(1000), scene.bundle("stranger")):
        scene.attach(content)
    document = json.loads(scene.bundle("stranger"))
    document["verificationMaterial"]["publicKey"]["hint"] = "\x1b[2J\n" + "x" * 100_000
    scene.attach(json.dumps(document).encode())
    subject = {"mediaType": media_types.INDEX, "digest": scene.prey.index, "size": 1}
    scene.registry.add_manifest(REPOSITORY, {"mediaType": media_types.MANIFEST, "subject": subject})
    scene.registry.add_manifest(REPOSITORY, b"no JSON", tag_of(Digest.parse(scene.prey.index), SIGNATURES))
    done = scene.rekindle("verify", scene.image, *scene.flags)
    assert done.status == 0, done.stderr
    scene.wipe()
    done = scene.rekindle("verify", scene.image, "--verify-key", f"{scene.prey.stranger}.pub")
    assert done.status == 0, done.stderr
    assert scene.rekindle("generate-key-pair", "--output-key-prefix", f"{scene.directory}/new").status == 0
    done = scene.rekindle("verify", scene.image, "--verify-key", f"{scene.directory}/new.pub")
    assert done.status == TRUST
    assert "\x1b" not in done.stderr
    assert len(done.stderr) < 2000


# Rollback.


@pytest.mark.criu
def test_a_tag_that_is_moved_back_is_refused_unless_allowed(scene: Scene) -> None:
    older, newer = scene.other(age="older"), scene.other(age="newer")
    for digest, day in ((older, 1), (newer, 2)):
        scene.attach(scene.bundle("ours", about=digest), digest)
        created = f"2026-01-0{day}T00:00:00Z"
        scene.attach(scene.bundle("ours", SNAPSHOT, about=digest, created=created), digest)
    scene.there.tags[TAG] = older
    assert scene.rekindle("verify", scene.image, *scene.flags).status == 0
    scene.there.tags[TAG] = newer
    assert scene.rekindle("verify", scene.image, *scene.flags).status == 0
    scene.there.tags[TAG] = older
    for verb in VERBS:
        scene.registry.requests.clear()
        done = use(verb, scene.image, scene.rekindle, scene.directory, scene.flags)
        assert done.status == TRUST, done.stderr
        assert "--allow-rollback" in done.stderr
        assert not [d for d in scene.prey.parts["layer"] if scene.registry.downloads(d)]
        require_nothing_used(scene.rekindle, scene.directory)
    by_digest = f"{scene.image}@{older}"
    assert scene.rekindle("verify", by_digest, *scene.flags).status == 0, "a digest says which one is meant"
    allowed = [*scene.flags, "--allow-rollback"]
    done = use("extract", scene.image, scene.rekindle, scene.directory, allowed)
    assert done.status == 0, done.stderr
    assert scene.rekindle("verify", scene.image, *scene.flags).status == TRUST, "it was for once"

    # The newer one without its attestation could be any age.
    scene.there.tags[TAG] = newer
    for digest in scene.referrers(newer)[1:]:
        del scene.there.manifests[digest]
    done = scene.rekindle("verify", scene.image, *scene.flags)
    assert done.status == TRUST, done.stderr
    assert "unknown time" in done.stderr


# The one way round, and what makes no sense.


@pytest.mark.criu
def test_verification_is_skipped_on_request_alone_with_a_warning(scene: Scene) -> None:
    scene.strip()
    for verb in ("extract", "pull"):
        flags = ["--dangerously-skip-verification", "--quiet"]
        done = use(verb, scene.image, scene.rekindle, scene.directory, flags)
        assert done.status == 0, done.stderr
        assert "WARNING" in done.stderr
        report = json.loads((scene.directory / "report.json").read_text())
        assert report["trust"] == {"verified": False, "by": None}
    assert not (scene.rekindle.home / "seen.json").exists()
    done = scene.rekindle("verify", scene.image, "--dangerously-skip-verification")
    assert (done.status, "not verified" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    "flags",
    [
        ["--certificate-identity", "a@b.c"],
        ["--certificate-oidc-issuer", "https://b.c"],
        ["--certificate-identity", "", "--certificate-oidc-issuer", ""],
        ["--certificate-identity", "*", "--certificate-oidc-issuer", "https://b.c"],
        ["--verify-key", "/nowhere.pub"],
        ["--verify-key", "/dev/null"],
        ["--policy", "/nowhere.toml"],
        ["--policy", "/dev/null", "--certificate-identity", "a", "--certificate-oidc-issuer", "b"],
    ],
)
def test_half_an_identity_and_files_that_are_not_there_are_refused(
    rekindle: Rekindle, flags: list[str]
) -> None:
    with Registry() as registry:
        image = registry.add_image("a/b", "1", b"content")
        for words in (["verify"], ["extract"], ["pull", "--unpack"]):
            done = rekindle(*words, f"{registry.host}/a/b:1", *flags)
            assert done.status == 2, done.stderr
        assert not registry.asked(reference=image)
        assert not registry.downloads()


# The local store.


@pytest.fixture
def local(prey: Prey, tmp_path: Path) -> Rekindle:
    """A copy of the home in which the snapshot was made, as this machine's own."""
    shutil.copytree(prey.home, tmp_path / "home", symlinks=True, dirs_exist_ok=True)
    return Rekindle(tmp_path / "home", {"TMPDIR": str(tmp_path), "COSIGN_PASSWORD": ""})


def blob_of(rekindle: Rekindle, digest: str) -> Path:
    return rekindle.home / "store/blobs/sha256" / digest.partition(":")[2]


@pytest.mark.criu
@pytest.mark.parametrize("how", ["bytes", "symlink"])
@pytest.mark.parametrize("part", ["manifest", "config", "layer"])
def test_a_part_that_was_replaced_in_the_store_is_not_used(
    prey: Prey, local: Rekindle, tmp_path: Path, part: str, how: str
) -> None:
    for digest in prey.parts[part]:
        path = blob_of(local, digest)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        if how == "symlink":
            planted = tmp_path / f"planted-{path.name}"
            planted.write_bytes(content)
            path.symlink_to(planted)
        else:
            path.write_bytes(content)
    for verb in ("restore", "extract"):
        done = use(verb, "horse", local, tmp_path, [])
        assert done.status in ({INTEGRITY, FORMAT} if part == "layer" else {INTEGRITY}), done.stderr
        require_nothing_used(local, tmp_path)


def index_of(rekindle: Rekindle) -> dict[str, Any]:
    document = json.loads((rekindle.home / "store/index.json").read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.criu
def test_an_entry_of_the_store_s_index_that_was_replaced_is_refused(
    prey: Prey, local: Rekindle, tmp_path: Path
) -> None:
    document = index_of(local)
    content = blob_of(local, prey.index).read_bytes().replace(b"linux", b"Linux")
    digest = Digest.of_bytes(content)
    blob_of(local, str(digest)).write_bytes(content)
    for entry in document["manifests"]:
        if entry["digest"] == prey.index:
            entry |= {"digest": str(digest), "size": len(content)}
    (local.home / "store/index.json").write_text(json.dumps(document))
    for verb in ("restore", "extract"):
        done = use(verb, "horse", local, tmp_path, [])
        assert done.status == TRUST, done.stderr
        require_nothing_used(local, tmp_path)


@pytest.mark.criu
@pytest.mark.parametrize("with_a_key", [False, True])
def test_a_machine_s_own_signature_counts_on_that_machine_only(
    prey: Prey, rekindle: Rekindle, tmp_path: Path, with_a_key: bool
) -> None:
    if with_a_key:
        triton(tmp_path / "kernels")
        assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "kernels")).status == 0
        shutil.rmtree(rekindle.home / "store")
    else:
        rekindle.home.mkdir(mode=0o700, exist_ok=True)
    shutil.copytree(prey.home / "store", rekindle.home / "store")
    for verb in ("restore", "extract"):
        done = use(verb, "horse", rekindle, tmp_path, [])
        assert done.status == TRUST, done.stderr
        require_nothing_used(rekindle, tmp_path)
    # Who trusts the key that signed it besides may use it.
    assert rekindle("verify", "horse", "--verify-key", f"{prey.ours}.pub").status == 0


@pytest.mark.criu
def test_a_machine_s_own_signature_is_never_pushed(prey: Prey, local: Rekindle, tmp_path: Path) -> None:
    from oci.trust.keys import PublicKey

    machine = PublicKey.read(local.home / "machine.pub").hint
    entries = index_of(local)["manifests"]
    assert any(e.get("annotations", {}).get(media_types.SIGNER) == media_types.MACHINE for e in entries)
    with Registry() as registry:
        target = f"{registry.host}/{REPOSITORY}"
        assert local("push", "horse", f"{target}:1").status == 0
        assert local("copy", "horse", f"oci:{tmp_path}/layout:1").status == 0
        assert local("push", f"oci:{tmp_path}/layout:1", f"{target}:2").status == 0
        done = local.snapshot_workhorse(f"{target}:3", free_port(), flags=["--no-prove"])
        assert done.status == 0, done.stderr
        assert "not signed: sign it with" in done.stderr
        there = registry.repositories[REPOSITORY]
        assert len(there.tags) == 3
        assert not any(machine.encode() in bytes(blob) for blob in there.blobs.values() if len(blob) < 9999)
        assert local("verify", f"{target}:1", "--verify-key", f"{local.home}/machine.pub").status == TRUST
        assert local("verify", f"{target}:3", "--verify-key", f"{local.home}/machine.pub").status == TRUST
        assert local("verify", f"{target}:2", "--verify-key", f"{prey.ours}.pub").status == 0
    assert not any(
        machine.encode() in path.read_bytes()
        for path in (tmp_path / "layout").rglob("*")
        if path.is_file() and path.stat().st_size < 9999
    )


def test_the_store_s_policy_and_machine_key_survive_each_other(rekindle: Rekindle, tmp_path: Path) -> None:
    """A machine key whose public half was lost, by a power cut between the two, is made whole again."""
    triton(tmp_path / "kernels")
    words = ["pack-cache", "kernels", "--dir", str(tmp_path / "kernels")]
    assert rekindle(*words).status == 0
    assert stat.S_IMODE((rekindle.home / "machine.key").stat().st_mode) == 0o600
    (rekindle.home / "machine.pub").unlink()
    assert rekindle("verify", "kernels").status == TRUST
    assert rekindle(*words).status == 0
    assert rekindle("verify", "kernels").status == 0


# The dump that is kept ready.


@pytest.fixture
def ready(prey: Prey, scene: Scene) -> Path:
    """The ready dump of the prey."""
    done = use("pull", scene.image, scene.rekindle, scene.directory, scene.flags)
    assert done.status == 0, done.stderr
    dump = scene.rekindle.home / "dumps" / prey.parts["manifest"][0].partition(":")[2]
    assert unpacked_again(scene, dump) is False, "what nobody touched is used again"
    return dump


def unpacked_again(scene: Scene, dump: Path) -> bool:
    done = use("pull", scene.image, scene.rekindle, scene.directory, scene.flags)
    assert done.status == 0, done.stderr
    assert stat.S_IMODE(dump.lstat().st_mode) == 0o700
    assert stat.S_ISDIR(dump.lstat().st_mode)
    assert dump.lstat().st_uid == os.geteuid()
    report = json.loads((scene.directory / "report.json").read_text())
    return "unpack" in {phase["name"] for phase in report["phases"]}


def contents(dump: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(dump)): path.read_bytes()
        for path in dump.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != "ready.json"
    }


def _largest(dump: Path) -> Path:
    return max((dump / "criu").iterdir(), key=lambda path: path.stat().st_size)


def _changes_a_byte(dump: Path, _: Path) -> None:
    path = _largest(dump)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaces_a_file(dump: Path, _: Path) -> None:
    path = _largest(dump)
    before, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _makes_a_file_a_link(dump: Path, place: Path) -> None:
    path = _largest(dump)
    path.rename(place / "stolen")
    path.symlink_to(place / "stolen")


def _makes_a_directory_a_link(dump: Path, place: Path) -> None:
    (dump / "criu").rename(place / "stolen-criu")
    (dump / "criu").symlink_to(place / "stolen-criu")


def _makes_the_dump_a_link(dump: Path, place: Path) -> None:
    dump.rename(place / "stolen")
    dump.symlink_to(place / "stolen")


def _makes_the_dump_a_file(dump: Path, place: Path) -> None:
    dump.rename(place / "stolen")
    dump.write_bytes(b"")


def _opens_the_dump_to_all(dump: Path, _: Path) -> None:
    dump.chmod(0o755)


def _gives_the_dump_away(dump: Path, _: Path) -> None:
    os.chown(dump, 65534, 65534)


def _gives_a_file_away(dump: Path, _: Path) -> None:
    os.chown(_largest(dump), 65534, 65534)


def _adds_a_file(dump: Path, _: Path) -> None:
    (dump / "criu/netns-1.img").write_bytes(b"evil")


def _removes_a_file(dump: Path, _: Path) -> None:
    _largest(dump).unlink()


def _copies_all_of_it(dump: Path, place: Path) -> None:
    shutil.copytree(dump, place / "copy", symlinks=True)
    shutil.rmtree(dump)
    (place / "copy").rename(dump)
    dump.chmod(0o700)


def _spoils_the_seal(dump: Path, _: Path) -> None:
    (dump / "ready.json").write_bytes(b"[" * 100_000)


TAMPERING = [
    _changes_a_byte,
    _replaces_a_file,
    _makes_a_file_a_link,
    _makes_a_directory_a_link,
    _makes_the_dump_a_link,
    _makes_the_dump_a_file,
    _opens_the_dump_to_all,
    _gives_the_dump_away,
    _gives_a_file_away,
    _adds_a_file,
    _removes_a_file,
    _copies_all_of_it,
    _spoils_the_seal,
]


@pytest.mark.criu
@pytest.mark.parametrize("tamper", TAMPERING, ids=lambda tamper: tamper.__name__.strip("_"))
def test_a_ready_dump_that_was_touched_is_unpacked_anew(
    scene: Scene, ready: Path, tamper: Callable[[Path, Path], None]
) -> None:
    before = contents(ready)
    place = scene.directory / "elsewhere"
    place.mkdir()
    tamper(ready, place)
    assert unpacked_again(scene, ready)
    assert contents(ready) == before
    if (place / "stolen").is_dir():
        assert (place / "stolen/criu").exists(), "where a link leads, nothing is removed"
    assert not unpacked_again(scene, ready)


@pytest.mark.criu
def test_a_link_among_the_dumps_hinders_nobody(scene: Scene, ready: Path) -> None:
    place = scene.directory / "elsewhere"
    place.mkdir()
    (place / "precious").write_text("")
    (ready.parent / ("0" * 64)).symlink_to(place)
    (ready.parent / ("1" * 64)).write_bytes(b"")
    assert not unpacked_again(scene, ready)
    assert (place / "precious").exists()
    assert not os.path.lexists(ready.parent / ("0" * 64))


@pytest.mark.criu
def test_a_byte_that_was_changed_in_a_ready_dump_is_not_restored(
    scene: Scene, ready: Path, restore: Callable[..., Replica]
) -> None:
    _changes_a_byte(ready, scene.directory)
    replica = restore(scene.image, free_port(), *scene.flags, of=scene.rekindle)
    assert "unpack" in {phase["name"] for phase in replica.report["phases"]}
    assert replica.report["trust"]["verified"] is True
    assert replica.ask("/health")
    replica.kill()
    replica = restore(scene.image, free_port(), *scene.flags, "--paranoid", of=scene.rekindle)
    assert "unpack" in {phase["name"] for phase in replica.report["phases"]}
    replica.kill()
    replica = restore(scene.image, free_port(), *scene.flags, of=scene.rekindle)
    assert "unpack" not in {phase["name"] for phase in replica.report["phases"]}


# Signatures go where their image goes.


@pytest.mark.criu
def test_signatures_go_with_copies_and_outlive_garbage_collection(
    prey: Prey, scene: Scene, tmp_path: Path
) -> None:
    mine, key = scene.rekindle, ["--verify-key", f"{prey.ours}.pub"]
    other = f"{scene.registry.host}/else/where:2"
    assert mine("copy", scene.image, other).status == 0
    assert mine("verify", other, *key).status == 0
    assert mine("pull", other, "mine").status == 0
    assert mine("copy", "mine", f"oci:{tmp_path}/layout:1").status == 0
    assert mine("verify", f"oci:{tmp_path}/layout:1", *key).status == 0
    store = Layout(mine.home / "store")
    store.collect_garbage()
    assert mine("verify", "mine", *key).status == 0
    cache = prey.parts["manifest"][1]
    assert store.referrers(Digest.parse(prey.index))
    assert store.referrers(Digest.parse(cache)), "the cache is used alone, too"

    # With the image go its signatures.
    document = json.loads((store.root / "index.json").read_text())
    untagged = [e for e in document["manifests"] if "mine:latest" not in e.get("annotations", {}).values()]
    (store.root / "index.json").write_text(json.dumps({**document, "manifests": untagged}))
    store.collect_garbage()
    assert not json.loads((store.root / "index.json").read_text())["manifests"]
    assert not list((store.root / "blobs/sha256").iterdir())


# cosign.


def cosign(program: Path, *words: str | Path, home: Path) -> Done:
    environment = {**os.environ, "COSIGN_PASSWORD": "", "HOME": str(home), "SIGSTORE_NO_CACHE": "1"}
    done = subprocess.run(
        [str(program), *map(str, words)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True, slots=True)
class Market:
    """A real registry with an image that nobody has signed yet, and another; and keys."""

    rekindle: Rekindle
    repository: str
    image: str
    other: str
    ours: Path
    stranger: Path


@pytest.fixture
def market(rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path) -> Market:
    rekindle.env["COSIGN_PASSWORD"] = ""
    for name in ("ours", "stranger"):
        assert rekindle("generate-key-pair", "--output-key-prefix", str(tmp_path / name)).status == 0
    repository = f"{docker_registry.host}/team/kernels"
    digests = []
    for number in range(2):
        where = tmp_path / f"kernels-{number}"
        triton(where)
        (next(where.rglob("*.cubin"))).write_bytes(bytes([number]))
        assert rekindle("pack-cache", f"k{number}", "--dir", str(where)).status == 0
        done = rekindle("push", f"k{number}", f"{repository}:{number}", "--json")
        assert done.status == 0, done.stderr
        digests.append(done.json["image"]["digest"])
    image, other = (f"{repository}@{digest}" for digest in digests)
    return Market(rekindle, repository, image, other, tmp_path / "ours", tmp_path / "stranger")


@pytest.mark.registry
@pytest.mark.parametrize("program", [COSIGN, COSIGN_2], ids=["cosign-3", "cosign-2"])
def test_what_we_sign_cosign_verifies(market: Market, program: Path, tmp_path: Path) -> None:
    legacy = ["--legacy-tag"] if program == COSIGN_2 else []
    done = market.rekindle("sign", market.image, "--sign-key", f"{market.ours}.key", *legacy)
    assert done.status == 0, done.stderr

    def verify(image: str, key: Path) -> Done:
        return cosign(program, "verify", "--key", f"{key}.pub", *LOCALLY, image, home=tmp_path)

    done = verify(market.image, market.ours)
    assert done.status == 0, done.stderr
    assert market.image.partition("@")[2] in done.stdout
    assert verify(market.image, market.stranger).status != 0
    assert verify(market.other, market.ours).status != 0


@pytest.mark.registry
@pytest.mark.parametrize("program", [COSIGN, COSIGN_2], ids=["cosign-3", "cosign-2"])
def test_what_cosign_signs_we_verify(market: Market, program: Path, tmp_path: Path) -> None:
    words = ["sign", "--key", f"{market.ours}.key", "--tlog-upload=false", "-y", *INSECURE]
    if program == COSIGN:
        words.append("--use-signing-config=false")
    done = cosign(program, *words, market.image, home=tmp_path)
    assert done.status == 0, done.stderr
    key, stranger = ["--verify-key", f"{market.ours}.pub"], ["--verify-key", f"{market.stranger}.pub"]
    done = market.rekindle("verify", market.image, *key)
    assert done.status == 0, done.stderr
    assert market.rekindle("verify", market.image, *stranger).status == TRUST
    assert market.rekindle("verify", market.other, *key).status == TRUST
    done = market.rekindle("extract", market.image, "--to", str(tmp_path / "out"), *stranger)
    assert (done.status, (tmp_path / "out").exists()) == (TRUST, False)
    assert market.rekindle("extract", market.image, "--to", str(tmp_path / "out"), *key).status == 0


@pytest.mark.registry
def test_other_kinds_of_keys_are_cosign_s_too(market: Market, tmp_path: Path) -> None:
    """cosign 3.1 does not verify what it signs itself with P-384 and Ed25519; we do."""
    for algorithm in ("p-384", "rsa-2048", "ed25519"):
        ours, theirs = tmp_path / f"{algorithm}-ours", tmp_path / f"{algorithm}-theirs"
        for key in (ours, theirs):
            words = ["generate-key-pair", "--algorithm", algorithm, "--output-key-prefix", str(key)]
            assert market.rekindle(*words).status == 0
        done = market.rekindle("sign", market.image, "--sign-key", f"{ours}.key", "--legacy-tag")
        assert done.status == 0, done.stderr
        words = ["sign", "--key", f"{theirs}.key", "--tlog-upload=false", "-y", *INSECURE]
        done = cosign(COSIGN, *words, "--use-signing-config=false", market.image, home=tmp_path)
        assert done.status == 0, done.stderr
        for key in (ours, theirs):
            done = market.rekindle("verify", market.image, "--verify-key", f"{key}.pub", "--allow-rollback")
            assert done.status == 0, done.stderr
        for program in (COSIGN, COSIGN_2):
            words = ["verify", "--key", f"{ours}.pub", *LOCALLY, market.image]
            done = cosign(program, *words, home=tmp_path)
            assert done.status == 0, done.stderr


@pytest.mark.registry
def test_certificates_of_one_s_own_authority_are_cosign_s_too(market: Market, tmp_path: Path) -> None:
    """The options for cosign are what KServe's mode `cert` demands; it signs as cosign 2 does."""
    root = OwnAuthority.make()
    middle = OwnAuthority.make("middle", root)
    (tmp_path / "ca.pem").write_bytes(root.pem)
    (tmp_path / "chain.pem").write_bytes(middle.pem + root.pem)
    for name in ("ours", "stranger"):
        public = PublicKey.read(tmp_path / f"{name}.pub").key
        (tmp_path / f"{name}.crt").write_bytes(middle.issue(public, NAME))
    ours = ["--certificate", f"{tmp_path}/ours.crt", "--certificate-chain", f"{tmp_path}/chain.pem"]
    done = market.rekindle("sign", market.image, "--sign-key", f"{market.ours}.key", *ours)
    assert done.status == 0, done.stderr
    accept = ["--certificate-identity-regexp", "^(?:spiffe://kserve/.*)$", "--ca-roots", f"{tmp_path}/ca.pem"]
    words = ["verify", *accept, "--certificate-oidc-issuer-regexp", ".*", "--insecure-ignore-sct", *LOCALLY]
    done = cosign(COSIGN_2, *words, market.image, home=tmp_path)
    assert done.status == 0, done.stderr
    assert cosign(COSIGN_2, *words, market.other, home=tmp_path).status != 0
    assert market.rekindle("verify", market.image, *accept).status == 0
    assert market.rekindle("verify", market.other, *accept).status == TRUST

    words = ["sign", "--key", f"{market.stranger}.key", "--tlog-upload=false", "-y", *INSECURE]
    theirs = ["--certificate", f"{tmp_path}/stranger.crt", "--certificate-chain", f"{tmp_path}/chain.pem"]
    done = cosign(COSIGN_2, *words, *theirs, market.other, home=tmp_path)
    assert done.status == 0, done.stderr
    done = market.rekindle("verify", market.other, *accept)
    assert done.status == 0, done.stderr
    assert f"signed by {NAME}" in done.stdout
    other = ["--certificate-identity", "spiffe://other", "--ca-roots", f"{tmp_path}/ca.pem"]
    assert market.rekindle("verify", market.other, *other).status == TRUST


@pytest.mark.registry
def test_older_signatures_of_several_are_kept_and_copied(market: Market, tmp_path: Path) -> None:
    words = ["sign", "--key", f"{market.stranger}.key", "--tlog-upload=false", "-y", *INSECURE]
    done = cosign(COSIGN_2, *words, market.image, home=tmp_path)
    assert done.status == 0, done.stderr
    done = market.rekindle("sign", market.image, "--sign-key", f"{market.ours}.key", "--legacy-tag")
    assert done.status == 0, done.stderr
    repository, digest = market.image.split("@")
    mirrored = f"{repository}-mirror"
    done = market.rekindle("copy", market.image, f"{mirrored}:1", "--json")
    assert done.status == 0, done.stderr
    assert all(each["copied"] for each in done.json["attachments"])
    for image in (market.image, f"{mirrored}@{digest}"):
        for key in (market.ours, market.stranger):
            done = cosign(COSIGN_2, "verify", "--key", f"{key}.pub", *LOCALLY, image, home=tmp_path)
            assert done.status == 0, done.stderr
    assert market.rekindle("pull", market.image, "older").status == 0
    for key in (market.ours, market.stranger):
        words = ["verify", "older", "--verify-key", f"{key}.pub", "--allow-rollback"]
        assert market.rekindle(*words).status == 0


@pytest.mark.registry
def test_signers_at_the_same_time_lose_no_signature(market: Market) -> None:
    words = ["sign", market.image, "--sign-key"]
    signers = [
        market.rekindle.spawn(*words, f"{key}.key", log=market.ours.with_suffix(f".{number}"))
        for number, key in enumerate((market.ours, market.stranger))
    ]
    assert [signer.wait(60) for signer in signers] == [0, 0]
    for key in (market.ours, market.stranger):
        assert market.rekindle("verify", market.image, "--verify-key", f"{key}.pub").status == 0


@pytest.mark.registry
def test_a_key_pair_of_cosign_s_signs_for_us(market: Market, tmp_path: Path) -> None:
    done = cosign(COSIGN, "generate-key-pair", "--output-key-prefix", f"{tmp_path}/theirs", home=tmp_path)
    assert done.status == 0, done.stderr
    done = market.rekindle("sign", market.image, "--sign-key", f"{tmp_path}/theirs.key")
    assert done.status == 0, done.stderr
    assert market.rekindle("verify", market.image, "--verify-key", f"{tmp_path}/theirs.pub").status == 0
    done = market.rekindle(
        "sign", market.image, "--sign-key", f"{tmp_path}/theirs.key", env={"COSIGN_PASSWORD": "no"}
    )
    assert done.status == 2


POLICY = """
predicateType: "https://rekindle.dev/attestations/snapshot/v1"
predicate: node: architecture: "ARCHITECTURE"
predicate: criu: =~"^[0-9]+\\\\.[0-9]+"
"""


@pytest.mark.registry
@pytest.mark.criu
@pytest.mark.parametrize("program", [COSIGN, COSIGN_2], ids=["cosign-3", "cosign-2"])
def test_cosign_reads_our_attestation(
    prey: Prey, local: Rekindle, docker_registry: DockerRegistry, tmp_path: Path, program: Path
) -> None:
    repository = f"{docker_registry.host}/{REPOSITORY}"
    image = f"{repository}@{prey.index}"
    assert local("push", "horse", f"{repository}:1").status == 0
    if program == COSIGN_2:
        done = local("sign", image, "--sign-key", f"{prey.ours}.key", "--legacy-tag")
        assert done.status == 0, done.stderr
    (tmp_path / "good.cue").write_text(POLICY.replace("ARCHITECTURE", os.uname().machine))
    (tmp_path / "bad.cue").write_text(POLICY.replace("ARCHITECTURE", "another"))

    def verify(kind: str, key: Path, *more: str) -> Done:
        words = ["verify-attestation", "--type", kind, "--key", f"{key}.pub", *LOCALLY, *more]
        return cosign(program, *words, image, home=tmp_path)

    done = verify(SNAPSHOT, prey.ours, "--policy", f"{tmp_path}/good.cue")
    assert done.status == 0, done.stderr
    from base64 import b64decode

    statement = json.loads(b64decode(json.loads(done.stdout.splitlines()[0])["payload"]))
    assert statement["subject"][0]["digest"]["sha256"] == prey.index.partition(":")[2]
    assert statement["predicate"]["made_by"].startswith("rekindle")
    assert statement["predicate"].keys() >= {"node", "engine", "command", "weights"}
    assert verify(SNAPSHOT, prey.ours, "--policy", f"{tmp_path}/bad.cue").status != 0
    assert verify("https://slsa.dev/provenance/v1", prey.ours).status != 0
    assert verify(SNAPSHOT, prey.stranger).status != 0
