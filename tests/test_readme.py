"""The README's figures are those of bench/results, and its pictures are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import readme_figures

    return readme_figures


def test_every_figure_is_what_its_source_says(figures):
    """python bench/readme_figures.py writes them anew."""
    assert figures.filled(TEXT) == TEXT
    assert set(re.findall(r"<!-- figures: (\w+) -->", TEXT)) == set(figures.BLOCKS)


def test_a_changed_figure_is_seen(figures):
    number = next(re.finditer(r"\| AdamW \| 13\.5 \+ (53\.\d+)", TEXT))
    changed = TEXT[: number.start(1)] + "9" + TEXT[number.start(1) + 1 :]
    assert figures.filled(changed) == TEXT


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_what_it_links_to_is_there(target):
    assert (ROOT / target).exists()


def test_what_a_step_sends_is_as_little_as_it_says():
    table = (ROOT / "bench/results/communication/communication.md").read_text().splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table if row[:1] == "|"]
    shares = [float(row[rows[0].index("of FSDP %")]) for row in rows[2:]]
    (said,) = re.findall(r"FSDP2's own traffic is less than ([\d.]+) %", TEXT.replace("\n", " "))
    assert max(shares) < float(said) < max(shares) + 0.2
