"""Read the prose of a documentation file: HTML, a man page, Info, reStructuredText or Markdown.

Only the standard library is used, so the result does not depend on the machine's tools. Headings,
code, tables, signatures and navigation are left out: see `is_prose`.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import PurePosixPath

from lingua.prepare.prose import is_prose, passages

MAX_FILE = 4 * 10**6  # bytes; larger files are indices and dumps
# Files without prose, or with that of another file. The last two: pages in other languages.
SKIPPED = re.compile(
    r"(^|/)(changelog|changes|news|copyright|license|genindex|search|py-modindex|todo)[^/]*$"
    r"|/_?(sources|modules|static|examples?|tests?)/"
    r"|/man/(?!man)|/help/(?!C/|en)|\.(?!en\b)[a-z]{2}(_[A-Z]{2})?\.(html|txt)$",
    re.IGNORECASE,
)
HTML = {".html", ".htm", ".xhtml", ".page"}
TEXT = {".txt", ".rst", ".md", ".adoc"}


def reader_of(name: str) -> Callable[[str], list[str]] | None:
    """Return the function that reads a file of this name, None if it holds no prose."""
    path = PurePosixPath(name.removesuffix(".gz"))
    if SKIPPED.search(name):
        return None
    if path.suffix.lower() in HTML:
        return read_html
    if path.suffix.lower() in TEXT:
        return read_plain_markup
    if re.fullmatch(r"man\d", path.parent.name):
        return read_man_page
    return read_info if re.fullmatch(r"\.info(-\d+)?", path.suffix) else None


def read_passages(name: str, content: bytes) -> list[str]:
    """Return the prose of a file by paragraphs, [] if it has none or cannot be read."""
    reader = reader_of(name)
    if reader is None:
        return []
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return []
    if len(content) > MAX_FILE:
        return []
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return reader(text)


# ---- HTML, and the XML of GNOME's help

BLOCK_NAMES = (
    "article blockquote body caption center dd desc details div dl dt fieldset figcaption "
    "figure h1 h2 h3 h4 h5 h6 hr item li listing main note ol p section steps summary table "
    "tbody td th thead title tr ul"
)
BLOCKS = frozenset(BLOCK_NAMES.split())
NO_TEXT_NAMES = (
    "aside button code-block footer form head header info math nav noscript pre screen script "
    "select style svg template textarea"
)
NO_TEXT = frozenset(NO_TEXT_NAMES.split())
DROPPED = re.compile(r"<!--.*?-->|<(script|style|pre|svg|nav)\b.*?</\1\s*>", re.DOTALL | re.I)
CONTAINERS = {"a", "div", "dl", "ol", "p", "section", "span", "table", "ul"}
NAVIGATION_NAMES = (
    "breadcrumb breadcrumbs footer headerlink highlight nav navbar navfooter navheader navigation "
    "navpath programlisting related screen sidebar sphinxsidebar toc"
)
NAVIGATION = frozenset(NAVIGATION_NAMES.split())


class _Blocks(HTMLParser):
    """Collects the text of each block-level element outside code and navigation."""

    def __init__(self, navigation: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.navigation = navigation
        self.blocks: list[str] = []
        self.parts: list[str] = []
        self.skipped, self.depth = "", 0  # the element that is left out, and how often it is nested

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            self.depth += tag == self.skipped
            return
        names = {name for key, value in attrs if key in ("class", "role", "id") and value
                 for name in value.split()}  # fmt: skip
        if tag in NO_TEXT or (tag in CONTAINERS and names & self.navigation):
            self.skipped, self.depth = tag, 1
        if tag in BLOCKS:
            self.end_block()
        elif tag == "br":
            self.parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.depth -= tag == self.skipped
            if self.depth == 0:
                self.skipped = ""
        elif tag in BLOCKS:
            self.end_block()

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)

    def end_block(self) -> None:
        self.blocks.append(" ".join("".join(self.parts).split()))
        self.parts = []


def read_html(text: str) -> list[str]:
    language = re.search(r"<html[^>]*\blang=[\"']?(\w\w)", text[:2000])
    if language and language[1].lower() != "en":
        return []
    text = DROPPED.sub(" ", text)
    for navigation in (NAVIGATION, frozenset()):
        parser = _Blocks(navigation)
        parser.feed(text)
        parser.close()
        if not parser.skipped:  # else an element that is never closed may hold all of the page
            break
    parser.end_block()
    return list(filter(is_prose, parser.blocks))


# ---- man pages

ROFF_SKIPPED = re.compile(
    r"^[.'](?:(nf|TS|EQ|EX|Vb|PS|de|ig)\b.*?^[.'](?:fi|TE|EN|EE|Ve|PE|\.)|\\\".*?$)",
    re.DOTALL | re.MULTILINE,
)
ROFF_CHARACTERS = {
    "em": "-", "en": "-", "hy": "-", "aq": "'", "oq": "'", "cq": "'", "lq": '"', "rq": '"',
    "dq": '"', "C`": "", "C'": "", "bu": "*", "co": "(c)", "R": "", "ga": "`", "ha": "^",
    "ti": "~", "rs": "\\", "Tm": "", "L": '"',
}  # fmt: skip
ROFF_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[-+]?\d+|[*]?(?:\[([^\]]+)\]|\((..))|\*(.)|([-e~0 ])|.)"
)
FONTS = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB"}
ROFF_BLOCKS = {"PP", "P", "LP", "TP", "IP", "HP", "SH", "SS", "RS", "RE", "sp", "TQ", "fi", "Sp"}
ARGUMENT = re.compile(r'"([^"]*)"?|(\S+)')


def read_man_page(text: str) -> list[str]:
    """Read a page of the macros `man`; skip pages of BSD's macros (`mdoc`)."""
    if re.search(r"^\.Dd ", text, re.MULTILINE):
        return []
    lines: list[str] = []
    was_tag = False
    for line in ROFF_SKIPPED.sub("", text).splitlines():
        is_tag, macro = was_tag, re.match(r"[.'][ \t]*(\w*)\s*(.*)", line)
        was_tag = bool(macro) and macro[1] in ("TP", "TQ")
        if macro and macro[1] in FONTS:
            words = [quoted or word for quoted, word in ARGUMENT.findall(macro[2])]
            line = ("" if len(macro[1]) == 2 and macro[1][0] != "S" else " ").join(words)
        elif macro:
            if macro[1] in ROFF_BLOCKS:
                lines.append("")
            continue
        lines.append(ROFF_ESCAPE.sub(_roff_character, line).strip())
        if is_tag:  # the label of a paragraph
            lines.append("")
    return list(passages("\n".join(lines)))


def _roff_character(match: re.Match[str]) -> str:
    name = match[1] or match[2] or match[3]
    if name:
        return ROFF_CHARACTERS.get(name, "")
    return {"-": "-", "e": "\\", "~": " ", "0": " ", " ": " "}.get(match[4] or "", "")


# ---- plain text with markup


def read_info(text: str) -> list[str]:
    text = re.sub(r"\A[^\x1f]*(?=\x1f)|\x1f.*?\n.*?\n", "\n\n", text)  # headers: of file, of nodes
    text = re.sub(r"\*[Nn]ote\s+([^:]+):(?::|[^.,]*)", r"see \1", text)
    return list(passages(re.sub(r"[‘’]", "'", text)))


def read_plain_markup(text: str) -> list[str]:
    """Read reStructuredText, Markdown or plain text."""
    text = re.sub(r"^```.*?^```|^\.\. .*?$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r":[\w:+-]+:`", "`", text)  # the role of :class:`Model`
    text = re.sub(r"`~?([^`<]+?)\s*<[^`>]*>`_*|!?\[([^\]]*)\]\([^)]*\)", r"\1\2", text)
    text = re.sub(r"`+([^`]+)`+_*|\*\*?(\w[^*\n]*)\*\*?", r"\1\2", text)
    return list(passages(re.sub(r"::$", ":", text, flags=re.MULTILINE)))
