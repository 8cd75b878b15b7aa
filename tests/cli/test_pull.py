"""`indexmem pull` against a hub of our own: what is fetched, gone on with, checked and put where; and each way that it can fail."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import Tiny
from indexmem_edge.cli.app import app
from indexmem_edge.errors import DownloadError
from indexmem_edge.models import hub as hub_module
from indexmem_edge.models.hub import Hub as OurHub
from indexmem_edge.native import find
from support.commands import one_error, run
from support.hub import Hub, Repo, serving
from support.sidecars import fingerprint, shape
from tiny.gguf_copy import copy_model

constants = pytest.importorskip("huggingface_hub.constants")
Pull = Callable[..., CompletedProcess[str]]


def test_in_a_process_of_its_own(hub: Hub, model: bytes, tmp_path: Path) -> None:
    result = run("pull", "o/m:Q8_0", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_TOKEN="")
    assert result.returncode == 0 and Path(result.stdout.removesuffix("\n")).read_bytes().startswith(model)
    assert "\r" not in result.stderr  # no bars where nobody sees them
    one_error(run("pull", "o/m", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"), "cannot fetch o/m", "offline")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> bytes:
    return tiny("llama")[0].read_bytes()


@pytest.fixture
def hub(model: bytes) -> Iterator[Hub]:
    """A hub with a repository `o/m`, whose files tests may change."""
    with serving({"o/m": Repo({"m-Q4_K_M.gguf": model, "m-Q8_0.gguf": model + b"\0" * 32, "README.md": b"text"})}) as running:
        yield running


@pytest.fixture
def pull(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pull:
    """pull(*arguments, **environment) is the command, in this process, with an empty cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "")

    def invoke(*arguments: str, **environment: str) -> CompletedProcess[str]:
        result = CliRunner().invoke(app, ["pull", *arguments], env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    return invoke


def test_the_usual_file_goes_to_the_cache_and_the_path_is_printed(pull: Pull, hub: Hub, model: bytes, tmp_path: Path) -> None:
    result = pull("o/m")
    path = Path(result.stdout.removesuffix("\n"))
    assert result.returncode == 0 and path.name == "m-Q4_K_M.gguf" and path.is_relative_to(tmp_path / "home")
    assert path.read_bytes() == model
    assert f"indexmem chat -m {path}" in result.stderr and f"indexmem fit {path}" in result.stderr
    again = pull("o/m")
    assert again.stdout == result.stdout and hub.bytes_asked("m-Q4_K_M.gguf") == [""]


def test_into_a_folder_as_json(pull: Pull, tmp_path: Path) -> None:
    result = pull("o/m:q8_0", "--to", str(tmp_path / "models"), "--json")
    path = str(tmp_path / "models" / "m-Q8_0.gguf")
    assert json.loads(result.stdout) == {
        "path": path, "files": [path], "sidecars": [], "problems": [], "command": ["indexmem", "chat", "-m", path],
    }  # fmt: skip
    assert result.stderr == "" and Path(path).is_file()


def test_a_split_model_and_a_sidecar_from_another_folder(pull: Pull, hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    from indexmem_edge.bench.synthetic import random_sidecar

    path, config = tiny("llama")
    first = copy_model(path, tmp_path / "m-F32.gguf", per_file=9)
    parts = sorted(first.parent.glob("m-F32-*.gguf"))
    sidecar = random_sidecar(tmp_path / "m.indexmem.gguf", shape(config), "retention", fingerprint=fingerprint(path), mid_dim=32)
    hub.repos["o/s"] = Repo({**{f"big/{p.name}": p.read_bytes() for p in parts}, "m.indexmem.gguf": sidecar.read_bytes()})
    found = json.loads(pull("o/s:F32", "--json").stdout)
    assert [Path(f).name for f in found["files"]] == [p.name for p in parts] and len(parts) == 3
    assert found["path"] == found["files"][0] and found["sidecars"] == [str(Path(found["path"]).parent / "m.indexmem.gguf")]
    if find.library_file() is not None:
        facts = json.loads(run("fit", found["path"], "--no-measure", "--json").stdout)
        assert facts["sidecar"] == found["sidecars"][0]
        assert facts["model"]["bytes"] == sum(p.stat().st_size for p in parts)
        trial = json.loads(run("doctor", "-m", found["path"], "--json").stdout)["findings"][-1]
        assert (trial["name"], trial["status"]) == ("trial", "ok"), trial  # links of the cache are followed to no lonely part
    folder = tmp_path / "models"
    beside = Path(json.loads(pull("o/s:F32", "--to", str(folder), "--json").stdout)["sidecars"][0])
    assert beside.parent == folder / "big" and beside.read_bytes() == sidecar.read_bytes()
    random_sidecar(sidecar, shape(config), "retention", seed=5, fingerprint=fingerprint(path), mid_dim=32)  # its owner has trained it again
    hub.repos["o/s"] = Repo({**{f"big/{p.name}": p.read_bytes() for p in parts}, "m.indexmem.gguf": sidecar.read_bytes()})
    assert "--force" in pull("o/s:F32", "--to", str(folder)).stderr and beside.read_bytes() != sidecar.read_bytes()
    pull("o/s:F32", "--to", str(folder), "--force")
    assert beside.read_bytes() == sidecar.read_bytes()


def test_of_two_sidecars_the_one_in_the_folder_of_the_model_stays(pull: Pull, hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    from indexmem_edge.bench.synthetic import random_sidecar

    path, config = tiny("llama")
    near, far = (
        random_sidecar(tmp_path / f"{seed}.gguf", shape(config), "retention", seed=seed, fingerprint=fingerprint(path), mid_dim=32).read_bytes()
        for seed in (1, 2)
    )
    files = {"Q4/m-Q4.gguf": path.read_bytes(), "A/m.indexmem.gguf": far, "Q4/m.indexmem.gguf": near, "m.indexmem.gguf": far}
    hub.repos["o/two"] = Repo(files)
    for options in ([], ["--force"], ["--to", str(tmp_path / "models")], ["--to", str(tmp_path / "models"), "--force"]):
        found = json.loads(pull("o/two:Q4", *options, "--json").stdout)
        assert found["problems"] == [] and [Path(f).read_bytes() for f in found["sidecars"]] == [near], options


def test_a_sidecar_is_not_written_into_the_store_of_the_cache(pull: Pull, hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    """Where files are links to others that are named for what is in them."""
    from indexmem_edge.bench.synthetic import random_sidecar
    from indexmem_edge.models.pull import _beside

    path, config = tiny("llama")
    old, new = (
        random_sidecar(tmp_path / f"{seed}.gguf", shape(config), "retention", seed=seed, fingerprint=fingerprint(path), mid_dim=32)
        for seed in (1, 2)
    )
    before = old.read_bytes()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "2.gguf").symlink_to(old)
    assert Path(_beside(str(new), str(tmp_path / "snapshot" / "m.gguf"), True)).read_bytes() == new.read_bytes()
    assert old.read_bytes() == before


def test_a_damaged_sidecar_is_left_aside(pull: Pull, hub: Hub) -> None:
    hub.repos["o/m"].files["m.indexmem.gguf"] = b"GGUF and no more"
    found = json.loads(pull("o/m", "--json").stdout)
    assert found["sidecars"] == [] and "m.indexmem.gguf cannot be used" in found["problems"][0]


def test_a_connection_that_ends_is_gone_on_with(pull: Pull, hub: Hub, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # for files of 10 MB and more it is 10 MB
    hub.repos["o/m"].breaks = {"m-Q4_K_M.gguf": 5000}
    result = pull("o/m")
    if result.returncode:  # releases of the package before 1.0 leave it to the next call
        one_error(result, "cannot fetch o/m/m-Q4_K_M.gguf")
        result = pull("o/m")
    assert Path(result.stdout.strip()).read_bytes() == model
    assert hub.bytes_asked("m-Q4_K_M.gguf") == ["", "bytes=5000-"]


def test_what_was_fetched_before_a_process_ended_is_kept(pull: Pull, hub: Hub, model: bytes, tmp_path: Path) -> None:
    pull("o/m")
    (blob,) = (tmp_path / "home").rglob("blobs/*")
    blob.with_name(f"{blob.name}.incomplete").write_bytes(model[:7000])
    blob.unlink()
    for link in (tmp_path / "home").rglob("m-Q4_K_M.gguf"):
        link.unlink()
    hub.asked.clear()
    assert Path(pull("o/m").stdout.strip()).read_bytes() == model
    assert hub.bytes_asked("m-Q4_K_M.gguf") in ([""], ["bytes=7000-"])  # newer releases name unfinished files differently


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"", b"GGUF\x03\0\0\0" + b"\xff" * 64], ids=["page", "empty", "damaged"])
def test_a_file_that_is_no_gguf(pull: Pull, hub: Hub, model: bytes, content: bytes) -> None:
    hub.repos["o/m"].files["m-Q4_K_M.gguf"] = content
    one_error(pull("o/m"), "m-Q4_K_M.gguf cannot be used", "tell its owner")
    hub.repos["o/m"].files["m-Q4_K_M.gguf"] = model
    assert Path(pull("o/m").stdout.strip()).read_bytes() == model


def test_a_file_that_was_damaged_on_this_side(pull: Pull, model: bytes) -> None:
    path = Path(pull("o/m").stdout.strip())
    path.write_bytes(b"x" * len(model))
    one_error(pull("o/m"), "m-Q4_K_M.gguf cannot be used", "--force")
    assert Path(pull("o/m", "--force").stdout.strip()).read_bytes() == model


def test_a_file_without_its_end(pull: Pull, hub: Hub, model: bytes) -> None:
    hub.repos["o/m"].files["m-Q4_K_M.gguf"] = model[:-5000]
    one_error(pull("o/m"), "truncated")


def test_what_is_not_there(pull: Pull, hub: Hub) -> None:
    one_error(pull("o/none"), "there is no model o/none, or it is private", "hf auth login")
    one_error(pull("o/m:Q2_K"), "no file of Q2_K", "m-Q8_0.gguf")
    one_error(pull("o/m/m-Q2_K.gguf"), "no file m-Q2_K.gguf")


def test_what_needs_a_login(pull: Pull, hub: Hub, model: bytes) -> None:
    hub.repos["o/gated"] = Repo({"m.gguf": model}, token="hf_right", gated=True)
    one_error(pull("o/gated"), "only for people whom its owner lets in", "hf auth login", "HF_TOKEN")
    one_error(pull("o/gated", HF_TOKEN="hf_wrong"), "does not accept the token (401)", "hf auth login")
    assert pull("o/gated", HF_TOKEN="hf_right").returncode == 0


@pytest.mark.parametrize("status, words", [(403, "not for everybody"), (404, "look at the spelling"), (500, "answered with 500")])
def test_other_answers(pull: Pull, hub: Hub, status: int, words: str) -> None:
    hub.repos["o/odd"] = Repo(status=status)
    one_error(pull("o/odd"), words)


def test_without_a_network(pull: Pull) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        one_error(pull("o/m", HF_ENDPOINT=url), "cannot fetch o/m", "look at the network", url)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "o/m/../../x.gguf", "o\\m", "m"])
def test_names_that_lead_elsewhere(pull: Pull, hub: Hub, name: str) -> None:
    one_error(pull(name), "is not the name of a model")
    assert hub.asked == []


def test_a_repository_whose_names_lead_elsewhere(pull: Pull, hub: Hub, model: bytes, tmp_path: Path) -> None:
    hub.repos["o/evil"] = Repo({"../../out.gguf": model, "/tmp/out.gguf": model, "..\\out.gguf": model, "../m.indexmem.gguf": model})
    one_error(pull("o/evil", "--to", str(tmp_path / "a" / "b" / "c")), "no GGUF file")
    hub.repos["o/evil"].files["m.gguf"] = model
    found = json.loads(pull("o/evil", "--to", str(tmp_path / "a" / "b" / "c"), "--json").stdout)
    assert found["files"] == [str(tmp_path / "a" / "b" / "c" / "m.gguf")] and found["sidecars"] == []
    assert list(tmp_path.rglob("*out*")) == []


def test_another_file_in_the_way_is_not_replaced_unasked(pull: Pull, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(b"mine")
    one_error(pull("o/m", "--to", str(tmp_path)), "is there, and is another file", "--force")
    assert (tmp_path / "m-Q4_K_M.gguf").read_bytes() == b"mine"
    assert pull("o/m", "--to", str(tmp_path), "--force").returncode == 0
    assert (tmp_path / "m-Q4_K_M.gguf").read_bytes() == model


def test_a_folder_that_cannot_be_written(pull: Pull, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one_error(pull("o/m", "--to", str(tmp_path / "file" / "models")), "cannot write")


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OurHub(tmp_path, False, False)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ours, "_hub", SimpleNamespace(hf_hub_download=full))
    with pytest.raises(DownloadError, match=f"cannot write to {tmp_path}: No space left"):
        ours.fetch("m.gguf")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match="needs the package huggingface_hub, which is not installed: `pip install"):
        hub_module.Hub(None, False, False)
