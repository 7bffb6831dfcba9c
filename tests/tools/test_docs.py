"""The documents: links lead somewhere, sentences are short, and quoted messages are those of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "RELEASING", "SECURITY")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(path):
    """Paragraphs, list items and table cells, without code and generated tables."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(
        r"<!-- (results|compile-report): .*?<!-- (end of results|compile-report: end) -->", "", text, flags=re.S
    )
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "code", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*[-|#]|\s*\d+\. )", text):
        if not block.startswith("    "):
            yield from (" ".join(cell.split()) for cell in block.split("|"))


@each_page
def test_sentences_are_short(path):
    sentences = [s for block in prose(path) for s in re.split(r"(?<=[.!?])[*)]* +", block)]
    long = [s for s in sentences if len(re.findall(r"[\w'-]+", s)) > 30]
    assert not long, long


@each_page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_messages_on_the_troubleshooting_page_are_those_of_the_code():
    sources = [
        p.read_text(encoding="utf-8") for p in [*(ROOT / "fused_lora").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # strings over several lines
    code = re.sub(r"\{[^{}]*\}", "...", code).replace("`", "").replace("'", "")
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        m for line in page.splitlines() if line.startswith("| `") for m in re.findall(r"`(.*?)`", line.split("|")[1])
    ]
    assert len(quoted) > 40
    for message in quoted:
        for part in re.split(r"\.\.\.|\bX\b|\bY\b|use_dora|FILE|KEY", message.replace("'", "")):
            part = part.strip(" ,:;[]")
            assert len(part) < 6 or part in code, f"{part!r} of {message!r}"


def test_every_variable_of_the_environment_is_documented():
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "fused_lora").rglob("*.py"))
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"FUSED_LORA_[A-Z_]+", sources)) == set(re.findall(r"FUSED_LORA_[A-Z_]+", page))
