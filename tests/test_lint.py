"""`make lint` looks at every program of the repository."""

from __future__ import annotations

import re

from support import REPO

import train_gpt

MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")


def test_every_folder_with_programs_is_looked_at():
    (programs,) = re.findall(r"^PROGRAMS := (.+)$", MAKEFILE, re.MULTILINE)
    folders = {path.parent.name for path in REPO.glob("*/*.py")} - {"tests"}
    assert {*train_gpt.CODE_FILES, *folders} <= set(programs.split())
    assert "--target=3.10- $(PROGRAMS)" in MAKEFILE
