#!/usr/bin/env python3
"""Puts a patched llama.cpp into a build folder.

    python native/prepare_source.py build/source     # makes build/source/llama.cpp and build/source/python/llama_cpp
    python native/prepare_source.py --check          # does every patch apply to the original text?

llama.cpp comes out of the source distribution of llama-cpp-python. It is looked for in
  1. --source or LLAMA_CPP_SOURCE_DIR: an unpacked source distribution, its .tar.gz, or a llama.cpp tree,
     which makes the libraries and programs without the Python package (only read)
  2. the user's cache: $XDG_CACHE_HOME/indexmem-edge (~/.cache/indexmem-edge)
  3. pip, which puts it into that cache
and the archive must have the SHA-256 below.

Patches (native/patches/NNNN-name.patch) are unified diffs, applied in the order of their numbers, strictly: every
context line must match, at the line that the hunk states. When a hunk of a file is not there, those of that file are
looked for elsewhere: each must have one place alone, in the same order, and where that is is printed. Each run computes
the patched text from the original and writes only files whose content changes, so running it again is harmless and builds
stay incremental. With the same patches and the same source it does nothing; edits made by hand inside the folder survive
until a patch changes.

To add a patch (for new files there is no need of one: what lies in native/{ops,policies,indexers,src} is compiled too):
    python native/prepare_source.py before && cp -r before after                  # edit after/llama.cpp, then
    diff -r -u -U2 before/llama.cpp after/llama.cpp > native/patches/0009-name.patch
    python native/prepare_source.py --check
To change patch 4, make `before` with --until 3 and `after` with --until 4.
"""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

NAME, VERSION = "llama-cpp-python", "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# What building llama, ggml and the CPU, BLAS, CUDA, Metal and Vulkan backends reads, and what the programs beside them do: the
# server with its page, perplexity, bench, and the tests of ops. Nothing else.
WANTED = re.compile(
    r"LICENSE|CMakeLists\.txt|cmake/.+\.(cmake|in)|include/.+|src/.+"
    r"|vendor/.+|common/.+|tools/(server|mtmd|perplexity|llama-bench)/([^/]+|(models|debug)/.+)|tools/ui/.+|scripts/ui-assets\.cmake"
    r"|tests/(test-backend-ops|gguf-model-data)\.(cpp|h)"
    r"|ggml/(CMakeLists\.txt|(cmake|include)/.+)|ggml/src/([^/]+|ggml-(cpu|blas|cuda|metal|vulkan)/.+)"
)
WANTED_PYTHON = re.compile(r"(server/)?[^/]+\.py|py\.typed")
# Imports of itself, made relative: the copy has a name of its own (indexmem_edge/_vendor). And it asks us where its library is.
# HERE is llama_cpp, as many dots as it takes from where the file is.
OWN_NAME = [
    (rb"(?m)^([ \t]*)import llama_cpp\.(\w+) as (\w+)$", rb"\1from HERE import \2 as \3"),
    (rb"(?m)^([ \t]*)import llama_cpp\.(\w+)$", rb"\1from HERE. import llama_cpp\n\1from HERE import \2 as _\2"),
    (rb"(?m)^([ \t]*)import llama_cpp$", rb"\1from HERE. import llama_cpp"),
    (rb"(?m)^([ \t]*)from llama_cpp\.([\w.]+) import ", rb"\1from HERE\2 import "),
    (rb'os\.environ\.get\("LLAMA_CPP_LIB_PATH"\)', rb"_library_dir()"),
    (rb'(?m)^_lib_base_name = "llama"$', rb'from ...native.find import library_dir as _library_dir\n\n_lib_base_name = "llama"'),
]


class Problem(Exception):
    """Something the user has to act on; shown as one line."""


# ---------------------------------------------------------------------------------------------------- the source


def has_checksum(archive):
    digest = hashlib.sha256()
    with open(archive, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == SHA256


def download(archive):
    """Fetches the source distribution with pip, which checks it against SHA256 before it looks inside."""
    print(f"downloading {NAME} {VERSION} (73 MiB, once) to {archive.parent}", flush=True)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as temp:
        wanted = Path(temp) / "wanted.txt"
        wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        # --no-binary for this package alone: `:all:` would also compile the tools that pip needs to read its metadata
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--no-binary", NAME, "--dest", temp, "--requirement", str(wanted)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        fetched = Path(temp) / archive.name
        if not fetched.exists():
            said = [line for line in run.stdout.splitlines() if line.strip()]
            errors = [line for line in said if "error" in line.lower()] or said or ["it said nothing"]
            raise Problem(f"pip could not download {NAME}=={VERSION} ({errors[0].strip()}); "
                          f"without a network, set LLAMA_CPP_SOURCE_DIR to its unpacked source distribution"
                          + (", or where Windows does not know paths of more than 260 characters, to its .tar.gz" if os.name == "nt" else ""))
        os.replace(fetched, archive)


def find_archive():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    archive = cache / "indexmem-edge" / f"{SDIST}.tar.gz"
    if archive.exists() and not has_checksum(archive):
        print(f"{archive} is damaged and is fetched again")
        archive.unlink()
    if not archive.exists():
        download(archive)
    return archive


def find_folders(given):
    """Returns (llama.cpp, llama_cpp or None) of an unpacked source distribution or a llama.cpp tree."""
    for llama, python in ((given / "vendor" / "llama.cpp", given / "llama_cpp"),
                          (given, given.parent.parent / "llama_cpp")):
        if (llama / "ggml" / "CMakeLists.txt").is_file() and (llama / "src" / "llama.cpp").is_file():
            return llama, python if (python / "llama_cpp.py").is_file() else None
    raise Problem(f"{given} (LLAMA_CPP_SOURCE_DIR) holds neither llama.cpp nor a source distribution of {NAME}")


def place(name):
    """Where a file of the source distribution goes, or None when nothing needs it."""
    if name.startswith("vendor/llama.cpp/"):
        name = name[len("vendor/llama.cpp/"):]
        return "llama.cpp/" + name if WANTED.fullmatch(name) else None
    if name == "LICENSE.md":
        return "python/llama_cpp/LICENSE.md"
    if name.startswith("llama_cpp/") and WANTED_PYTHON.fullmatch(name[len("llama_cpp/"):]):
        return "python/" + name
    return None


def list_folders(llama, python):
    """{place: path} of an unpacked source."""
    found = {place("vendor/llama.cpp/" + p.relative_to(llama).as_posix()): p for p in llama.rglob("*") if p.is_file()}
    if python:
        found.update({place("llama_cpp/" + p.relative_to(python).as_posix()): p for p in python.rglob("*.*") if p.is_file()})
        if (python.parent / "LICENSE.md").is_file():
            found[place("LICENSE.md")] = python.parent / "LICENSE.md"
    found.pop(None, None)
    return found


def read_archive(archive):
    """{place: content} of the source distribution. Links are skipped, names that leave its folder refused."""
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[0] != SDIST or ".." in parts or "\\" in member.name:
                raise Problem(f"{archive}: unsafe name {member.name!r}")
            target = place("/".join(parts[1:]))
            if target and member.isfile():
                files[target] = tar.extractfile(member).read()
    return files


def open_source(given):
    """Returns (identity, function that reads {place: content}). A folder is known by its files' sizes and times."""
    given = Path(given).expanduser().resolve() if given else None
    if given and given.is_dir():
        paths = list_folders(*find_folders(given))
        stats = {name: path.stat() for name, path in sorted(paths.items())}
        identity = repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats.items()])
        return identity, lambda: {name: path.read_bytes() for name, path in paths.items()}
    if given and not has_checksum(given):
        raise Problem(f"{given} is not {SDIST}.tar.gz: its SHA-256 is not {SHA256}")
    return SHA256, lambda: read_archive(given or find_archive())


# -------------------------------------------------------------------------------------------------- the patches


def list_patches(folder, until=None):
    numbered = []
    for path in folder.glob("*.patch"):
        if not (number := re.match(r"\d+", path.name)):
            raise Problem(f"{path.name}: the name of a patch starts with its number")
        numbered.append((int(number.group()), path.name, path))
    return [path for number, _, path in sorted(numbered) if until is None or number <= until]


def apply_patches(patches, files):
    """Applies all patches to the dict `files` and says which hunks moved; returns their number."""
    moves = []
    for path in patches:
        moves += apply_patch(path.name, path.read_text(encoding="utf-8", errors="surrogateescape"), files)
    for move in moves:
        print(f"prepare_source: {move}", flush=True)
    return len(moves)


def apply_patch(name, patch, files):
    """Applies the unified diff `patch` to the dict `files`; raises Problem at the first hunk that has no place.

    Returns a line for each hunk that was found somewhere else than at the line it states.
    """
    moves = []
    for target, hunks in read_patch(name, patch, files):
        old, out, done = files[target].decode("utf-8", "surrogateescape").split("\n"), [], 0
        places = find_hunks(f"{name}: {target}", old, hunks)
        for at, (begin, before, after) in zip(places, hunks):
            if at != begin:
                path = target.removeprefix("llama.cpp/")
                moves.append(f"{name}: hunk at line {begin + 1} of {path} found at {at + 1}")
            out += old[done:at] + after
            done = at + len(before)
        files[target] = "\n".join(out + old[done:]).encode("utf-8", "surrogateescape")
    return moves


def find_hunks(name, old, hunks):
    """Index in the lines `old` of each hunk: all where they state it, or each at the only place where its lines are."""
    if all(old[begin:begin + len(before)] == before for begin, before, _ in hunks):
        return [begin for begin, _, _ in hunks]
    found, done = [], 0
    for begin, before, _ in hunks:
        at = [i for i in range(len(old) - len(before) + 1) if old[i:i + len(before)] == before] if before else []
        where = ", ".join(str(i + 1) for i in at[:4]) + (", ..." if len(at) > 4 else "")
        if len(at) > 1 and begin in at:
            raise Problem(f"{name} line {begin + 1}: other hunks of the file have moved, and the lines of this one are "
                          f"at {len(at)} places: {where}")
        if len(at) != 1:
            raise Problem(f"{name} {difference(old, begin, before)}; the lines of the hunk are at {len(at)} places"
                          + (f": {where}" if where else ""))
        if at[0] < done:
            raise Problem(f"{name} line {begin + 1}: the lines of the hunk are at {where}, "
                          f"before those of an earlier hunk")
        found.append(at[0])
        done = at[0] + len(before)
    return found


def difference(old, begin, before):
    """The first line of a hunk that is another one at its stated place, in words."""
    for i, text in enumerate(before, begin):
        found = old[i] if i < len(old) else None
        if text != found:
            return f"line {i + 1}: expected {text!r}, found {'the end of the file' if found is None else repr(found)}"
    return f"line {begin + 1}: no line says where the hunk belongs, and others of the file have moved"


def read_patch(name, patch, files):
    """[(file, [(index of the stated line, lines before, lines after)])] of a unified diff."""
    lines = patch.removesuffix("\n").split("\n")
    at, res, stated, shift = 0, [], 0, 0

    def problem(text):
        return Problem(f"{name}: {text}")

    while at < len(lines):
        line = lines[at]
        if line.startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ "):
            path = lines[at + 1][4:].split("\t")[0].rstrip()
            if "/dev/null" in (path, line[4:].split("\t")[0].rstrip()):
                raise problem(f"line {at + 1} creates or deletes a file; new files go into native/, not into a patch")
            path = path.split("/", 1)[-1]
            target = path if path.startswith(("llama.cpp/", "python/")) else "llama.cpp/" + path
            absent = target.startswith("python/") and not any(file.startswith("python/") for file in files)  # a llama.cpp tree alone
            if target not in files and not absent:
                raise problem(f"line {at + 2} names {path}, which is not among the prepared sources")
            res.append((target, []))
            at, stated, shift = at + 2, 0, 0
            continue
        hunk = re.match(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", line)
        if not hunk:
            if re.match(r"Only in |Binary files |@@", line) or res and re.match(r"[-+ \\]", line):
                raise problem(f"line {at + 1} is outside of every hunk: {line!r} (are the counts in @@ right?)")
            at += 1  # free text
            continue
        if not res:
            raise problem(f"line {at + 1}: a hunk without the name of a file")
        start, n_old, new_start, n_new = (1 if x is None else int(x) for x in hunk.groups())
        begin = start - 1 if n_old else start
        if begin < stated or (new_start - 1 if n_new else new_start) != begin + shift:
            raise problem(f"line {at + 1}: the line numbers of {line!r} do not follow from the hunks before it")
        before, after, at = [], [], at + 1
        while len(before) < n_old or len(after) < n_new:
            kind, text = (lines[at][:1] or " ", lines[at][1:]) if at < len(lines) else ("", "")
            if kind not in (" ", "-", "+"):
                raise problem(f"line {at + 1}: the hunk ends before the counts of {line!r} are reached")
            if kind != "+":
                before.append(text)
            if kind != "-":
                after.append(text)
            at += 1
        if len(before) != n_old or len(after) != n_new:
            raise problem(f"line {at}: the hunk goes beyond the counts of {line!r}")
        if at < len(lines) and lines[at].startswith("\\"):
            raise problem(f"line {at + 1}: files end with a newline")
        res[-1][1].append((begin, before, after))
        stated, shift = begin + n_old, shift + n_new - n_old
    if not any(hunks for _, hunks in res):
        raise problem("holds no hunk")
    return [(target, hunks) for target, hunks in res if target in files]


def rename_python(files):
    """Makes llama_cpp one that can live beside another of the same name."""
    for name, content in files.items():
        if name.startswith("python/llama_cpp/") and name.endswith(".py"):
            here = b"." * (name.count("/") - 1)
            for old, new in OWN_NAME:
                content = re.sub(old, new.replace(b"HERE", here), content)
            left = re.search(rb"(?m)^[ \t]*(import llama_cpp|from llama_cpp).*$|LLAMA_CPP_LIB_PATH", content)
            if left:
                raise Problem(f"{name}: {left.group().decode(errors='replace').strip()!r} is none of the imports that are "
                              f"made relative (OWN_NAME)")
            files[name] = content


# ---------------------------------------------------------------------------------------------------- the folder


def write_folder(out, files, known):
    """Makes `out` hold exactly `files`: writes what differs, removes what an earlier run wrote and is not wanted."""
    written = 0
    for name, content in files.items():
        path = out / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written += 1
    for name in set(known) - set(files):
        (out / name).unlink(missing_ok=True)
    return written


def prepare(out, source, patches):
    stamp = out / "prepared.json"
    try:
        before = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {"key": "", "files": []}
        if any((out / "llama.cpp").glob("*")):
            raise Problem(f"{out / 'llama.cpp'} was not made by prepare_source.py; give another folder or remove it") from None
    identity, read = open_source(source)
    key = hashlib.sha256(Path(__file__).read_bytes() + identity.encode())
    for path in patches:
        key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    if before["key"] == key.hexdigest():
        return "up to date"
    files = read()
    apply_patches(patches, files)
    rename_python(files)
    out.mkdir(parents=True, exist_ok=True)
    told = {"key": "", "files": sorted({*files, *before["files"]})}
    stamp.write_text(json.dumps(told), encoding="utf-8")  # in case it is interrupted
    written = write_folder(out, files, before["files"])
    stamp.write_text(json.dumps({"key": key.hexdigest(), "files": sorted(files)}), encoding="utf-8")
    return f"{len(files)} files, {written} of them written, {len(patches)} patches"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder to prepare")
    parser.add_argument("--source", default=os.environ.get("LLAMA_CPP_SOURCE_DIR"), help="see above")
    parser.add_argument("--patches", type=Path, default=Path(__file__).resolve().parent / "patches",
                        help="folder of the patches")
    parser.add_argument("--until", type=int, metavar="N", help="apply only patches up to number N (0: none)")
    parser.add_argument("--check", action="store_true", help="apply the patches in memory and write nothing")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # folders may have names that a console cannot show
    if not args.check and not args.out:
        parser.error("name the folder to prepare, or --check")
    try:
        patches = list_patches(args.patches, args.until)
        if args.check:
            moved = apply_patches(patches, open_source(args.source)[1]())
            how = f", {moved} of their hunks at other lines" if moved else " exactly"
            print(f"{len(patches)} patches apply{how}")
        else:
            print(f"{args.out}: {prepare(args.out.resolve(), args.source, patches)}")
    except (Problem, OSError, tarfile.TarError, EOFError) as e:
        sys.exit(f"prepare_source: {e}")


if __name__ == "__main__":
    main()
