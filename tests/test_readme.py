"""The README's figures are those of bench/results, and its pictures are there."""

import csv
import json
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


# ---- figures in sentences, here and in docs/ -----------------------------------------------------

RESULTS = ROOT / "bench" / "results"


def said(page, pattern):
    """The numbers of the one sentence of a page that ``pattern`` finds, whatever its lines are."""
    (found,) = re.findall(pattern, " ".join((ROOT / page).read_text().split()))
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def steps_of_7b():
    rows = csv.DictReader((RESULTS / "nvidia-h200/step.csv").read_text().splitlines())
    return {row["optimizer"]: row for row in rows if row["model"] == "7b"}


def losses(card):
    """optimizer -> mean loss, from convergence.py's table."""
    lines = (RESULTS / card / "convergence.md").read_text().splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    column = table[0].index("mean")
    return {row[0]: float(row[column]) for row in table[2:]}


def seeds(card, name):
    """Final losses of APOLLO-Mini's runs, by seed."""
    stem = f"APOLLO-Mini-{'-'.join(name.replace(',', '').split())}-seed-"
    paths = sorted((RESULTS / card / "convergence").glob(f"{stem}*.json"))
    found = [json.loads(path.read_text())["curve"][-1][1] for path in paths]
    assert len(found) == 3
    return found


def test_what_is_said_of_steps_on_the_h200_is_in_its_results():
    steps = steps_of_7b()
    shares = [float(steps[f"ours cuda, {n}"]["of copy"]) for n in ("Mini", "rank 256, sparse")]
    pattern = r"move their bytes at ([\d.]+) and ([\d.]+) of the card's copy bandwidth"
    assert said("docs/kernels.md", pattern) == [round(share, 3) for share in shares]
    ms = {name: float(row["ms"]) for name, row in steps.items() if row["ms"]}
    (share,) = said(
        "docs/index.md", r"Mini step of LLaMA-7B takes ([\d.]+) of the time of PyTorch's"
    )
    assert share == round(ms["ours cuda, Mini"] / ms["AdamW fused"], 2)
    rivals = [value for name, value in ms.items() if not name.startswith("ours")]
    assert max(v for n, v in ms.items() if n.startswith("ours cuda")) < min(rivals)
    published = steps["apollo_torch, rank 256"]
    launches, waits = (float(published[key]) / 224 for key in ("launches", "syncs"))
    for page in ("docs/from-apollo-torch.md", "docs/faq.md"):
        assert said(page, r"(\d+) kernels (?:and a wait )?for each matrix") == [round(launches)]
    assert waits == 1
    ours = {float(row["launches"]) for name, row in steps.items() if "ours cuda" in name}
    assert ours == {4} and "all matrices share four launches" in TEXT


def test_what_is_said_of_losses_is_in_the_results():
    """Prices of int8, rivals on the H200, and the distributions at one rank."""
    h200, cpu = losses("nvidia-h200"), losses("cpu-x86_64")
    demo = json.loads((RESULTS / "cpu-x86_64/demo/demo.json").read_text())
    demo = {row["optimizer"]: row["loss"] for row in demo}
    pairs = [
        (demo["APOLLO-Mini"], demo["Q-APOLLO-Mini"]),
        (h200["APOLLO, gaussian, rank 64"], h200["APOLLO, int8 weights, rank 64"]),
        (h200["APOLLO-Mini, gaussian, rank 1"], h200["APOLLO-Mini, int8 weights, rank 1"]),
    ]
    pattern = r"under Mini ([\d.]+) nats in the demo .*? H200 less than ([\d.]+), .*? by ([\d.]+) %"
    in_demo, limit, single = said("README.md", pattern)
    assert in_demo == round(pairs[0][1] - pairs[0][0], 3)
    assert max(abs(b - a) for a, b in pairs[1:]) < limit
    runs = [seeds("nvidia-h200", name) for name in ("gaussian, rank 1", "int8 weights, rank 1")]
    assert max(abs(b / a - 1) for a, b in zip(*runs, strict=True)) <= single / 100
    pattern = (
        r"ended at ([\d.]+) with int8 weights and at ([\d.]+) without .*? at ([\d.]+) and ([\d.]+)"
    )
    assert said("docs/memory.md", pattern) == [*pairs[1][::-1], *pairs[2][::-1]]

    adamw, rank_64 = h200["AdamW"], [v for n, v in h200.items() if n.endswith("rank 64")]
    near = [h200["Adafactor"], *(v for v in rank_64 if v != h200["GaLore, rank 64"])]
    pattern = r"lowest, ([\d.]+) below AdamW.*?lie within ([\d.]+) of AdamW. "
    pattern += r"GaLore ends ([\d.]+) above it, Mini ([\d.]+), CAME ([\d.]+)"
    muon, spread, *above = said("README.md", pattern)
    assert len(near) == 6 and max(abs(v - adamw) for v in near) <= spread
    assert muon == round(adamw - h200["Muon"], 3)
    others = ("GaLore, rank 64", "APOLLO-Mini, gaussian, rank 1", "CAME")
    assert above == [round(h200[name] - adamw, 3) for name in others]
    assert (min(h200, key=h200.get), max(h200, key=h200.get)) == ("Muon", "CAME")

    kinds = ("gaussian", "rademacher", "sparse")
    by_rank = [[cpu[f"APOLLO, {kind}, rank {r}"] for kind in kinds] for r in (16, 64, 128)]
    (limit,) = said("README.md", r"at one rank they differ by less than ([\d.]+) nats")
    assert max(max(values) - min(values) for values in by_rank) < limit
    assert len({values.index(min(values)) for values in by_rank}) > 1


def test_the_estimate_is_as_near_to_counted_steps_as_the_page_says():
    text = (RESULTS / "memory/claims.md").read_text()
    off = [abs(float(v)) for v in re.findall(r"([+-][\d.]+) % \|$", text, re.MULTILINE)]
    assert said("docs/8b-on-24gb.md", r"\) within ([\d.]+) %") == [max(off)]
