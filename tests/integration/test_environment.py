# SPDX-License-Identifier: Apache-2.0
"""A restored server has the environment of today, or its process is not restored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Rekindle, free_port, wait_for, workhorse
from tests.integration.scenes import Running, Saved, Scene, save, scene

pytestmark = pytest.mark.criu

KEY = "Zq8-vixen-41-Lark"
SET_AT_THE_SNAPSHOT = {
    "OMP_NUM_THREADS": "3",
    "TORCHINDUCTOR_FREEZING": "1",
    "HTTP_PROXY": "http://proxy.example:80",
    "TZ": "Europe/Kyiv",
    "POD_IP": "10.1.2.3",
    "MOOD": "calm",
}
"""By whoever made the snapshot, and no secret."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SET_AT_THE_SNAPSHOT.items():
            patch.setenv(name, value)
        patch.setenv("LD_PRELOAD", "libm.so.6")
        return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    """The environment of the snapshot, unless a test changes it."""
    with scene(saved, tmp_path) as made:
        made.rekindle.env |= {**SET_AT_THE_SNAPSHOT, "LD_PRELOAD": "libm.so.6"}
        made.rekindle.env["TRITON_CACHE_DIR"] = str(saved.kernels)
        yield made


def of_variables(running: Running) -> list[tuple[str, str, bool]]:
    return [
        (reason["code"], reason["field"], reason["hard"])
        for reason in running.report["reasons"]
        if "environment" in reason["code"] and reason["rung"] == "process"
    ]


def matched(scene: Scene, *flags: str) -> list[tuple[str, str, bool]]:
    done = scene.rekindle("match", scene.saved.image, "--json", *scene.saved.key.verify, *flags)
    steps = done.json["steps"]
    assert steps[0]["rung"] == "process"
    return [
        (reason["code"], reason["field"], reason["hard"])
        for reason in steps[0]["reasons"]
        if "environment" in reason["code"]
    ]


def unset(scene: Scene, *names: str) -> None:
    scene.rekindle.prefix = ["env", *(word for name in names for word in ("-u", name))]


def test_the_environment_of_the_snapshot_restores_the_process(scene: Scene) -> None:
    running = scene.restore()
    running.until_ready("restored")
    assert of_variables(running) == matched(scene) == []


HARD = {
    "a key that the snapshot did not have": ("environment-secret", {"VLLM_API_KEY": KEY}),
    "a password by its last word": ("environment-secret", {"STABLE_PASS": KEY}),
    "a token by its form": ("environment-secret", {"HALTER": "glpat-" + "q3W5eR7tY9uI1oP2aS4d"}),
    "a URL with a password": ("environment-secret", {"STABLE_URL": f"postgres://me:{KEY}@db/x"}),
    "another number of threads": ("environment", {"OMP_NUM_THREADS": "4"}),
    "a library's variable that was not set": ("environment", {"HF_ENDPOINT": "https://mirror.example"}),
    "another value of one that chooses kernels": ("environment", {"TORCHINDUCTOR_FREEZING": "0"}),
    "an empty value instead of none": ("environment", {"CUDA_DEVICE_ORDER": ""}),
}


@pytest.mark.parametrize(("code", "today"), HARD.values(), ids=HARD)
def test_a_variable_of_today_that_the_server_would_read_forbids_the_process(
    scene: Scene, code: str, today: dict[str, str]
) -> None:
    scene.rekindle.env |= today
    running = scene.restore()
    running.until_ready("cache")
    (name,) = today
    assert of_variables(running) == matched(scene) == [(code, name, True)]
    assert json.loads(running.ask("/facts"))["environment"][name] == today[name]
    if code == "environment-secret":
        assert today[name] not in running.said + running.path.read_text()
    running.end()
    scene.nothing_is_left(kept=True)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "TORCHINDUCTOR_FREEZING"])
def test_a_variable_that_is_not_set_any_more_forbids_the_process(scene: Scene, name: str) -> None:
    unset(scene, name)
    running = scene.restore()
    running.until_ready("cache")
    assert of_variables(running) == matched(scene) == [("environment", name, True)]


def test_any_other_variable_is_told(scene: Scene) -> None:
    scene.rekindle.env |= {"MOOD": "wild", "TZ": "UTC", "STALL": "7"}
    running = scene.restore()
    running.until_ready("restored")
    told = [("environment-other", name, False) for name in ("MOOD", "STALL", "TZ")]
    assert of_variables(running) == matched(scene) == told
    assert "wild" not in running.path.read_text()


def test_what_a_platform_sets_for_every_start_is_no_difference(scene: Scene) -> None:
    scene.rekindle.env |= {"POD_IP": "10.9.9.9", "POD_NAME": "horse-7", "HOSTNAME": "horse-7"}
    scene.rekindle.env |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HORSE_SERVICE_HOST": "10.0.0.7"}
    scene.rekindle.env |= {"HORSE_SERVICE_PORT": "80", "HORSE_PORT": "tcp://10.0.0.7:80"}
    scene.rekindle.env |= {"HORSE_PORT_80_TCP_ADDR": "10.0.0.7", "VLLM_PORT_80_TCP": "tcp://10.0.0.7:80"}
    scene.rekindle.env |= {"TERM": "dumb", "SHLVL": "9", "JOURNAL_STREAM": "8:1", "INVOCATION_ID": "ab12"}
    scene.rekindle.env |= {"COSIGN_PASSWORD": "x", "SSH_CLIENT": "y", "NVIDIA_VISIBLE_DEVICES": "GPU-1"}
    running = scene.restore()
    running.until_ready("restored")
    assert of_variables(running) == matched(scene) == []


@pytest.mark.parametrize("by", ["option", "pattern", "policy", "rule"])
def test_a_difference_can_be_accepted(scene: Scene, tmp_path: Path, by: str) -> None:
    scene.rekindle.env |= {"VLLM_API_KEY": KEY, "HF_ENDPOINT": "https://mirror.example"}
    flags = {
        "option": ["--accept-environment", "VLLM_API_KEY", "--accept-environment", "HF_ENDPOINT"],
        "pattern": ["--accept-environment", "*_[AE]*"],
    }.get(by, [])
    if by in {"policy", "rule"}:
        line = {"policy": 'environment = ["VLLM_*", "HF_ENDPOINT"]', "rule": 'soft = ["environment"]'}[by]
        more = '\nhard = ["environment-other"]' if by == "policy" else ""
        (scene.rekindle.home / "policy.toml").write_text(f"[match]\n{line}{more}\n")
    running = scene.restore(*flags)
    key = ("environment-secret", "VLLM_API_KEY", by == "rule")
    running.until_ready("cache" if by == "rule" else "restored")
    assert of_variables(running) == matched(scene, *flags) == [("environment", "HF_ENDPOINT", False), key]
    reasons = [each for each in running.report["reasons"] if each["code"].startswith("environment")]
    assert all(reason["by_policy"] != reason["hard"] for reason in reasons)


# Lower rungs


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_a_lower_rung_gets_the_environment_of_today(scene: Scene, rung: str) -> None:
    names = [*SET_AT_THE_SNAPSHOT, "LD_PRELOAD"]
    unset(scene, *names)
    keys = {"COSIGN_PASSWORD": "", "SIGSTORE_ID_TOKEN": "eyJ.today"}
    scene.rekindle.env |= {"TODAY": "yes", **keys}
    running = scene.restore("--rung", rung)
    running.until_ready(rung)
    got = json.loads(running.ask("/facts"))["environment"]
    replayed = {"TORCHINDUCTOR_FREEZING": "1"} if rung == "cache" else {}
    assert {name: got[name] for name in names if name in got} == replayed
    assert got["TODAY"] == "yes"
    assert not keys.keys() & got.keys(), "they give access to signing keys"
    told = [
        (reason["field"], reason["recorded"], reason["here"])
        for reason in running.report["reasons"]
        if reason["code"] == "cache-replayed"
    ]
    assert told == [(name, value, "not set") for name, value in replayed.items()]


# Secrets that the image may hold


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rekindle, int]:
    """A snapshot of a server that has secrets, which are allowed."""
    place, port = tmp_path_factory.mktemp("keyed"), free_port()
    rekindle = Rekindle(place / "home", {"TMPDIR": str(place), "STABLE_API_KEY": KEY})
    flags = ["--allow-secret", "STABLE_API_KEY", "--allow-secret", "stall-key", "--no-prove"]
    done = rekindle.snapshot_workhorse("horse", port, "--stall-key", f"{KEY}2", flags=flags)
    assert done.status == 0, done.stderr
    return rekindle, port


def restored(keyed: tuple[Rekindle, int], path: Path, *flags: str, key: str = f"{KEY}2", **env: str) -> Any:
    """The report of a restore that must restore the process, and its status."""
    rekindle, port = keyed
    command = workhorse(port, "--stall-key", key)
    words = ["restore", "horse", "--report", str(path), "--require", "process", *flags]
    process = rekindle.spawn(*words, "--", *command, log=path.with_suffix(".log"), env=env)
    try:
        wait_for(lambda: path.exists() or process.poll() is not None, 60)
        return json.loads(path.read_text())
    finally:
        process.kill()
        process.wait(30)


def test_the_same_secrets_restore_the_process(keyed: tuple[Rekindle, int], tmp_path: Path) -> None:
    report = restored(keyed, tmp_path / "report")
    assert report["outcome"] == "restored"
    codes = [(each["code"], each["field"]) for each in report["reasons"] if each["code"] != "not-proved"]
    assert codes == [("secret-unknown", "STABLE_API_KEY"), ("secret-unknown", "--stall-key")]


@pytest.mark.parametrize(
    ("key", "env", "code", "field"),
    [
        (f"{KEY}2", {"STABLE_API_KEY": "another-Key-9"}, "environment-secret", "STABLE_API_KEY"),
        ("another-Key-9", {}, "command", "--stall-key"),
    ],
    ids=["variable", "option"],
)
def test_another_secret_forbids_the_process(
    keyed: tuple[Rekindle, int], tmp_path: Path, key: str, env: dict[str, str], code: str, field: str
) -> None:
    report = restored(keyed, tmp_path / "report", key=key, **env)
    assert report["outcome"] == "failed"
    assert report["error"]["code"] == "mismatch"
    hard = [(reason["code"], reason["field"]) for reason in report["reasons"] if reason["hard"]]
    assert hard == [(code, field)]
    assert "another-Key-9" not in json.dumps(report)


def test_another_secret_can_be_accepted(keyed: tuple[Rekindle, int], tmp_path: Path) -> None:
    flags = ["--accept-environment", "STABLE_API_KEY"]
    report = restored(keyed, tmp_path / "report", *flags, STABLE_API_KEY="another-Key-9")
    assert report["outcome"] == "restored"
    assert ("environment-secret", False) in [(each["code"], each["hard"]) for each in report["reasons"]]


# The record

IN_THE_ENVIRONMENT = {
    "DB_PASS": "oats+hay=9",
    "MYSQL_PWD": "oats+hay=8",
    "GITLAB_PAT": "glpat-" + "q3W5eR7tY9uI1oP2aS4d",
    "GPG_PASSPHRASE": "a long sentence of oats",
    "SMTP_PASS": "oats+hay=7",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJzdGFibGUiLCJyb2xlIjoiaG9yc2UifQ.hR8kQ2mX5vB7nC1zL4pT6wY9sD3fG0jA",
    "NOTIFY": "https://hooks.slack.com/services/T012AB3CD/B012AB3CD/" + "aB3dE5fG7hI9jK1lM3nO5pQ7",
    "SSHPASS": "oats+hay=6",
    "NVIDIA": "nvapi-" + "aB3dE5fG7hI9jK1lM3nO5pQ7" * 3,
    # No secret by name or form, but nobody's business.
    "LOGIN_OF_THE_VET": "hunter2",
    "HF_ENDPOINT": "https://mirror.example/of/ours",
}


def test_the_record_holds_no_value_that_a_lower_rung_does_not_need(rekindle: Rekindle, port: int) -> None:
    option = "oats+hay=5"
    rekindle.env |= {**IN_THE_ENVIRONMENT, "TRITON_DEBUG": "1"}
    allowed = [*IN_THE_ENVIRONMENT, "db-pass"]
    flags = ["--no-prove", *(word for name in allowed for word in ("--allow-secret", name))]
    done = rekindle.snapshot_workhorse("horse", port, "--db-pass", option, flags=flags)
    assert done.status == 0, done.stderr
    shown = rekindle("inspect", "horse", "--json").stdout
    for value in (option, *IN_THE_ENVIRONMENT.values()):
        assert value not in shown
        assert value not in (rekindle("inspect", "horse").stdout + done.stdout + done.stderr)
    record = json.loads(shown)["record"]
    assert record["environment"] == {"TRITON_DEBUG": "1"}
    marks = record["variables"]["marks"]
    assert set(IN_THE_ENVIRONMENT) < set(marks)
    secret = set(IN_THE_ENVIRONMENT) - {"LOGIN_OF_THE_VET", "HF_ENDPOINT"}
    assert {name for name in IN_THE_ENVIRONMENT if marks[name] == ""} == secret
    assert (len(marks["LOGIN_OF_THE_VET"]), len(marks["HF_ENDPOINT"])) == (4, 32)


@pytest.mark.parametrize("name", [*IN_THE_ENVIRONMENT][:-2])
def test_each_of_these_refuses_the_snapshot(rekindle: Rekindle, port: int, name: str) -> None:
    rekindle.env[name] = IN_THE_ENVIRONMENT[name]
    done = rekindle.snapshot_workhorse("horse", port, flags=["--no-prove"])
    assert done.status == 36, done.stderr
    assert f"the value of {name}" in done.stderr
    assert IN_THE_ENVIRONMENT[name] not in done.stderr
