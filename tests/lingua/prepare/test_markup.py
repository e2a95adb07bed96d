"""Each format gives its prose, without code, headings, navigation and markup."""

from __future__ import annotations

import gzip

import pytest

from lingua.prepare.markup import read_passages

FIRST = "This is the first of the paragraphs, and it has the name of a file in it."
SECOND = "The second one is in a list, and it is what the reader should see after that."
THIRD = "This is the third one, which is here to show what comes after the code."
SENTENCE = "This is a sentence of the {} that is not to be read by any of the models."

HTML = f"""<!DOCTYPE html><html lang="en"><head><title>{SENTENCE.format("title")}</title>
<style>p {{ color: red }}</style></head><body class="sidebar-visible">
<div class="sphinxsidebar"><div><p>{SENTENCE.format("sidebar")}</p></div></div>
<nav><p>{SENTENCE.format("menu")}</p></nav><h1>A heading of the page</h1>
<p>This is the <i>first</i> of the paragraphs,
and it has the <code>name</code> of a file in it.<a class="headerlink" href="#x">&para;</a></p>
<pre>{SENTENCE.format("code")}</pre>
<ul><li>The second one is in a list,<br>and it is what the reader should&nbsp;see after that.
<li>&lt;short&gt;</ul>
<!-- <p>{SENTENCE.format("comment")}</p> --><p>{THIRD}</div></body></html>"""

MAN = rf""".\" {SENTENCE.format("comment")}
.TH NAME 3 "2026" "Linux" "{SENTENCE.format("title")}"
.SH DESCRIPTION
This is the
.BR first ,
of the paragraphs, and it has the
.I name
of a file in it.
.nf
{SENTENCE.format("code")}
.fi
.TP
.B \-\-list
The \fIsecond\fP one is in a list, and it is what the reader should see after that.
.TS
{SENTENCE.format("table")}
.TE
.PP
This is the third one, which is \(em here to show what comes after the code.
"""
MDOC = f".Dd May 1, 2020\n.Dt NAME 3\n.Sh DESCRIPTION\n{FIRST}\n"

RST = """Title
=====

This is the *first* of the paragraphs, and it has the ``name`` of a `file <x.html>`_ in it.

.. index:: this is a directive that is not to be read by any of the models.

- The :ref:`second one <two>` is in a list, and it is what the reader should
  see after that.

>>> this("is the code of the example that is not to be read.")

This is the **third** one, which is here to show what comes after the code.
"""
MARKDOWN = f"""# A heading

This is the *first* of the paragraphs, and it has the `name` of a [file](http://x/y) in it.

```
{SENTENCE.format("code")}
```

1. The second one is in a list, and it is what the reader should see after that.

{THIRD}
"""
INFO = f"""This is x.info, produced by makeinfo.

\x1f
File: x.info,  Node: This is the top of what is in the file,  Up: (dir)

{FIRST}

* Menu:

* One::   {SENTENCE.format("menu").replace(".", "")}

{SECOND} For more of this *note That: Other.

{THIRD}
"""
PAGE = f"""<page xmlns="http://projectmallard.org/1.0/"><info><desc>{SENTENCE.format("info")}</desc>
</info><p>{FIRST}</p><steps><item><p>{SECOND}</p></item></steps><p>{THIRD}</p></page>"""


@pytest.mark.parametrize(
    "name, content",
    [
        ("usr/share/doc/x/html/index.html", HTML),
        ("usr/share/doc/x/index.htm", HTML),
        ("usr/share/help/C/x/index.page", PAGE),
        ("usr/share/man/man3/x.3", MAN),
        ("x-1.0/docs/x.rst", RST),
        ("x-1.0/docs/x.md", MARKDOWN),
        ("x-1.0/docs/x.txt", f"{FIRST}\n\n{SECOND}\n\n{THIRD}"),
        ("usr/share/info/x.info-2", INFO),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_the_prose_of_each_format(name, content, is_compressed):
    data = content.encode()
    found = read_passages(*((f"{name}.gz", gzip.compress(data)) if is_compressed else (name, data)))
    plain = [" ".join(text.removeprefix("- ").removeprefix("1. ").split()) for text in found]
    want = [FIRST, SECOND, THIRD]
    if "man3" in name:
        want = [text.replace("first of", "first, of") for text in want]
        want[2] = THIRD.replace("is here", "is - here")
    if "info" in name:
        want[1] += " For more of this see That."
    assert [text.replace("first , of", "first, of") for text in plain] == want


@pytest.mark.parametrize(
    "name, content",
    [
        ("html/genindex.html", HTML),
        ("usr/share/doc/x/changelog.gz", gzip.compress(FIRST.encode(), mtime=0)),
        ("usr/share/doc/x/copyright", FIRST.encode()),
        ("html/_sources/index.txt", FIRST.encode()),
        ("usr/share/man/de/man3/x.3", MAN),
        ("usr/share/help/de/x/index.page", PAGE),
        ("doc/index.de.html", HTML),
        ("doc/index.html", HTML.replace('lang="en"', 'lang="de"')),
        ("usr/share/man/man3/mdoc.3", MDOC),
        ("doc/picture.png", FIRST.encode()),
        ("doc/broken.txt.gz", b"not gzip"),
        ("doc/german.txt", "Das ist der erste der Absätze, und darin steht der Name einer Datei."),
        ("doc/dump.txt", f"{FIRST}\n\n".encode() * 60_000),
    ],
)
def test_files_that_are_left_out(name, content):
    assert read_passages(name, content.encode() if isinstance(content, str) else content) == []


def test_other_encodings_are_read():
    assert read_passages("a.txt", FIRST.replace("name", "naïve").encode("latin-1")) == [
        FIRST.replace("name", "naïve")
    ]


def test_navigation_that_is_never_closed_does_not_swallow_the_page():
    page = f'<body><div class="sidebar"><div><a>Home</a></div><p>{FIRST}</p><p>{SECOND}</p></body>'
    assert read_passages("a.html", page.encode()) == [FIRST, SECOND]
