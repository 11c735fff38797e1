"""What the demo model learns: the project's documentation as text and as questions.

Pure text work, without torch, so that it can be tested. Markdown files and the
docstrings of Python modules become *documents* (running text) and *topics*
(something a user may ask about, with the answer).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_ANSWER_LEN = 420
"""Characters of prose in an answer; a command that follows may come on top."""


@dataclass(frozen=True)
class Topic:
    """Something to ask about, and the documentation's answer."""

    name: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Documents and topics, in a fixed order."""

    documents: tuple[str, ...]
    topics: tuple[Topic, ...]


def read_corpus(root: Path, extra: Iterable[Path] = ()) -> Corpus:
    """Read README, CHANGELOG, ``docs/`` and the docstrings of ``vllm_pd``.

    Args:
        root: the repository.
        extra: further Markdown files.
    """
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "CHANGELOG.md"]
    parts = [parse_markdown(page.read_text()) for page in [*pages, *extra] if page.is_file()]
    modules = [
        parse_python(
            path.read_text(),
            _module_name(path.relative_to(root)),
            has_settings=path.stem == "config",
        )
        for path in sorted((root / "vllm_pd").rglob("*.py"))
    ]
    # One document: many modules say one sentence, and text that ends there is a poor lesson.
    reference = "\n\n".join(text for module in modules for text in module.documents)
    return Corpus(
        documents=tuple(
            text
            for text in (*(page for part in parts for page in part.documents), reference)
            if text
        ),
        topics=tuple(topic for part in (*parts, *modules) for topic in part.topics),
    )


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


# --- Markdown --------------------------------------------------------------------------------


def parse_markdown(text: str) -> Corpus:
    """Split a page at its headings.

    The document is the page with paragraphs on one line each and tables as lines
    of prose. Topics are the headings, and the rows of tables that start with code.
    """
    blocks = list(_blocks(text))
    topics: list[Topic] = []
    for i, block in enumerate(blocks):
        if block.startswith("#"):
            name = re.sub(r"^#+\s*(\d+(\.\d+)*\.?\s+)?", "", block).replace("`", "")
            section = _until_heading(blocks[i + 1 :])
            if answer := make_answer(section):
                topics.append(Topic(name, answer))
        elif not block.startswith("```"):
            topics.extend(_row_topics(block))
    return Corpus(("\n\n".join(blocks),) if blocks else (), tuple(topics))


def _until_heading(blocks: list[str]) -> list[str]:
    for i, block in enumerate(blocks):
        if block.startswith("#"):
            return blocks[:i]
    return blocks


def _blocks(text: str) -> Iterator[str]:
    """Yield headings, paragraphs, lists, tables and code blocks, cleaned up."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for piece in re.split(r"(^```.*?^```[ \t]*$)", text, flags=re.DOTALL | re.MULTILINE):
        if piece.startswith("```"):
            yield piece.rstrip()
            continue
        # A heading is a block of its own, also without blank lines around it.
        for block in re.split(r"\n\s*\n", re.sub(r"^(#+ .*)$", r"\n\1\n", piece, flags=re.M)):
            if cleaned := _clean_block(block.strip("\n")):
                yield cleaned


def _clean_block(block: str) -> str:
    block = re.sub(r"!\[[^]]*\]\([^)]*\)", "", block)
    block = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block).replace("**", "")
    block = re.sub(r"(?<=\S)[ \t]+", " ", block)
    if re.match(r"\s*\|", block):
        return "\n".join(_table_rows(block))
    lines: list[str] = []
    for line in block.splitlines():
        stripped = line.strip()
        if lines and not re.match(r"([-*+]|\d+\.)\s", stripped):
            lines[-1] = f"{lines[-1]} {stripped}".strip()
        else:
            lines.append(stripped)
    return "\n".join(lines).strip()


def _table_rows(block: str) -> Iterator[str]:
    """Yield "first: second; heading of the third: third; …" for each row of a table."""
    heads, *rows = [_cells(line) for line in block.splitlines()]
    for cells in rows:
        if all(re.fullmatch(r":?-*:?", cell) for cell in cells):
            continue
        named = [cell for cell in cells[1:2] if cell]
        named += [
            f"{head}: {cell}" for head, cell in zip(heads[2:], cells[2:], strict=False) if cell
        ]
        yield f"{cells[0]}: {'; '.join(named)}" if named else cells[0]


def _cells(row: str) -> list[str]:
    inner = row.strip().removeprefix("|").removesuffix("|")
    cells = re.split(r"(?<!\\)\|", inner)
    return [cell.strip().replace(r"\|", "|").removesuffix(".") for cell in cells]


def _row_topics(block: str) -> Iterator[Topic]:
    """Yield a topic for each line like "`name`: meaning", as tables of options become."""
    for line in block.splitlines():
        if match := re.match(r"(?:[-*] )?`([^`]+)`(?: \([^)]*\))?(?:: | - )(.{12,})", line):
            meaning = first_sentences(match[2])
            end = "" if meaning[-1] in ".!?" else "."
            yield Topic(match[1], f"`{match[1]}`: {meaning}{end}")


# --- Python ----------------------------------------------------------------------------------


def parse_python(source: str, module: str, *, has_settings: bool = False) -> Corpus:
    """Collect the docstrings of a module, its public classes and its commands.

    Commands are functions decorated with ``@….command()``. Docstrings of other
    functions are left out: they are written for readers of the code, and a model
    that has read mostly "Return the …" says little else.

    Args:
        source: the module's text.
        module: its dotted name.
        has_settings: whether ``Attributes:`` entries are settings that users ask about.
    """
    tree = ast.parse(source)
    paragraphs: list[str] = []
    topics: list[Topic] = []
    for name, node in _documented(tree, module):
        doc = _clean_docstring(ast.get_docstring(node, clean=False) or "")
        if not doc:
            continue
        prose, attributes = _split_sections(doc)
        paragraphs.append(f"`{name}`: {prose}")
        short = name.removeprefix(f"{module}.")
        if answer := make_answer(prose.split("\n\n")):
            topics.append(Topic(short, f"`{short}`: {answer}"))
        for key, meaning in attributes if has_settings else ():
            paragraphs.append(f"`{short}.{key}`: {meaning}")
            topics.append(Topic(key, f"`{key}` of `{short}`: {first_sentences(meaning)}"))
    return Corpus(("\n\n".join(paragraphs),) if paragraphs else (), tuple(topics))


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, _Documented]]:
    yield module, tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"{module}.{node.name}", node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            command = _command_name(node)
            if command and not command.startswith("vllm-pd _"):
                yield command, node


def _command_name(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    for decorator in node.decorator_list:
        if not isinstance(decorator, ast.Call) or not isinstance(decorator.func, ast.Attribute):
            continue
        if decorator.func.attr == "command":
            given = [str(arg.value) for arg in decorator.args if isinstance(arg, ast.Constant)]
            return f"vllm-pd {given[0] if given else node.name.replace('_', '-')}"
    return None


def _clean_docstring(doc: str) -> str:
    return inspect.cleandoc(doc).replace("``", "`")


def _split_sections(doc: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the prose of a docstring and the entries of its ``Attributes:`` section."""
    head, _, tail = doc.partition("\nAttributes:\n")
    prose = re.split(r"\n(?:Args|Returns|Raises|Yields):\n", head)[0]
    entries = re.split(r"\n {4}(?=\S)", "\n" + re.split(r"\n(?=\S)", tail)[0])
    matches = (re.match(r"(\w+): (.*)", entry, re.DOTALL) for entry in entries)
    attributes = [(match[1], " ".join(match[2].split())) for match in matches if match]
    return "\n\n".join(_blocks(prose)), attributes


# --- Answers ---------------------------------------------------------------------------------


def make_answer(blocks: Iterable[str]) -> str:
    """Return the first sentences of a section, with the command that follows, if any."""
    answer = ""
    for block in blocks:
        if block.startswith("```"):
            if len(block) <= MAX_ANSWER_LEN:
                answer = f"{answer}\n\n{block}".strip()
            break
        if answer:
            break
        answer = first_sentences(block)
    return answer


def first_sentences(text: str) -> str:
    """Return as many whole sentences or lines as fit in ``MAX_ANSWER_LEN``, at least one."""
    kept = ""
    for part in re.split(r"(?<=[.!?])(?= [A-Z`])|(?=\n)", text):
        if kept and len(kept) + len(part) > MAX_ANSWER_LEN:
            break
        kept += part
    return kept.strip()
