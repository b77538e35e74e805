"""Gathers clean English technical text from Debian's documentation packages, as training text for distillation.

    python benchmarks/debian_text.py --out debian.txt [--packages NAME ...] [--work DIR] [--without FILE ...]
    python benchmarks/debian_text.py --kind man --out man.txt --tail man-valid.txt

Downloads each package with `apt-get download` (one that lies in the work folder already is not fetched again), reads
its files without installing it, turns HTML, info, plain text, reST and Markdown files into plain text (with
`--kind man`: manual pages instead, through groff), drops what is no English prose (indexes, change logs, licences,
tables of symbols, other languages), drops paragraphs seen before, and writes the documents, parted by a blank line
and shuffled by a hash of their paths, to one UTF-8 file. No package gives more than a fifth of the text, unless that
would cost more than half of it. The script's own lists are those of Debian 12; packages that cannot be had are named
and skipped.

`--without FILE` keeps a validation text out: a paragraph that shares a run of 13 words with FILE, or holds one of
its lines of 80 characters or more, is dropped. `--tail FILE` puts the last documents (`--tail-chars` characters)
into a file of their own. Needs apt-get and dpkg-deb, for manual pages also groff. The Debian Administrator's
Handbook, from which this project's validation text comes, and the Python documentation, its older training text,
are refused. The text taken from each package is kept in the work folder, so that a second run is quick; `--fresh`
takes it anew.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import gzip
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

DOC_PACKAGES = """
debian-reference-en developers-reference debian-policy installation-guide-amd64 debmake-doc maint-guide
aptitude-doc-en debian-faq harden-doc debian-edu-doc-en freedombox-doc-en apt-doc doc-debian live-manual-html
postgresql-doc-15 apache2-doc git-doc perl-doc bash-doc vim-doc gimp-help-en libreoffice-help-en-us gnome-user-docs
bind9-doc python-django-doc python-sqlalchemy-doc sqlite3-doc cmake-doc gnu-standards abs-guide exim4-doc-html
postfix-doc shorewall-doc krb5-doc kea-doc borgbackup-doc wireshark-doc nova-doc linux-doc-6.1 neutron-doc cinder-doc
keystone-doc glance-doc swift-doc heat-doc icinga2-doc lemonldap-ng-doc openafs-doc dpdk-doc libvirt-doc haproxy-doc
varnish-doc rsyslog-doc proftpd-doc openvswitch-doc frr-doc pcp-doc slurm-wlm-doc nut-doc tomcat10-docs fwbuilder-doc
lava-server-doc mailutils-doc ntpsec-doc mh-book rt5-doc-html user-mode-linux-doc debian-history systemtap-doc
erlang-doc racket-doc octave-doc r-doc-html maxima-doc gnuplot-doc graphviz-doc ghostscript-doc imagemagick-6-doc
png-definitive-guide asymptote-doc c++-annotations-html libboost1.81-doc rust-doc llvm-16-doc clang-16-doc
mit-scheme-doc sbcl-doc guile-3.0-doc swig4.0-doc scons-doc ant-doc autoconf-doc zsh-doc gnutls-doc doxygen-doc
sphinx-doc docutils-doc nodejs-doc twisted-doc python-pytest-doc python-celery-doc python-scrapy-doc
python-djangorestframework-doc buildbot-doc postgis-doc weechat-doc
"""
MAN_PACKAGES = """
manpages manpages-dev systemd util-linux coreutils openssl git-man iproute2 e2fsprogs lvm2 mdadm openssh-client
openssh-server gpg dpkg dpkg-dev apt rsync curl samba samba-common-bin libssl-doc freebsd-manpages
"""
REFUSED = re.compile(r"debian-handbook|python3(\.\d+)?-doc$")
SHARE = 0.2  # the largest part of the text that one package may give

SKIPPED_DIRS = """
_sources _static _modules _downloads _images man examples src tests locale licenses javadoc debian-handbook search
htmlhelp singlehtml fonts icons class-use package-use
"""
LANGUAGES = """
ar ast bg bn bs ca cs da de dsb el eo es et eu fa fi fr ga gl he hi hr hsb hu id is it ja ja.utf8 kk km kn ko ko.euc-kr
lt lv mk ml mr nb ne nl nn no pa pl pt pt_br pt-br pt_pt ro ru sk sl sq sr sv ta te th tr tr.utf8 ug uk vi zh zh_cn
zh-cn zh_tw zh-tw
"""
SKIPPED_FOLDERS = frozenset((SKIPPED_DIRS + LANGUAGES).split())
SKIPPED_NAMES = re.compile(
    r"^(changelog|changes|news|copyright|copying|license|licence|authors|contributors|thanks|credits|todo|genindex.*|"
    r"py-modindex|modindex|search|searchresults|all-?classes.*|allpackages.*|annotated|hierarchy|functions.*|globals.*|"
    r"classes|files|namespaces|namespacemembers.*|deprecated-list|overview-tree|package-tree|constant-values|"
    r"serialized-form|index-\d+|index-all|help-doc|doxygen_crawl|gpl.*|fdl.*|bookindex|theindex|keyword-index|"
    r"list-of-.*|perl\d*delta|perlhist|perltodo|.*[._][1-8][a-z]*|.*\.man|"
    r".*[-_.](index|changelog|releasenotes|history|source|members|cpp|h)|history|whatsnew|releases?[-_]notes?)$",
    re.IGNORECASE,
)
SKIPPED_PATHS = re.compile(
    r"/(releases?|changelogs?|whats_?new|rel(ease)?[-_]?notes|news|search)/|changelog|/release-\d", re.IGNORECASE
)

TAGS_WITHOUT_PROSE = """
script style nav header footer head noscript svg select button form template textarea iframe info object annotation
annotation-xml audio video canvas
"""
DROPPED_TAGS = frozenset(TAGS_WITHOUT_PROSE.split())
CLASSES_OF_LINKS = """
sphinxsidebar related headerlink footer toctree-wrapper toc contents topic-contents navheader navfooter navpath tabs
nav-panel navbar nav menu menubar copiable-anchor copiable-link sidebar src-link srclink nav-chapters nav-wrapper
menu-bar linenos lineno lineNumber rst-versions breadcrumbs breadcrumb wy-nav-side indextable genindex-jumpbox
prevnext prev next previous sr-only visually-hidden skip-link toplang bottomlang up comments_section navigation
viewcode-link shortcontents legend legalnotice copyright navsetbox navset nav-links page-nav bottom_nav footnav
headnav indexdiv TOC tocref navigate navrow trail trails
"""
DROPPED_CLASSES = frozenset(CLASSES_OF_LINKS.split())
IDS_OF_LINKS = """
toc TOC sidebar footer navigation nav quickview langs path page-header side-nav Table_of_Contents SEC_Contents
SEC_Overview searchbox MSearchBox top nav-path navrow1
"""
DROPPED_IDS = frozenset(IDS_OF_LINKS.split())
KEPT_CLASSES = {"document", "body", "content", "main", "chapter", "section"}
SIDEBAR = re.compile(r"^(?!.*(with|no|has|content)).*(sidebar|breadcrumb|navbar)", re.IGNORECASE)
VOID_TAGS = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SINGLE_BREAK = {"li", "tr", "dt", "dd", "div", "br", "title", "summary", "thead", "tbody", "address"}
PARAGRAPH_TAGS = """
p h1 h2 h3 h4 h5 h6 pre ul ol dl table blockquote section article figure figcaption caption details hr main aside body
center
"""
DOUBLE_BREAK = frozenset(PARAGRAPH_TAGS.split())
COMMON_WORDS = "the of to and is in a for that this it be are with as on or by if an you not can from at"
PROSE_WORDS = frozenset(COMMON_WORDS.split())


class HtmlText(HTMLParser):
    """Collects the text of an HTML page: a blank line between paragraphs, preformatted text with its line breaks."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.pre = 0
        self.dropping = ""
        self.depth = 0
        self.newlines = 2  # line breaks at the end of what is written so far
        self.space = False  # a space stands between the last word and the next

    def break_line(self, count: int) -> None:
        """Ends the line, or with a count of 2 the paragraph, unless that is done."""
        if self.parts and self.parts[-1] in ("- ", ": "):
            return
        if self.newlines < count:
            self.parts.append("\n" * (count - self.newlines))
            self.newlines = count
        self.space = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Breaks the line as the element asks, or begins to drop its text."""
        if self.dropping:
            if tag == self.dropping:
                self.depth += 1
            return
        if tag not in VOID_TAGS and tag != "p":
            drop = tag in DROPPED_TAGS
            for key, value in attrs:
                if key == "class" and value and tag not in ("body", "html", "main"):
                    names = value.split()
                    if KEPT_CLASSES.isdisjoint(names):
                        drop = drop or not DROPPED_CLASSES.isdisjoint(names) or bool(SIDEBAR.search(value))
                elif key == "id" and value and tag not in ("body", "html", "main", "a", "h1"):
                    drop = drop or value in DROPPED_IDS or bool(SIDEBAR.search(value))
            if drop:
                self.dropping, self.depth = tag, 1
                return
        if tag == "pre":
            self.break_line(2)
            self.pre += 1
        elif tag in ("li", "item"):
            self.break_line(1)
            self.parts.append("- ")
            self.newlines = 0
        elif tag == "dd" and self.parts and self.parts[-1] == "\n" and self.parts[-2].endswith(":"):
            self.parts[-2:] = [self.parts[-2][:-1], ": "]
            self.newlines = 0
        elif tag == "br" and self.pre:
            self.parts.append("\n")
        else:
            self.break_as_asked(tag)

    def break_as_asked(self, tag: str) -> None:
        """Breaks the line, or sets cells apart, as an element does at both its ends."""
        if tag in SINGLE_BREAK:
            self.break_line(1)
        elif tag in DOUBLE_BREAK:
            self.break_line(2)
        elif tag in ("td", "th"):
            self.space = True

    def handle_endtag(self, tag: str) -> None:
        """Breaks the line as the element asks, or ends the dropping."""
        if self.dropping:
            if tag == self.dropping:
                self.depth -= 1
                if not self.depth:
                    self.dropping = ""
            return
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
            self.break_line(2)
        else:
            self.break_as_asked(tag)

    def handle_data(self, data: str) -> None:
        """Adds text, its white space made plain outside preformatted text."""
        if self.dropping:
            return
        if self.pre:
            if data:
                if self.newlines >= 2:
                    data = data.lstrip("\n")
                self.parts.append(data)
                self.newlines = 0
            return
        words = data.split()
        if not words:
            self.space = self.space or bool(data)
            return
        lead = self.newlines == 0 and (self.space or data[0].isspace()) and self.parts[-1] not in ("- ", ": ")
        self.parts.append((" " if lead else "") + " ".join(words))
        self.newlines = 0
        self.space = data[-1].isspace()


def html_text(source: str) -> str:
    """The text of an HTML page."""
    parser = HtmlText()
    parser.feed(source)
    parser.close()
    text = clean("".join(parser.parts))
    if text.startswith("Vim documentation:"):  # the tags of Vim's help
        text = re.sub(r"[ \n]*\*[^\s*]+\*", "", re.sub(r"\|([^\s|]+)\|", r"\1", text[18:]))
    return unwrap(clean(text))


def pod_text(source: str) -> str:
    """Perl's POD without its markup."""
    source = "\n=pod\n" + source if not source.startswith("=") else "\n" + source
    source = re.sub(r"(?s)\n=(begin|for)\b.*?\n(=end[^\n]*|\n)", "\n", source)
    source = re.sub(r"\n=(pod|cut|over|back|encoding|end)\b[^\n]*", "\n", source)
    source = re.sub(r"\n=item \*\s*", "\n- ", source)
    source = re.sub(r"\n=(head\d|item) ", "\n", source)
    for _ in range(4):
        source = re.sub(r"\b[XZ]<[^<>]*>", "", source)
        source = re.sub(r"\bE<(\w+)>", lambda found: {"lt": "\x01", "gt": "\x02"}.get(found[1], found[0][2:-1]), source)
        source = re.sub(r"\bL<([^<>|]*)\|[^<>]*>", r"\1", source)
        source = re.sub(r"\bL</\"?([^<>\"]*)\"?>", r"\1", source)
        source = re.sub(r"\b[BCFILS]<<+ (.*?) >>+", lambda found: found[1].translate({60: 1, 62: 2}), source)
        source = re.sub(r"\b[BCFILS]<([^<>]*)>", r"\1", source)
    return unwrap(clean(source.replace("\x01", "<").replace("\x02", ">")))


def plain_text(source: str) -> str:
    """Plain text, with the inline markup of reST and AsciiDoc taken off."""
    source = re.sub(r":[a-z][\w:.+-]*:`[~!]?([^`<]*?)(\s*<[^`>]*>)?`", r"\1", source)
    source = re.sub(r"(?m)^\.\. (_.*:.*|index::.*|contents::.*|toctree::.*|highlight:: .*|module.*::.*)$", "", source)
    source = re.sub(r"``([^`\n]+)``", r"\1", source)
    return unwrap(clean(re.sub(r"`([^`<\n]+?)\s*<[^`>\n]*>`_+", r"\1", source)))


BULLET = re.compile(r"\s*([-*+o•]|\d+[.)]|[a-z][.)])\s")


def unwrap(text: str) -> str:
    """Joins the lines of a paragraph that was wrapped at a fixed width; leaves code and tables as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.rstrip().split("\n")
        items: list[list[str]] = []
        for line in lines:
            if not items or BULLET.match(line):
                items.append([line])
            else:
                items[-1].append(line)
        joined = []
        for item in items:
            indents = {len(line) - len(line.lstrip()) for line in item[1:]}
            letters = sum(c.isalpha() or c == " " for line in item for c in line.strip())
            total = sum(len(line.strip()) for line in item)
            wide = all(len(line) >= 48 for line in item[:-1])
            gaps = sum(line.strip().count("   ") for line in item)
            if len(item) > 1 and len(indents) == 1 and wide and letters > 0.85 * total and gaps <= len(item) / 3:
                indent = item[0][: len(item[0]) - len(item[0].lstrip())]
                joined.append(indent + " ".join(" ".join(item).split()))
            else:
                joined.extend(item)
        blocks.append("\n".join(joined))
    return "\n\n".join(blocks)


def info_text(source: str) -> str:
    """The nodes of an info file without their header lines, menus, indexes and tag tables."""
    kept = []
    for node in source.split("\x1f")[1:]:
        header, _, body = node.lstrip("\n").partition("\n")
        if not header.startswith("File:") or re.search(r"Node: [^,]*(Index|Copying|License)", header, re.IGNORECASE):
            continue
        body = body.split("\n* Menu:")[0]
        kept.append(unwrap(re.sub(r"\x00\x08\[.*?\x00\x08\]", "", body, flags=re.DOTALL)))
    return "\n\n".join(kept)


def man_text(source: bytes) -> str:
    """A manual page through groff, on lines too wide to be wrapped, without its heading and foot."""
    if source.lstrip().startswith(b".so "):
        return ""
    command = ["groff", "-K", "utf8", "-t", "-e", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=3000n", "-rHY=0", "-dAD=l"]
    done = subprocess.run(command, input=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = done.stdout.decode("utf-8", "replace").replace("\u2010", "-").replace("\u2212", "-").rstrip().split("\n")
    kept = []
    for line in lines[1:-1]:
        if len(line) > 200 and sum(c.isalnum() for c in line) < 0.2 * len(line.strip()):
            continue
        line = line[7:] if line.startswith("       ") else line.strip() if line.startswith("   ") else line
        indent = len(line) - len(line.lstrip())
        kept.append(line[:indent] + re.sub(r" {12,}", "    ", line[indent:]))
    return "\n".join(kept)


NAVIGATION = re.compile(
    r"(?m)^(.*\b(Next|Previous|Prev|Up): .*\b(Next|Previous|Prev|Up): .*|.*Return to Main Contents.*|Content-type:.*)$"
)

LINKS = re.compile(
    r"((next|previous|prev|up|top|home|index|contents|back|return|table of)\b|[^\w`$#{}()\[\]/;=])*", re.IGNORECASE
)


def clean(text: str) -> str:
    """White space made plain: no trailing spaces, at most one blank line in a row, no control characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4).replace("\u00b6", "")
    text = re.sub(r"[\u00a0\u2000-\u200a\u202f]", " ", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u00ad\ufeff\ufffd]", "", text)
    text = re.sub(r"[ \f\v]+\n", "\n", text)
    text = re.sub(r"(?m)^- *\n", "", text)
    text = NAVIGATION.sub("", text)
    text = re.sub(r"(?m)^(- .{1,60}[^.:;,!?]\n){5,}(?=\n|\Z)", "", text + "\n")  # tables of contents
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def wanted(path: str, kind: str) -> str:
    """The sort of file: "html", "text", "pod", "info", "man", or "" for one not wanted."""
    name = path.rsplit("/", 1)[-1]
    plain = name[:-3] if name.endswith(".gz") else name
    if kind == "man":
        return "man" if re.fullmatch(r"usr/share/man/man[1-8]/[^/]+\.[1-8][a-z]*", path.removesuffix(".gz")) else ""
    folders = {folder.lower() for folder in path.split("/")[:-1]}
    if folders & SKIPPED_FOLDERS:
        return ""
    stem = stem_of(path)
    if SKIPPED_NAMES.match(stem) or SKIPPED_PATHS.search(path):
        return ""
    if re.search(r"\.x?html?(\.en)?$", plain, re.IGNORECASE) or ("/help/C/" in path and plain.endswith(".page")):
        return "html"
    if re.search(r"\.info(-\d+)?$", plain):
        return "info"
    if plain.endswith(".pod"):
        return "pod"
    if re.search(r"\.(txt|rst|md|text)$", plain, re.IGNORECASE) or plain.startswith("README"):
        return "text"
    return ""


def english(text: str, loose: bool = False) -> bool:
    """Whether a document is mostly English sentences, rather than code, tables, indexes or another language."""
    if len(text) < 500:
        return False
    least, share, articles = (0.1, 0.3, 0.0) if loose else (0.16, 0.45, 0.01)
    sample = text if len(text) < 60000 else text[:20000] + text[len(text) // 2 :][:20000] + text[-20000:]
    solid = "".join(sample.split())
    letters = sum(c.isalpha() for c in solid)
    strange = sum(not c.isascii() for c in solid)
    if letters < 0.62 * len(solid) or strange > 0.05 * len(solid):
        return False
    words = re.findall(r"[A-Za-z']+", sample.lower())
    if sum(word in PROSE_WORDS for word in words) < least * len(words) or words.count("the") < articles * len(words):
        return False
    lines = [line for line in sample.split("\n") if line.strip()]
    prose = sum(len(line) for line in lines if len(line.split()) >= 8)
    return prose >= share * sum(map(len, lines))


def to_text(data: bytes, sort: str) -> str:
    """The text of a file of that sort."""
    if sort == "man":
        return clean(man_text(data))
    source = data.decode("utf-8", "replace")
    if source.count("\ufffd") > 3:
        source = data.decode("latin-1")
    if sort == "html":
        return html_text(source)
    if sort == "info":
        return clean(info_text(source))
    return pod_text(source) if sort == "pod" else plain_text(source)


def fetch(package: str, work: pathlib.Path) -> pathlib.Path | None:
    """The package's file, downloaded unless it is in the work folder already; None if it cannot be had."""
    found = sorted(work.glob(f"{package}_*.deb"))
    if not found:
        done = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
        found = sorted(work.glob(f"{package}_*.deb"))
        if not found:
            print(f"{package}: cannot be had: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return None
    return found[-1]


def stem_of(path: str) -> str:
    """The name of a file without its folder and its endings."""
    return re.sub(r"(\.(html?|xhtml|txt|rst|md|info|pod|page|en|utf-?8|gz))+$", "", path.rsplit("/", 1)[-1], flags=re.I)


def read_package(deb: pathlib.Path, kind: str) -> list[tuple[str, str]]:
    """(path, text) of each document in a package's file, sorted; of one text in two formats only the HTML."""
    documents: list[tuple[str, str, str]] = []
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacker,
        tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            sort = wanted(path, kind) if member.isfile() and member.size < 20_000_000 else ""
            if not sort:
                continue
            handle = archive.extractfile(member)
            data = handle.read() if handle else b""
            if path.endswith(".gz"):
                try:
                    data = gzip.decompress(data)
                except (OSError, EOFError, zlib.error) as error:
                    print(f"{deb.name}: {path} is damaged and left out ({error})")
                    continue
            text = to_text(data, sort)
            if english(text, kind == "man"):
                documents.append((path, text, sort))
    if unpacker.returncode:
        sys.exit(f"{deb} is damaged: dpkg-deb ended with {unpacker.returncode}; delete it, and it is fetched again")
    stems = {stem_of(path) for path, _, sort in documents if sort == "html"}
    html = sum(len(text) for _, text, sort in documents if sort == "html")
    info = sum(len(text) for _, text, sort in documents if sort == "info")
    kept = [
        (path, text)
        for path, text, sort in documents
        if sort in ("html", "man") or (stem_of(path) not in stems and (sort != "info" or info > html))
    ]
    return sorted(without_furniture(kept) if kind == "doc" else kept)


def without_furniture(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drops the short paragraphs that a third of a package's documents have, such as links to the next page."""
    counts = collections.Counter(part for _, text in documents for part in set(text.split("\n\n")) if len(part) < 60)
    common = {part for part, count in counts.items() if count >= max(6, len(documents) / 3)}
    return [(path, "\n\n".join(p for p in text.split("\n\n") if p not in common)) for path, text in documents]


def package_documents(deb: pathlib.Path, kind: str, fresh: bool) -> list[tuple[str, str]]:
    """read_package, or what it gave in an earlier run."""
    kept = deb.with_name(f"{deb.stem}.{kind}.jsonl")
    if fresh or not kept.exists():
        documents = read_package(deb, kind)
        part = kept.with_suffix(".part")
        part.write_text("".join(json.dumps(item) + "\n" for item in documents), encoding="utf-8")
        part.rename(kept)
    with kept.open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    return [(path, text) for path, text in documents if wanted(path, kind)]


def digest(text: str) -> bytes:
    """A short hash."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def without_repeats(documents: Iterable[tuple[str, str]], seen: set[bytes], loose: bool) -> Iterator[tuple[str, str]]:
    """Drops paragraphs of 40 characters or more seen before, and documents that lose half of their text so."""
    for path, text in documents:
        fresh: set[bytes] = set()
        kept = []
        plain = ""
        for paragraph in text.split("\n\n"):
            plain, before = " ".join(paragraph.split()), plain
            if plain == before or LINKS.fullmatch(plain):
                continue
            if len(plain) >= 40:
                key = digest(plain)
                if key in seen or key in fresh:
                    continue
                fresh.add(key)
            elif not any(c.isalnum() for c in plain):
                continue
            kept.append(paragraph)
        result = "\n\n".join(kept)
        if len(result) >= 0.5 * len(text) and english(result, loose):
            seen |= fresh
            yield path, result


class Withheld:
    """A text that must stay out of what is gathered: finds paragraphs that share words with it."""

    RUN = 13

    def __init__(self, names: list[str]) -> None:
        self.lines: list[tuple[str, str]] = []  # (name of the file, line)
        self.runs: dict[str, list[int]] = {}
        for name in names:
            source = pathlib.Path(name).read_text(encoding="utf-8")
            self.runs.update((run, []) for run in self.runs_of(source))  # runs across lines too
            lines = {" ".join(line.split()) for line in source.split("\n")}
            self.lines += [(name, line) for line in sorted(lines) if len(line) >= 80]
        for number, (_, line) in enumerate(self.lines):
            for run in self.runs_of(line):
                self.runs.setdefault(run, []).append(number)
        self.short = {line: number for number, (_, line) in enumerate(self.lines) if len(self.words(line)) < self.RUN}
        self.found: set[int] = set()
        self.dropped = 0

    @staticmethod
    def words(text: str) -> list[str]:
        """The words of a text in lower case."""
        return re.findall(r"\w+", text.lower())

    def runs_of(self, text: str) -> Iterator[str]:
        """Each run of RUN words."""
        words = self.words(text)
        for start in range(len(words) - self.RUN + 1):
            yield " ".join(words[start : start + self.RUN])

    def shares(self, paragraph: str) -> bool:
        """Whether the paragraph shares a run of words with the text; notes the lines that it holds verbatim."""
        if not self.runs:
            return False
        hits = {run for run in self.runs_of(paragraph) if run in self.runs}
        plain = " ".join(paragraph.split())
        numbers = {number for run in hits for number in self.runs[run]}
        found = {number for number in numbers if self.lines[number][1] in plain}
        if self.short:
            lines = {plain, *(" ".join(line.split()) for line in paragraph.split("\n"))}
            found |= {self.short[line] for line in lines & self.short.keys()}
        if not hits and not found:
            return False
        self.found |= found
        self.dropped += 1
        return True

    def strip(self, documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The documents without the paragraphs that share words with the text; none shorter than 500 characters."""
        kept = []
        for path, text in documents:
            text = "\n\n".join(part for part in text.split("\n\n") if not self.shares(part))
            if len(text) >= 500:
                kept.append((path, text))
        return kept

    def report(self) -> None:
        """Prints what was found and dropped."""
        for name in sorted({name for name, _ in self.lines}):
            numbers = {number for number, (other, _) in enumerate(self.lines) if other == name}
            print(f"{name}: {len(numbers):,} lines of 80 characters or more, {len(numbers & self.found):,} were in the text")
        print(f"{self.dropped:,} paragraphs dropped for a run of {self.RUN} words or a line in common")


def capped(sizes: dict[str, int]) -> int:
    """The most characters that a package may give, so that none gives more than SHARE of the whole."""
    found = [size for size in sizes.values() if size]
    limit = whole = sum(found)
    for _ in range(50):
        limit = int(SHARE * sum(min(size, limit) for size in found))
    return limit if sum(min(size, limit) for size in found) >= whole / 2 else whole


def gather(args: argparse.Namespace) -> None:
    """Does what the command line asks."""
    work = pathlib.Path(args.work)
    tools = ["apt-get", "dpkg-deb", *(["groff"] if args.kind == "man" else [])]
    if missing := [name for name in tools if shutil.which(name) is None]:
        sys.exit(f"{', '.join(missing)} cannot be found; this needs a Debian system, and for manual pages its package groff")
    for name in (args.out, *([args.tail] if args.tail else [])):
        if not pathlib.Path(name).absolute().parent.is_dir():
            sys.exit(f"the folder of {name} does not exist")
    work.mkdir(parents=True, exist_ok=True)
    packages = args.packages or (MAN_PACKAGES if args.kind == "man" else DOC_PACKAGES).split()
    refused = [name for name in packages if REFUSED.match(name)]
    if refused:
        sys.exit(f"refused, held back for validation or trained on already: {', '.join(refused)}")
    debs = {name: deb for name in packages if (deb := fetch(name, work))}
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        jobs = {name: pool.submit(package_documents, deb, args.kind, args.fresh) for name, deb in debs.items()}
        withheld = Withheld(args.without)
        seen: set[bytes] = set()
        kept: dict[str, list[tuple[str, str]]] = {}
        for name in debs:
            documents = list(without_repeats(jobs.pop(name).result(), seen, args.kind == "man"))
            documents = withheld.strip(documents)
            kept[name] = sorted(documents, key=lambda item: digest(item[0]))
            size = sum(len(text) for _, text in kept[name])
            print(f"{debs[name].stem}: {len(kept[name])} documents, {size:,} characters", flush=True)
    limit = capped({name: sum(len(text) for _, text in documents) for name, documents in kept.items()})
    if args.max_package:
        limit = min(limit, args.max_package)
    chosen: list[tuple[str, str]] = []
    for name, documents in kept.items():
        room = limit
        for path, text in documents:
            if len(text) <= room:
                room -= len(text)
                chosen.append((path, text))
        taken = limit - room
        if taken < sum(len(text) for _, text in documents):
            print(f"{name}: cut to {taken:,} characters")
    chosen.sort(key=lambda item: digest(item[0]))
    if args.tail:
        tail: list[tuple[str, str]] = []
        while chosen and sum(len(text) for _, text in tail) < args.tail_chars:
            tail.insert(0, chosen.pop())
        write(args.tail, tail)
        chosen = Withheld([args.tail]).strip(chosen)
    write(args.out, chosen)
    withheld.report()


def write(name: str, documents: list[tuple[str, str]]) -> None:
    """Writes documents to a file."""
    with open(name, "w", encoding="utf-8") as out:
        for _, text in documents:
            out.write(text + "\n\n")
    print(f"{name}: {len(documents):,} documents, {sum(len(text) + 2 for _, text in documents):,} characters")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the text file to write")
    parser.add_argument("--kind", choices=("doc", "man"), default="doc", help="documentation (default) or manual pages")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="Debian packages instead of the script's own list")
    parser.add_argument("--work", default="debian-work", metavar="DIR", help="folder for downloads and taken text")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE", help="texts whose paragraphs must stay out")
    parser.add_argument("--tail", metavar="FILE", help="write the last documents to a file of their own")
    parser.add_argument("--tail-chars", type=int, default=400_000, metavar="N", help="characters in --tail")
    parser.add_argument("--max-package", type=int, metavar="N", help="at most N characters from one package")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="packages read at once")
    parser.add_argument("--fresh", action="store_true", help="take the text from the packages anew")
    gather(parser.parse_args())


if __name__ == "__main__":
    main()
