"""Read packages of documentation: Debian's `.deb`, Python's `.whl` and source archives, folders.

Nothing is installed or executed. `download_debian` needs apt; the rest only the standard library,
and pyarrow for packages compressed with zstd (Ubuntu).
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from lingua.errors import UserError, first_line, import_optional

ARCHIVES = (".deb", ".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LICENCE_FILE = re.compile(r"(^|/)(copyright|(LICENSE|LICENCE|COPYING)[^/]*|METADATA|PKG-INFO)$")
# What licences say, for files that don't use the machine-readable form.
LICENCES = {
    "Apache-2.0": r"Apache License,?\s+Version 2\.0",
    "Artistic": r"Artistic License",
    "BSD": r"Redistribution and use in source and binary forms",
    "GFDL": r"GNU Free Documentation License",
    "GPL": r"GNU General Public License",
    "MIT": r"Permission is hereby granted, free of charge",
    "PSF": r"PYTHON SOFTWARE FOUNDATION LICENSE",
    "permissive": r"Permission to use, copy, modify,? and distribute",
    "public-domain": r"public domain",
}
BROKEN = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, ValueError)


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    path: Path  # of an archive, or of a folder
    files: tuple[Path, ...] = ()  # in a folder

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of the files. UserError for a broken archive."""
        try:
            if self.files:
                for file in self.files:
                    yield file.relative_to(self.path).as_posix(), file.read_bytes()
            elif self.path.suffix in (".whl", ".zip"):
                with zipfile.ZipFile(self.path) as archive:
                    yield from (
                        (i.filename, archive.read(i)) for i in archive.infolist() if not i.is_dir()
                    )
            else:
                data = _deb_data(self.path) if self.path.suffix == ".deb" else None
                with tarfile.open(None if data else self.path, fileobj=data) as archive:
                    for member in archive:
                        if member.isfile() and (file := archive.extractfile(member)):
                            yield member.name.removeprefix("./"), file.read()
        except (*BROKEN, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of the archive
                raise
            raise UserError(
                f"{self.path} is broken ({first_line(error)}): remove it, and run the same command "
                "again"
            ) from None

    def sha256(self) -> str:
        """Return the hash of the archive, or of the names and contents of the files."""
        if not self.files:
            with open(self.path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for name, content in self.members():
            digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        return digest.hexdigest()

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files or [self.path])


def _deb_data(file: Path) -> io.BytesIO:
    """Return the tar archive of a package's files, without zstd compression."""
    with open(file, "rb") as stream:
        if stream.read(8) != b"!<arch>\n":
            raise ValueError("not a Debian package")
        while header := stream.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                data = io.BytesIO(stream.read(size))
                if name.endswith(".zst"):
                    arrow = import_optional("pyarrow", extra="data", needed_by=f"reading {file}")
                    data = io.BytesIO(arrow.input_stream(data, compression="zstd").read())
                return data
            stream.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("no data.tar in it")


def find_packages(folder: Path) -> list[Package]:
    """Return the archives in a folder, and each subfolder with other files, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"--source_dir {folder}: no such folder (seen from {Path.cwd()})")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise UserError(f"--source_dir {folder} is empty")
    found = [package_of(file) for file in files if file.name.endswith(ARCHIVES)]
    loose: dict[str, list[Path]] = {}
    for file in files:
        if not file.name.endswith(ARCHIVES):
            inner = file.relative_to(folder).parts
            loose.setdefault(inner[0] if len(inner) > 1 else folder.resolve().name, []).append(file)
    for name, members in loose.items():
        found.append(Package(name, "", folder, tuple(members)))
    return sorted(found, key=lambda package: (package.name, package.version))


def package_of(archive: Path) -> Package:
    """Read name and version from the name of an archive."""
    suffix = next(s for s in ARCHIVES if archive.name.endswith(s))
    pattern = r"([^_]+)_(.+)_[^_]+" if suffix == ".deb" else r"(.+?)-(\d[^-]*)(?:-.*)?"
    name = unquote(archive.name.removesuffix(suffix))
    match = re.fullmatch(pattern, name)
    return Package(match[1], match[2], archive) if match else Package(name, "", archive)


def licences_of(name: str, text: str) -> set[str]:
    """Return short names of the licences in a file that `LICENCE_FILE` matches."""
    if name.endswith(("METADATA", "PKG-INFO")):
        found = re.findall(r"^License-Expression: (.+)$", text, re.MULTILINE)
        return set(found or re.findall(r"^Classifier: License ::.*:: (.+)$", text, re.MULTILINE))
    if re.match(r"\s*Format", text):  # machine-readable: dep-5
        return {found.strip() for found in re.findall(r"^License:[ \t]*(\S.*)$", text, re.M)}
    common = re.findall(r"/usr/share/common-licenses/([\w.+-]*[\w+])", text)
    return set(common) or {name for name, words in LICENCES.items() if re.search(words, text)}


# ---- apt


def download_debian(names: Sequence[str], folder: Path, advice: str) -> list[Package]:
    """Download free packages, and those of documentation that they depend on, into `folder`.

    Packages that are there are kept. A name that this system's release lacks is reported.
    """
    if shutil.which("apt-get") is None or shutil.which("apt-cache") is None:
        raise UserError(f"no apt-get on this machine to download documentation with; {advice}")
    known = _show(names)
    depends = {name for entry in known.values() for name in _doc_depends(entry["Depends"])}
    known |= _show(sorted(depends - known.keys()))
    nonfree = {n for n, entry in known.items() if re.match("non-free|contrib", entry["Section"])}
    known = {name: entry for name, entry in sorted(known.items()) if name not in nonfree}
    if not known:
        raise UserError(
            f"apt knows none of {', '.join(names[:3])}, ...: run apt-get update first, or {advice}"
        )
    if missing := sorted({*names, *depends} - known.keys()):
        print(f"left out, not in this release's free packages: {', '.join(missing)}")
    packages = {name: _package(name, entry, folder) for name, entry in known.items()}
    wanted = {
        name: known[name]
        for name, package in packages.items()
        if not package.path.is_file() or package.sha256() != known[name]["SHA256"]
    }
    if wanted:
        size = sum(int(entry["Size"]) for entry in wanted.values())
        print(f"downloading {len(wanted)} packages, {size / 1e6:.0f} MB, to {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download"]
        command += [f"{name}={entry['Version']}" for name, entry in wanted.items()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise UserError(
                f"apt-get download failed ({(reasons or ['no reason given'])[0]}); run apt-get "
                f"update and the same command again, or {advice}"
            )
    return list(packages.values())


def _show(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the fields of the candidate version of each package that apt knows."""
    command = ["apt-cache", "show", "--no-all-versions", *names]
    done = subprocess.run(command, capture_output=True, text=True) if names else None
    fields = ("Version", "Architecture", "Section", "Depends", "Size", "SHA256")
    found = {}
    for stanza in done.stdout.split("\n\n") if done else []:
        entry = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
        if "Package" in entry:
            found[entry["Package"]] = {field: entry.get(field, "") for field in fields}
    return found


def _doc_depends(depends: str) -> list[str]:
    """Return the packages of documentation in a `Depends:`; linux-doc is only such a list."""
    return re.findall(r"(?:^|,)\s*([\w.+-]+-doc(?:-[\w.]+)?)\b", depends)


def _package(name: str, entry: dict[str, str], folder: Path) -> Package:
    version = entry["Version"]
    file = f"{name}_{version.replace(':', '%3a')}_{entry['Architecture']}.deb"  # as apt names it
    return Package(name, version, folder / file)
