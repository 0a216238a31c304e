# SPDX-License-Identifier: Apache-2.0
"""What deploy/ holds is what Kubernetes takes, and its command lines are ours.

tests/integration/test_deploy.py runs it.
"""

import argparse
import copy
import importlib
import re
import runpy
import shlex
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rekindle.__main__ import VERBS
from tests.conftest import KUBERNETES_TOOLS, ROOT, need
from tests.unit.test_imports import PACKAGES

CHART = ROOT / "deploy" / "helm" / "rekindle"
BASE = ROOT / "deploy" / "kustomize" / "base"
VERSIONS = ("1.30", "1.33", kubernetes_validate.latest_version())
RESTORES = ["SYS_ADMIN", "NET_ADMIN", "SYS_TIME", "SYS_CHROOT", "SETPCAP"]


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    need((KUBERNETES_TOOLS / "helm").exists(), "helm and kubectl", "run hack/get-kubernetes-tools")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text) if each}


def rendered(*values: str, release: str = "chat") -> dict[tuple[str, str], Any]:
    flags = [word for value in values for word in ("--set", value)]
    return documents(run(KUBERNETES_TOOLS / "helm", "template", release, CHART, *flags))


def base() -> dict[tuple[str, str], Any]:
    return documents((BASE / "rekindle.yaml").read_text())


def pods(found: dict[tuple[str, str], Any]) -> Iterator[tuple[str, Any]]:
    for (kind, name), document in found.items():
        if kind in {"Deployment", "Job", "DaemonSet"}:
            yield f"{kind}/{name}", document["spec"]["template"]["spec"]


def containers(found: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """Return every container by what it is in."""
    return {
        f"{where}/{container['name']}": container
        for where, pod in pods(found)
        for container in (*pod.get("initContainers", []), *pod["containers"])
    }


VALUES: dict[str, Sequence[str]] = {
    "as it is": [],
    "with GPUs": [
        "server.resources.limits.nvidia\\.com/gpu=1",
        "server.runtimeClassName=nvidia",
        "node.runtimeClassName=nvidia",
        "node.environment.NVIDIA_VISIBLE_DEVICES=all",
        "node.nodeSelector.gpu=h100",
        "server.tolerations[0].key=nvidia.com/gpu",
        "server.tolerations[0].operator=Exists",
        "imagePullSecrets[0].name=registry",
    ],
    "the server alone": ["job.enabled=false", "node.enabled=false", "fallback.replicas=2"],
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VALUES)
def test_the_chart_is_valid(name: str, version: str) -> None:
    found = rendered(*VALUES[name])
    assert len(found) >= 4
    for document in found.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_what_is_wrong_is_not_valid() -> None:
    document = copy.deepcopy(base()["Deployment", "chat"])
    document["spec"]["template"]["spec"]["containers"][0]["commands"] = ["rekindle"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_helm_finds_nothing_to_complain_of() -> None:
    assert "0 chart(s) failed" in run(KUBERNETES_TOOLS / "helm", "lint", "--strict", CHART)


def test_the_base_is_what_the_chart_makes() -> None:
    need((KUBERNETES_TOOLS / "helm").exists(), "helm and kubectl", "run hack/get-kubernetes-tools")
    done = subprocess.run(
        [ROOT / "hack/render-kustomize", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_kustomize_puts_the_base_anywhere(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "base").symlink_to(BASE)
    kustomization = {
        "resources": ["base"],
        "namespace": "models",
        "namePrefix": "blue-",
        "images": [
            {"name": "registry.example.com/vllm-rekindle", "newName": "r.example.org/v", "newTag": "7"}
        ],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    restricted = ["--load-restrictor", "LoadRestrictionsNone"]
    found = documents(run(KUBERNETES_TOOLS / "kubectl", "kustomize", *restricted, overlay))
    for document in found.values():
        kubernetes_validate.validate(document, "1.33", strict=True)
    assert {each["image"] for each in containers(found).values()} == {"r.example.org/v:7"}
    (subject,) = found["ClusterRoleBinding", "blue-chat-node"]["subjects"]
    assert (subject["name"], subject["namespace"]) == ("blue-chat-node", "models")
    for _, pod in pods(found):
        for volume in pod["volumes"]:
            named = volume.get("configMap", {}).get("name", "")
            assert named in {"", "rekindle-keys", "blue-chat-node"}


class ParsedError(Exception):
    """The words of a command are right."""


def parse(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Parse a command line by the parser of its command, and go no further."""
    program, verb, *rest = words
    assert program == "rekindle"
    assert verb in VERBS
    found: list[argparse.Namespace] = []
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def stop(self: Any, given: Any = None, original: Any = original) -> None:
                found.append(original(self, given))
                raise ParsedError

            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(ParsedError):
            importlib.import_module(f"cli.{verb.replace('-', '_')}").main(rest)
    return found[0]


def command_lines(container: Any) -> Iterator[list[str]]:
    """Return the command lines of rekindle that a container runs."""
    words = [*container["command"], *container.get("args", [])]
    match words:
        case ["rekindle", *_]:
            yield words
        case ["sh", "-c", script, "sh", *rest]:
            for part in script.replace("||", "\n").replace("&&", "\n").splitlines():
                told = part.partition(">")[0].split()
                if told[:1] == ["rekindle"]:
                    at = told.index('"$@"')
                    yield [*told[:at], *rest, *told[at + 1 :]]
        case ["python3", _, *options]:
            script = runpy.run_path(str(CHART / "files" / "pull_ahead.py"))
            image = options[options.index("--") + 1 :]
            yield script["match_words"](image)
            yield script["pull_words"](image)


def test_every_command_line_is_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (where, parse(words, monkeypatch))
        for where, container in containers(base()).items()
        for words in command_lines(container)
    ]
    assert sorted(where.partition("/")[0] + "/" + where.rpartition("/")[2] for where, _ in found) == [
        *("DaemonSet/metrics", "DaemonSet/pull-ahead", "DaemonSet/pull-ahead"),
        *("Deployment/extract", "Deployment/server", "Job/snapshot"),
    ]
    image = "registry.example.com/snapshots/chat:1"
    for where, args in found:
        if "metrics" not in where:
            assert image in {getattr(args, "image", None), getattr(args, "source", None)}, where
        if "verify_key" in args:
            assert args.verify_key == [Path("/etc/rekindle/keys/cosign.pub")], where


@pytest.mark.parametrize("words", [["restore", "x", "--no-such"], ["extract"], ["match", "x", "y"]])
def test_a_command_line_that_is_wrong_is_seen(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse(["rekindle", *words], monkeypatch)


def test_the_server_that_is_saved_is_the_one_that_is_restored() -> None:
    found = containers(base())
    server = found["Deployment/chat/server"]["args"]
    saved = found["Job/chat-snapshot/snapshot"]["args"]
    fallback = found["Deployment/chat-fallback/server"]["args"]
    command = server[server.index("--") + 1 :]
    assert command == saved[saved.index("--") + 1 :] == fallback
    assert command[:2] == ["vllm", "serve"]
    for name in ("Deployment/chat/server", "Job/chat-snapshot/snapshot", "DaemonSet/chat-node/pull-ahead"):
        assert found[name]["envFrom"] == [{"configMapRef": {"name": "chat-environment"}}], name


def test_privileges_are_the_least_that_work() -> None:
    """tests/integration/test_deploy.py runs containers that have just these."""
    for where, container in containers(base()).items():
        has = container["securityContext"]
        assert has["capabilities"]["drop"] == ["ALL"], where
        assert has["readOnlyRootFilesystem"] is True, where
        assert not has.get("privileged"), where
        restores = where in {
            *("Deployment/chat/server", "Job/chat-snapshot/snapshot", "DaemonSet/chat-node/pull-ahead"),
        }
        assert has["capabilities"].get("add", []) == (RESTORES if restores else []), where
        filtered = "Unconfined" if where.startswith("Job/") else "RuntimeDefault"
        assert has["seccompProfile"]["type"] == filtered, where
        if not restores:
            assert has["allowPrivilegeEscalation"] is False, where
    for where in ("Deployment/chat-fallback/extract", "Deployment/chat-fallback/server"):
        assert containers(base())[where]["securityContext"]["runAsNonRoot"] is True
    for where, pod in pods(base()):
        assert pod["automountServiceAccountToken"] is False, where
        assert not [name for name in ("hostPID", "hostNetwork", "hostIPC") if pod.get(name)], where


def test_mounts_have_volumes_and_services_have_pods() -> None:
    found = base()
    for where, pod in pods(found):
        names = {volume["name"] for volume in pod["volumes"]}
        used = {
            mount["name"]
            for container in (*pod.get("initContainers", []), *pod["containers"])
            for mount in container["volumeMounts"]
        }
        assert used == names, where
    selector = found["Service", "chat"]["spec"]["selector"]
    for name in ("chat", "chat-fallback"):
        template = found["Deployment", name]["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= template.items()
        matched = found["Deployment", name]["spec"]["selector"]["matchLabels"]
        assert matched.items() <= template.items()
    job = found["Job", "chat-snapshot"]["spec"]["template"]["metadata"]["labels"]
    assert not selector.items() <= job.items(), "it serves nobody"


def test_what_is_written_to_home_can_be_written() -> None:
    for where, container in containers(base()).items():
        home = next((each["value"] for each in container["env"] if each["name"] == "HOME"), "")
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert home in writable, where


def test_a_hook_makes_the_snapshot_after_a_rollout() -> None:
    job = rendered()["Job", "chat-snapshot"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"


def test_the_quickstart_in_containers_has_the_same_privileges() -> None:
    text = (ROOT / "hack" / "container-quickstart").read_text()
    assert f'--cap-drop ALL --cap-add "{",".join(RESTORES)}"' in text


def test_the_containerfile_copies_every_package() -> None:
    text = (ROOT / "deploy" / "container" / "Containerfile").read_text()
    copied = re.findall(r"^COPY (\w+) /build/\1$", text, re.MULTILINE)
    assert sorted(copied) == sorted(PACKAGES)


PAGE = (ROOT / "docs" / "kubernetes.md").read_text()


def test_the_overlay_of_the_page_can_be_built(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    kustomization = yaml.safe_load(textwrap.dedent(block))
    assert kustomization["resources"] == ["github.com/…/deploy/kustomize/base"]
    kustomization["resources"] = ["base"]
    (tmp_path / "base").symlink_to(BASE)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    restricted = ["--load-restrictor", "LoadRestrictionsNone"]
    found = documents(run(KUBERNETES_TOOLS / "kubectl", "kustomize", *restricted, tmp_path))
    assert found["Deployment", "chat"]["spec"]["replicas"] == 4


def test_the_commands_of_the_page_are_right(tmp_path: Path) -> None:
    """They make what the manifests name."""
    (tmp_path / "cosign.pub").write_text("public")
    (tmp_path / "cosign.key").write_text("private")
    lines = [line.strip() for line in PAGE.splitlines()]
    made = set()
    for line in lines:
        words = (
            shlex.split(line.replace("…", "x")) if line.startswith(("kubectl create", "helm install")) else []
        )
        if words[:2] == ["kubectl", "create"]:
            dry = ["--dry-run=client", "--output=yaml"]
            text = run(KUBERNETES_TOOLS / "kubectl", *words[1:], *dry, cwd=tmp_path)
            (document,) = yaml.safe_load_all(text)
            kubernetes_validate.validate(document, "1.33", strict=True)
            made.add((document["kind"], document["metadata"]["name"], *sorted(document["data"])))
        elif words:
            found = documents(run(KUBERNETES_TOOLS / "helm", "template", *words[2:], cwd=ROOT))
            server = containers(found)["Deployment/chat/server"]
            assert server["args"][0] == "registry.example.com/snapshots/chat:1"
    assert made == {
        ("ConfigMap", "rekindle-keys", "cosign.pub"),
        ("Secret", "rekindle-signing", "cosign.key", "password"),
        ("Secret", "rekindle-registry", ".dockerconfigjson"),
    }
