"""Look for secrets in the files that git keeps: python tests/secret_scan.py. Each find is a line; exit code 1."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "PyPI token": r"\bpypi-[A-Za-z0-9_-]{50,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "password in an address": r"\b[a-z]+://[^/\s:@\"'{}]+:[^/\s:@\"'{}]+@",
    "secret in an assignment": r"(?i)\b(\w*(token|secret|password|api_?key))\s*[:=]\s*[\"'][A-Za-z0-9+/_-]{24,}[\"']",
}


def scan(text: str) -> list[tuple[int, str]]:
    """(line, what it looks like) of everything in a text that looks like a secret."""
    lines = enumerate(text.splitlines(), 1)
    return [(number, name) for number, line in lines for name, rule in PATTERNS.items() if re.search(rule, line)]


def scan_files(root: Path = ROOT) -> list[str]:
    """The same of all files that git keeps, or would: each with its place, without the secret."""
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    files = [root / name for name in names if name and (root / name).is_file()]
    texts = ((file, file.read_bytes().decode("utf-8", "replace")) for file in files)
    return [f"{file.relative_to(root)}:{line}: {what}" for file, text in texts for line, what in scan(text)]


if __name__ == "__main__":
    found = scan_files()
    print("\n".join(found), end="\n" if found else "")
    sys.exit(1 if found else 0)
