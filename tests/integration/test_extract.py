# SPDX-License-Identifier: Apache-2.0
"""`rekindle pack-cache` and `rekindle extract` from outside: words, exit statuses, what is left behind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from oci import image as images
from oci import media_types
from oci.cache import pack
from oci.layout import Layout
from rekindle.engine.caches import CacheKind
from tests.conftest import CRANE, ORAS, ROOT, SKOPEO, VLLM_BIN, KeyPair, Rekindle, bound, small_disk, wait_for
from tests.samples.cache import CREATED, KEY, image_of_mcv, tree, triton, vllm, write
from tests.samples.record import RECORD
from tests.servers.registry.docker_registry import DockerRegistry

KERNEL = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(y + at, tl.load(x + at, mask=mask) + 1, mask=mask)


for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    triton.compile(ASTSource(add, signature, {"BLOCK": 128}), target=target)
"""


def blobs(home: Path) -> set[str]:
    return set(os.listdir(home / "store/blobs/sha256"))


def test_a_cache_goes_in_and_comes_out(rekindle: Rekindle, tmp_path: Path) -> None:
    triton(tmp_path / "t")
    done = rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "t"), "--json")
    assert done.status == 0, done.stderr
    assert (done.json["verb"], done.json["outcome"]) == ("pack-cache", "saved")
    out = tmp_path / "out"
    done = rekindle("extract", "kernels", "--to", str(out))
    assert done.status == 0, done.stderr
    assert done.stdout == f"export TRITON_CACHE_DIR={out}/triton\n"
    assert tree(out / "triton").keys() == tree(tmp_path / "t").keys()
    done = rekindle("extract", "kernels", "--to", str(out), "--json", "--report", str(tmp_path / "report"))
    assert done.json["outcome"] == "cache"
    assert done.json["bytes"] == {"fetched": 0, "written": 0}
    assert json.loads((tmp_path / "report").read_text())["image"] == done.json["image"]


def test_what_extract_makes_can_be_packed_again(
    rekindle: Rekindle, key_pair: KeyPair, tmp_path: Path
) -> None:
    vllm(tmp_path / "caches/vllm")
    triton(tmp_path / "caches/triton")
    image = f"oci:{tmp_path}/images:one"
    assert rekindle("pack-cache", image, "--dir", str(tmp_path / "caches"), *key_pair.sign).status == 0
    spaced = tmp_path / "with a space"
    done = rekindle("extract", image, "--to", str(spaced), *key_pair.verify)
    variables = dict(shlex.split(line)[1].split("=", 1) for line in done.stdout.splitlines())
    assert variables == {
        "TRITON_CACHE_DIR": f"{spaced}/triton",
        "VLLM_CACHE_ROOT": f"{spaced}/vllm",
    }
    assert rekindle("pack-cache", f"oci:{tmp_path}/images:two", "--dir", str(spaced)).status == 0


def test_a_cache_goes_to_where_it_was(rekindle: Rekindle, tmp_path: Path) -> None:
    there = tmp_path / "triton-cache"
    triton(there)
    before = tree(there)
    assert rekindle("pack-cache", "kernels", "--dir", str(there)).status == 0
    shutil.rmtree(there)
    done = rekindle("extract", "kernels", "--kind", "triton")
    assert done.stdout == f"export TRITON_CACHE_DIR={there}\n"
    assert tree(there) == before


def test_a_signer_of_kernels_cannot_write_to_a_home_directory(rekindle: Rekindle, tmp_path: Path) -> None:
    home = tmp_path / "alice"
    triton(home)
    write(home / ".ssh/authorized_keys", "ssh-ed25519 AAAA")
    write(home / ".bashrc", "echo")
    done = rekindle("pack-cache", "kernels", "--dir", str(home))
    assert done.status == 0
    assert ".bashrc has a name by which logins" in done.stderr
    shutil.rmtree(home)
    home.mkdir()
    done = rekindle("extract", "kernels")
    assert (done.status, os.listdir(home)) == (2, []), done.stderr
    assert "--to DIR" in done.stderr
    done = rekindle("extract", "kernels", env={"TRITON_CACHE_DIR": str(home)})
    assert done.status == 0, done.stderr
    assert not [name for name in os.listdir(home) if name.startswith(".")]


def test_the_image_is_what_tar_and_the_image_specification_say(rekindle: Rekindle, tmp_path: Path) -> None:
    triton(tmp_path / "t")
    assert rekindle("pack-cache", f"oci:{tmp_path}/i:latest", "--dir", str(tmp_path / "t")).status == 0
    read = tmp_path / "i/blobs/sha256"
    index = json.loads((tmp_path / "i/index.json").read_text())
    manifest = json.loads((read / index["manifests"][0]["digest"][7:]).read_text())
    with tarfile.open(read / manifest["layers"][0]["digest"][7:], "r:gz") as tar:
        assert f"io.triton.cache/{KEY}/add.cubin" in tar.getnames()
    with open(read / manifest["layers"][0]["digest"][7:]) as layer:
        subprocess.run(["gzip", "--test"], stdin=layer, check=True)


def test_a_secret_is_not_packed(rekindle: Rekindle, tmp_path: Path) -> None:
    vllm(tmp_path / "v", VLLM_API_KEY="hunter2")
    done = rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "v"), "--json")
    assert done.status == 36
    assert done.json["error"]["code"] == "secret"
    assert "VLLM_API_KEY" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert blobs(rekindle.home) == set() if (rekindle.home / "store/blobs").exists() else True
    assert rekindle("extract", "kernels", "--to", str(tmp_path / "out")).status == 12


def test_a_damaged_image_is_not_extracted(rekindle: Rekindle, tmp_path: Path) -> None:
    triton(tmp_path / "t")
    assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "t")).status == 0
    largest = max((rekindle.home / "store/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = rekindle("extract", "kernels", "--to", str(tmp_path / "out"), "--json")
    assert done.status == 21
    assert (done.json["outcome"], done.json["error"]["code"]) == ("failed", "integrity")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["pack-cache", "kernels"], 2),
        (["pack-cache", "kernels", "--dir", "nowhere"], 2),
        (["pack-cache", "kernels", "--dir", "else"], 2),
        (["pack-cache", "kernels", "--dir", "empty", "--kind", "cuda"], 2),
        (["pack-cache", "Kernels", "--dir", "else", "--kind", "cuda"], 2),
        (["pack-cache", "localhost:1/kernels", "--dir", "else", "--kind", "cuda"], 2),
        (["pack-cache", "kernels", "--dir", "else", "--kind", "coffee"], 2),
        (["pack-cache", "kernels", "--dir", "else", "--kind", "cuda"], 0),
        (["extract"], 2),
        (["extract", "none"], 12),
        (["extract", "oci:else"], 2),
        (["extract", "packed", "--kind", "vllm", "--to", "out"], 12),
        (["extract", "packed", "--to", "a-file"], 2),
        (["extract", "packed", "--to", "/proc/nothing"], 2),
        (["extract", "packed", "--to", "out"], 0),
    ],
)
def test_each_end_has_its_status(
    rekindle: Rekindle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    rekindle.env["PYTHONPATH"] = str(ROOT)
    write(tmp_path / "else/picture.png")
    write(tmp_path / "a-file")
    (tmp_path / "empty").mkdir()
    triton(tmp_path / "t")
    assert rekindle("pack-cache", "packed", "--dir", "t").status == 0
    done = rekindle(*words)
    assert done.status == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_extract_needs_no_root(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o777)
        triton(Path(place) / "t")
        image = f"oci:{place}/images:one"
        rekindle = Rekindle(Path(place) / "home")
        rekindle.env["COSIGN_PASSWORD"] = ""
        assert rekindle("generate-key-pair", "--output-key-prefix", f"{place}/k").status == 0
        words = ["pack-cache", image, "--dir", f"{place}/t", "--sign-key", f"{place}/k.key"]
        assert rekindle(*words).status == 0
        os.chmod(f"{place}/images", 0o755)  # private until its owner says otherwise
        # Imported first, since nobody may not read the Python of root's home directory.
        program = (
            "import os, sys, concurrent.futures.thread, tomllib, pwd, cli.extract, rekindle.history; "
            "from rekindle.__main__ import main; "
            "os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "REKINDLE_HOME": f"{place}/other"}
        done = subprocess.run(
            [
                *(sys.executable, "-c", program, "extract", image, "--to", f"{place}/out"),
                *("--verify-key", f"{place}/k.pub"),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"export TRITON_CACHE_DIR={place}/out/triton\n"
        assert os.stat(f"{place}/out/triton").st_uid == 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_cache_goes_into_a_volume_that_is_mounted_in_its_place(rekindle: Rekindle, tmp_path: Path) -> None:
    there, disk = tmp_path / "triton-cache", tmp_path / "disk"
    triton(there)
    before = tree(there)
    assert rekindle("pack-cache", "kernels", "--dir", str(there)).status == 0
    shutil.rmtree(there)
    with small_disk(there, "8m"):
        done = rekindle("extract", "kernels")
        assert done.status == 0, done.stderr
        assert tree(there) == before
    with small_disk(tmp_path / "small", "20k"):
        done = rekindle("extract", "kernels", "--to", str(tmp_path / "small"))
        assert done.status == 14, done.stderr
        assert os.listdir(tmp_path / "small") == []
    # A bind mount of the same file system, as volumes of containers often are; and one within the cache.
    for within in ("", KEY):
        with bound(disk, there / within):
            done = rekindle("extract", "kernels")
            assert done.status == 0, done.stderr
            assert tree(there) == before
            assert not [path for path in there.rglob(".*") if path.is_dir()]
            again = rekindle("extract", "kernels", "--json")
            assert again.json["bytes"]["written"] == 0
        shutil.rmtree(disk)
        shutil.rmtree(there)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_place_that_is_read_only_is_named(rekindle: Rekindle, tmp_path: Path) -> None:
    there, disk = tmp_path / "triton-cache", tmp_path / "disk"
    triton(there)
    assert rekindle("pack-cache", "kernels", "--dir", str(there)).status == 0
    shutil.copytree(there, disk, copy_function=shutil.copy2)
    with bound(disk, there, "ro"):
        done = rekindle("extract", "kernels")
        assert done.status == 2, done.stderr
        assert f"{there} cannot be written" in done.stderr
        assert "--to DIR" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_user_of_the_server_can_add_kernels_to_what_root_extracted(rekindle: Rekindle) -> None:
    program = "import os, sys; os.setgid(7); os.setuid(1234); os.mkdir(sys.argv[1])"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        volume = Path(place) / "volume"
        triton(Path(place) / "t")
        assert rekindle("pack-cache", "kernels", "--dir", f"{place}/t").status == 0
        for _ in range(2):
            done = rekindle("extract", "kernels", "--to", str(volume), "--owner", "1234:7")
            assert done.status == 0, done.stderr
            for path in (volume, *volume.rglob("*")):
                assert (path.stat().st_uid, path.stat().st_gid) == (1234, 7), path
            shutil.rmtree(volume / "triton" / KEY)  # the next time, this is merged into what is there
        assert rekindle("extract", "kernels", "--to", str(volume), "--owner", "1234:7").status == 0
        made = volume / "triton" / KEY / "NEW"
        subprocess.run([sys.executable, "-c", program, str(made)], check=True, timeout=20)
        assert "no such user" in rekindle("extract", "kernels", "--owner", "nobody-here").stderr
        for given in ("-1", "99999999999999", "0x0"):
            assert rekindle("extract", "kernels", f"--owner={given}").status == 2


def test_an_interrupted_extraction_leaves_nothing(rekindle: Rekindle, tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / f"c/{number}", os.urandom(1 << 20) * 4)
    assert rekindle("pack-cache", "big", "--dir", str(tmp_path / "c"), "--kind", "cuda").status == 0
    out = tmp_path / "out"
    process = rekindle.spawn("extract", "big", "--to", str(out), log=tmp_path / "log")
    wait_for(lambda: out.exists() and any(out.rglob("*/[0-9]")), 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in {143, 0}
    assert not out.exists() or os.listdir(out) == ["cuda"]


@pytest.mark.vllm
def test_a_real_cache_of_triton_is_hit_where_it_was_extracted(rekindle: Rekindle, tmp_path: Path) -> None:
    """Compiled for GPUs that are not here. Triton finds every kernel again, by its rewritten groups."""
    source = write(tmp_path / "kernel.py", KERNEL)

    def compile_kernels(cache: Path) -> None:
        subprocess.run(
            [str(VLLM_BIN / "python"), "-W", "ignore", str(source)],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(cache)},
            check=True,
            capture_output=True,
            timeout=100,
        )

    compile_kernels(tmp_path / "before")
    done = rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "before"))
    assert done.status == 0, done.stderr
    shutil.move(tmp_path / "before", tmp_path / "gone")
    assert rekindle("extract", "kernels", "--to", str(tmp_path / "after")).status == 0
    extracted = tree(tmp_path / "after/triton")
    assert {path.rpartition(".")[2] for path in extracted} >= {"cubin", "ptx", "hsaco", "json"}
    compile_kernels(tmp_path / "after/triton")
    assert tree(tmp_path / "after/triton") == extracted
    # The same without the rewritten groups is a miss: Triton writes the kernels anew.
    for path in (tmp_path / "gone").rglob("*"):
        os.utime(path, ns=(1, 1))
    compile_kernels(tmp_path / "gone")
    assert any(time != 1 for _, time, _ in tree(tmp_path / "gone").values())


@pytest.mark.registry
def test_skopeo_and_go_containerregistry_take_it_for_an_ordinary_image(
    rekindle: Rekindle, tmp_path: Path
) -> None:
    """go-containerregistry is what MCV reads images with; `crane validate` is its opinion of one."""
    vllm(tmp_path / "caches/vllm")
    triton(tmp_path / "caches/triton")
    where = f"oci:{tmp_path}/images:one"
    assert rekindle("pack-cache", where, "--dir", str(tmp_path / "caches")).status == 0

    def tool(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    seen = json.loads(tool(str(SKOPEO), "--insecure-policy", "inspect", where))
    assert seen["Labels"]["cache.vllm.image/format"] == "binary"
    assert seen["Labels"]["io.kserve.km/cache-root-env"] == f"VLLM_CACHE_ROOT={tmp_path}/caches/vllm"
    assert len(seen["Layers"]) == 2
    archive = tmp_path / "image.tar"
    tool(str(SKOPEO), "--insecure-policy", "copy", where, f"docker-archive:{archive}:a:b")
    assert "PASS" in tool(str(CRANE), "validate", "--tarball", str(archive))
    exported = tmp_path / "exported.tar"
    with open(archive, "rb") as given, open(exported, "wb") as out:
        subprocess.run([str(CRANE), "export", "-", "-"], stdin=given, stdout=out, check=True)
    with tarfile.open(exported) as tar:
        names = tar.getnames()
    assert f"io.vllm.cache/triton/{KEY}/add.cubin" in names
    assert "io.vllm.manifest/manifest.json" in names


@pytest.mark.registry
def test_the_tag_of_a_snapshot_leads_other_tools_to_its_kernel_cache(
    rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    """`crane` chooses as MCV does, by go-containerregistry; skopeo as podman and CRI-O do."""
    layout = Layout.create(tmp_path / "image")
    layers = [layout.put(bytes([number]), media_types.DUMP_LAYER) for number in range(3)]
    kernels = pack.pack([vllm(tmp_path / "v"), triton(tmp_path / "t")], layout, created=CREATED)
    for tag, cache in (("whole", kernels), ("process", None)):
        layout.publish(layout, images.build(layout, RECORD, layers, cache).index, tag)
        where = f"{docker_registry.host}/models/tiny:{tag}"
        assert rekindle("copy", f"oci:{tmp_path}/image:{tag}", where).status == 0

    def tool(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    skopeo = [str(SKOPEO), "--insecure-policy", "inspect", "--tls-verify=false"]
    where = f"{docker_registry.host}/models/tiny"
    seen = json.loads(tool(*skopeo, f"docker://{where}:whole").stdout)
    assert seen["Labels"]["io.kserve.km/framework"] == "vllm"
    done = tool(str(CRANE), "export", "--insecure", f"{where}:whole", "exported.tar")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "exported.tar") as tar:
        assert f"io.vllm.cache/triton/{KEY}/add.cubin" in tar.getnames()
    done = tool(str(ORAS), "pull", "--plain-http", "-o", "pulled", f"{where}:whole")
    assert not [line for line in done.stdout.splitlines() if line.startswith("Skipped  ")], done.stdout
    names = [f"dump-{layer.digest.hex[:12]}.zst" for layer in layers]
    names += ["config.json", "record.json", "triton.tar.gz", "vllm.tar.gz"]
    assert sorted(os.listdir(tmp_path / "pulled")) == sorted(names)
    # One without a cache has nothing for them, and they say so.
    done = tool(*skopeo, f"docker://{where}:process")
    assert "no image found in image index" in done.stderr
    done = tool(str(CRANE), "export", "--insecure", f"{where}:process", "-")
    assert "no child with platform linux/amd64" in done.stderr


@pytest.mark.registry
def test_an_image_that_mcv_made_is_verified_and_extracted(
    rekindle: Rekindle, key_pair: KeyPair, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    vllm(tmp_path / "v")
    layout = Layout.create(tmp_path / "image")
    layout.publish(layout, image_of_mcv(layout, CacheKind.VLLM, tmp_path / "v"), "1")
    where, out = f"{docker_registry.host}/cache:1", tmp_path / "out"
    assert rekindle("copy", f"oci:{tmp_path}/image:1", where).status == 0
    assert rekindle("extract", where, "--to", str(out), *key_pair.verify).status == 22
    assert not out.exists()
    assert rekindle("sign", where, "--yes-by-tag", *key_pair.sign).status == 0
    done = rekindle("extract", where, "--to", str(out), *key_pair.verify)
    assert done.status == 0, done.stderr
    assert done.stdout == f"export VLLM_CACHE_ROOT={out}/vllm\n"
    assert tree(out / "vllm").keys() == tree(tmp_path / "v").keys()
    assert "made for    cuda 90, amd64" in rekindle("inspect", where).stdout
