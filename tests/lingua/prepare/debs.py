"""Write Debian packages, and an apt that serves them."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path


def write_deb(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, str | bytes],
    compression: str = "xz",
) -> Path:
    """Write a package of these files, as dpkg-deb builds it."""
    data = tar_of({f"./{file}": content for file, content in files.items()}, compression)
    control = tar_of({"./control": f"Package: {name}\nVersion: {version}\n"}, "gz")
    members = {"debian-binary": b"2.0\n", "control.tar.gz": control}
    members[f"data.tar.{compression}"] = data
    parts = [b"!<arch>\n"]
    for member, content in members.items():
        parts.append(f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
        parts += [content, b"\n" * (len(content) % 2)]
    file = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(parts))
    return file


def tar_of(files: Mapping[str, str | bytes], compression: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if compression == "gz":
        return gzip.compress(raw.getvalue())
    if compression == "xz":
        return lzma.compress(raw.getvalue())
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(raw.getvalue())
    return packed.getvalue().to_pybytes()


def write_apt(folder: Path, archive: Path, stanzas: Mapping[str, str] | None = None) -> None:
    """Write `apt-cache` and `apt-get` that know the packages in `archive`, and log downloads.

    `stanzas`: package -> more lines of its description.
    """
    entries = []
    for file in sorted(archive.glob("*.deb")):
        name, version, _ = file.name.replace("%3a", ":").split("_")
        content = file.read_bytes()
        entries.append(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nSize: {len(content)}\n"
            f"SHA256: {hashlib.sha256(content).hexdigest()}\n{(stanzas or {}).get(name, '')}"
        )
    (folder / "known").mkdir(parents=True)
    for entry in entries:
        (folder / "known" / entry.split("\n")[0].removeprefix("Package: ")).write_text(f"{entry}\n")
    scripts = {
        "apt-cache": f'shift 2; cd {folder}/known; for n in "$@"; do cat $n 2>/dev/null; done',
        "apt-get": f'shift; echo "$@" >> {folder}/downloads; for n in "$@"; do '
        f"cp {archive}/${{n%%=*}}_* . || {{ echo E: failed >&2; exit 100; }}; done",
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\ntrue\n")
        (folder / name).chmod(0o755)
