"""Runs the steps of one Dockerfile target in a clean Debian root, for machines without a Docker engine.

    python tests/support/clean_root.py [--target cpu] [--mirror URL] [--keep] [COMMAND ...]

Needs root, debootstrap, and the package sources that this machine's apt and pip are set to. Every instruction of the
target is carried out in order as Docker would: ENV, RUN, COPY, WORKDIR, USER. The base image is stood in for by a
minimal Debian with Python. At the end COMMAND, or the image's own entry point and command, is run as the image's user.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
BASE_PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"  # what the base image brings
MOUNTS = ("/proc", "/sys", "/dev", "/dev/shm")
# How this machine reaches its package sources; an image gets that from its builder.
SETTINGS = ("/etc/pip.conf", "/etc/resolv.conf", "/etc/apt/sources.list", "/etc/apt/sources.list.d")
SETTINGS += ("/etc/apt/apt.conf.d", "/etc/apt/auth.conf.d", "/etc/ssl/certs/ca-certificates.crt")
PASSED = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "http_proxy", "https_proxy", "no_proxy")  # and PIP_*


@dataclass
class Image:
    """The state that instructions change."""

    root: Path
    environment: dict[str, str]
    folder: str = "/"
    user: str = "root"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, argv: list[str]) -> None:
        """Run a command in the root. Raises CalledProcessError."""
        inside = f"cd {shlex.quote(self.folder)} && exec {shlex.join(argv)}"
        switch = ["chroot", "--userspec", f"{self.user}:{self.user}", str(self.root), "/bin/sh", "-c", inside]
        home = {"HOME": "/root" if self.user == "root" else f"/home/{self.user}"}
        subprocess.run(switch, env=self.environment | home, check=True, stdin=subprocess.DEVNULL)


def instructions(dockerfile: str, target: str) -> list[tuple[str, str]]:
    """Keyword and argument of each instruction of ``target``. Raises KeyError when there is no such target."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    pairs = [tuple(line.strip().split(maxsplit=1)) for line in logical if line.strip()]
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for keyword, argument in pairs:
        if keyword == "FROM":
            current = stages.setdefault(argument.split(" AS ")[1], [])
        else:
            current.append((keyword, argument))
    return stages[target]


def carry_out(image: Image, keyword: str, argument: str) -> None:
    """One instruction. Raises ValueError for one that this script does not know."""
    print(f"--- {keyword} {argument}", flush=True)
    if keyword == "ENV":
        image.environment |= dict(part.split("=", 1) for part in shlex.split(argument))
    elif keyword == "RUN":
        image.run(["/bin/sh", "-ec", argument])
    elif keyword == "COPY":
        _copy(image, argument)
    elif keyword == "WORKDIR":
        image.folder = argument
        (image.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif keyword == "USER":
        image.user = argument
    elif keyword == "ENTRYPOINT":
        image.entry = json.loads(argument)
    elif keyword == "CMD":
        image.command = json.loads(argument)
    else:
        raise ValueError(f"unknown instruction {keyword}")


def _copy(image: Image, argument: str) -> None:
    """Tracked files alone, which is less than what .dockerignore lets through."""
    words = [word for word in argument.split() if not word.startswith("--")]
    source, target = words
    listed = subprocess.run(["git", "ls-files", source], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    place = image.root / image.folder.lstrip("/")
    for name in listed.splitlines():
        inner = Path(target) / (Path(name).relative_to(source) if source != "." else name)
        (place / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / inner)
    owner = next((word.split("=")[1] for word in argument.split() if word.startswith("--chown=")), None)
    if owner:
        folder = shlex.quote(image.folder)
        subprocess.run(["chroot", str(image.root), "/bin/sh", "-c", f"chown -R {owner} {folder}"], check=True)


def make_root(folder: Path, mirror: str | None) -> Image:
    """A minimal Debian in ``folder``, with this machine's settings of apt and pip."""
    argv = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(folder)]
    subprocess.run(argv + ([mirror] if mirror else []), check=True, stdout=subprocess.DEVNULL)
    for name in SETTINGS:
        path, inner = Path(name), folder / name.lstrip("/")
        if path.is_dir():
            shutil.copytree(path, inner, dirs_exist_ok=True)
        elif path.exists():
            shutil.copyfile(path, inner)
    folder.chmod(0o755)  # the image's user must be able to enter it
    passed = {name: text for name, text in os.environ.items() if name in PASSED or name.startswith("PIP_")}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return Image(folder, {"PATH": path, "LANG": "C.UTF-8"} | passed)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--mirror", help="Debian mirror for debootstrap; else its own choice")
    parser.add_argument("--keep", action="store_true", help="leave the root where it is, to look into it")
    parser.add_argument("command", nargs="*", help="what to run at the end, after the image's entry point")
    asked = parser.parse_args()
    steps = instructions((ROOT / "Dockerfile").read_text(), asked.target)
    folder = Path(tempfile.mkdtemp(prefix="clean-root-"))
    mounted: list[Path] = []
    try:
        image = make_root(folder, asked.mirror)
        for name in MOUNTS:
            subprocess.run(["mount", "--bind", name, str(folder / name.lstrip("/"))], check=True)
            mounted.append(folder / name.lstrip("/"))
        for keyword, argument in steps:
            carry_out(image, keyword, argument)
        image.run([*image.entry, *(asked.command or image.command)])
    finally:
        for path in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(path)], check=False)
        if asked.keep:
            print(f"the root is {folder}", file=sys.stderr)
        elif not any(os.path.ismount(path) for path in mounted):  # else the machine's own /dev would be removed
            shutil.rmtree(folder)
    print(f"target {asked.target} was built and run in a clean root", file=sys.stderr)


if __name__ == "__main__":
    main()
