"""Packages are read without installing them, and downloaded by name."""

from __future__ import annotations

import os
import zipfile

import pytest

from lingua.errors import UserError
from lingua.prepare.packages import download_debian, find_packages, licences_of, package_of
from tests.lingua.prepare.debs import tar_of, write_apt, write_deb

FILES = {"usr/share/doc/x/a.html": "<p>One.</p>", "usr/share/doc/x/copyright": "odd"}


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_a_debian_package_is_read(tmp_path, compression):
    if compression == "zst":
        pytest.importorskip("pyarrow")
    write_deb(tmp_path, "x-doc", "1:2.0+b-1", FILES, compression)
    (package,) = find_packages(tmp_path)
    assert (package.name, package.version) == ("x-doc", "1:2.0+b-1")
    assert dict(package.members()) == {name: text.encode() for name, text in FILES.items()}


def test_other_archives_and_folders_are_packages_too(tmp_path):
    (tmp_path / "Django-5.2.tar.gz").write_bytes(tar_of({"Django-5.2/a.rst": "One."}, "gz"))
    with zipfile.ZipFile(tmp_path / "sphinx_x-8.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sphinx_x/a.md", "Two.")
    (tmp_path / "manual" / "part").mkdir(parents=True)
    (tmp_path / "manual" / "part" / "b.txt").write_text("Three.")
    (tmp_path / "c.txt").write_text("Four.")
    found = {(p.name, p.version): dict(p.members()) for p in find_packages(tmp_path)}
    assert found == {
        ("Django", "5.2"): {"Django-5.2/a.rst": b"One."},
        ("sphinx_x", "8.0"): {"sphinx_x/a.md": b"Two."},
        ("manual", ""): {"manual/part/b.txt": b"Three."},
        (tmp_path.name, ""): {"c.txt": b"Four."},
    }


def test_the_hash_of_a_folder_changes_with_its_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (package,) = find_packages(tmp_path)
    before = package.sha256()
    assert before == package.sha256()
    (tmp_path / "a.txt").write_text("Two.")
    assert package.sha256() != before


@pytest.mark.parametrize("name", ["x_1_all.deb", "x-1.tar.gz", "x-1.whl"])
@pytest.mark.parametrize("content", [b"", b"not an archive", "half"])
def test_a_broken_archive_is_named(tmp_path, name, content):
    file = tmp_path / name
    if content == "half":
        whole = write_deb(tmp_path / "whole", "x", "1", {"a": os.urandom(9000)}).read_bytes()
        if not name.endswith(".deb"):
            whole = tar_of({"a": os.urandom(9000)}, "gz")
        content = whole[: len(whole) // 2]
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is broken"):
        list(package_of(file).members())


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("copyright", "Format: https://x\n\nFiles: *\nLicense: GPL-2+\n\nFiles: d\nLicense: MIT\n"
         "Copyright: x\n\nLicense: MIT\n Permission is hereby granted", {"GPL-2+", "MIT"}),
        ("copyright", "see /usr/share/common-licenses/GPL-3.", {"GPL-3"}),
        ("LICENSE", "Redistribution and use in source and binary forms, with", {"BSD"}),
        ("PKG-INFO", "Name: x\nLicense-Expression: BSD-3-Clause\n", {"BSD-3-Clause"}),
        ("METADATA", "Classifier: License :: OSI Approved :: MIT License\n", {"MIT License"}),
        ("copyright", "All rights reserved.", set()),
    ],
)  # fmt: skip
def test_licences_have_short_names(name, text, want):
    assert licences_of(name, text) == want


# ---- apt


@pytest.fixture
def apt(tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    for name in ("a-doc", "meta-doc", "meta-doc-6.1", "libjs-x", "free-doc"):
        write_deb(archive, name, "1:1.0", FILES)
    stanzas = {
        "meta-doc": "Depends: meta-doc-6.1 (>= 1), libjs-x\nSection: doc\n",
        "free-doc": "Section: non-free/doc\n",
    }
    write_apt(tmp_path / "bin", archive, stanzas)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def downloads(root):
    file = root / "bin" / "downloads"
    return file.read_text().splitlines() if file.exists() else []


def test_free_packages_and_their_documentation_are_downloaded_once(apt, capsys):
    names = ["a-doc", "meta-doc", "free-doc", "unknown-doc"]
    found = download_debian(names, apt / "to", "advice")
    assert [package.name for package in found] == ["a-doc", "meta-doc", "meta-doc-6.1"]
    assert "left out, not in this release's free packages: free-doc, unknown-doc" in (
        capsys.readouterr().out
    )
    assert all(dict(package.members()) for package in found)
    download_debian(names, apt / "to", "advice")
    assert downloads(apt) == ["a-doc=1:1.0 meta-doc=1:1.0 meta-doc-6.1=1:1.0"]
    found[0].path.write_bytes(b"cut sh")
    download_debian(names, apt / "to", "advice")
    assert downloads(apt)[1:] == ["a-doc=1:1.0"]


def test_what_apt_lacks_is_one_line_with_advice(apt, monkeypatch):
    with pytest.raises(UserError, match="apt knows none of unknown, .* update first, or advice"):
        download_debian(["unknown"], apt / "to", "advice")
    (apt / "archive" / "a-doc_1%3a1.0_all.deb").unlink()
    with pytest.raises(UserError, match=r"apt-get download failed \(E: failed\).* or advice"):
        download_debian(["a-doc"], apt / "to", "advice")
    monkeypatch.setenv("PATH", str(apt))
    with pytest.raises(UserError, match="no apt-get on this machine .*; advice"):
        download_debian(["a-doc"], apt / "to", "advice")
