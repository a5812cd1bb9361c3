"""Write the results of README.md, docs/engines.md and docs/ladder.png again, from what was measured: `make results`.

Measured is what `data/ledger.json`, `data/reports` and `data/ladder.json` hold. A full `make run-all` renews README at its end.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from course_utils import files, ledger, plots, report
from course_utils.simulate import Policy
from course_utils.tables import Table
from course_utils.tools import ladder

ROOT = Path(__file__).resolve().parents[2]
ENGINES, PICTURE = Path("docs") / "engines.md", Path("docs") / "ladder.png"
BEGIN, END = (
    "<!-- results: written by `make results` from data/ledger.json and data/reports -->",
    "<!-- end of results -->",
)
MODELS = (
    *("FP32", "PTQ INT8", "QAT INT8"),
    *("packed 4-bit weights, GPTQ", "packed 3-bit weights, GPTQ", "packed 2-bit weights, QAT"),
)
COLUMNS = {  # column title → quantity in the ledger
    "size": "size",
    "latency": "latency",
    "speed-up": "speed-up over FP32",
    "accuracy": "accuracy",
}
SIZE, LATENCY = "size, as the blog claims", "latency, as the blog claims"
LAST_DIGIT = {SIZE: 1e5, LATENCY: 0.1}  # the blog prints one decimal, of MB and of ms
# Of a claim that is a ratio, and of code that is printed.
KEPT, BEATEN, MISSED, FALSE = "kept", "beaten", "not kept on this machine", "false as printed"
LINES = {  # label → repair and policy but for the bits; the last has every number of bits
    "AdaRound, per channel": ("AdaRound", {"clip": "mse"}),
    "groups of 32": ("nearest", {"granularity": 32}),
    "per tensor": ("nearest", {"granularity": "tensor"}),
    "per channel": ("nearest", {}),
}


@dataclass(frozen=True)
class Claim:
    """What the blog says, what was measured of it, the verdict, and the notebook that shows it; '–' is not measured."""

    says: str
    found: str
    verdict: str
    notebook: str


def claims(records):
    """Yield the `Claim`s of the blog, judged by the `records` of a ledger (subject → quantity → entry)."""

    def get(subject, quantity):
        return records.get(subject, {}).get(quantity)

    def said(quantity, *models):
        """Return what the blog says of two models, as exactly as it prints it, and the ratio that it stands for."""
        first, second = (get(model, quantity) for model in models)
        if not (first and second):
            return "–", None
        unit, scale = ("MB", 1e-6) if quantity == SIZE else ("ms", 1)
        ratio = first["value"] / second["value"]
        return f"{first['value'] * scale:.1f} → {second['value'] * scale:.1f} {unit}, {ratio:.2f}×", ratio

    def made(quantity, model, ratio):
        """Return what was measured of two models, or '–'."""
        first, second = (ledger.format_entry(get(m, quantity)) for m in ("FP32", model))
        return f"{first} → {second}, {ledger.format_entry(ratio)}" if ratio else "–"

    fp32, int8 = get("FP32", "size"), get("PTQ INT8", "size")
    smaller = {"value": fp32["value"] / int8["value"], "unit": "×", "source": "measured"} if fp32 and int8 else None
    claimed = [get(model, SIZE) for model in ("FP32", "PTQ INT8")]
    text, _ = said(SIZE, "FP32", "PTQ INT8")
    yield Claim(
        f"INT8 makes it smaller: {text}", made("size", "PTQ INT8", smaller), _judge(smaller, *claimed, SIZE), "02"
    )
    printed = get("the blog's PTQ code", "size")
    wrong = printed and claimed[1] and printed["value"] > claimed[1]["value"] + LAST_DIGIT[SIZE] / 2
    yield Claim("… with its PTQ code", ledger.format_entry(printed), _as_printed(printed and claimed[1], wrong), "02")
    for model in ("PTQ INT8", "QAT INT8"):
        faster = get(model, "speed-up over FP32")
        judged = _judge(faster, get("FP32", LATENCY), get(model, LATENCY), LATENCY)
        text, _ = said(LATENCY, "FP32", model)
        yield Claim(f"{model.split()[0]} makes it faster: {text}", made("latency", model, faster), judged, "04")
    text, ratio = said(LATENCY, "PTQ INT8", "QAT INT8")
    spread = get("the blog's stopwatch", "one model against itself")
    found = f"its stopwatch, one model against itself: {ledger.format_entry(spread)}" if spread else "–"
    wrong = spread and ratio and spread["value"] > ratio
    yield Claim(f"QAT is faster than PTQ: {text}, by `time.time()`", found, _as_printed(spread and ratio, wrong), "04")
    errors = get("the blog's QAT code", "errors that stop it")
    found = f"{ledger.format_entry(errors)}, one behind the other" if errors else "–"
    yield Claim("its QAT code runs", found, _as_printed(errors, errors and errors["value"] > 0), "03")
    before, after = (get("the blog's random labels", f"accuracy {when}") for when in ("before", "after ten steps"))
    found = f"{ledger.format_entry(before)} → {ledger.format_entry(after)}" if before and after else "–"
    wrong = before and after and after["high"] < before["low"]
    yield Claim("random labels will do for training", found, _as_printed(before and after, wrong), "03")


def _judge(found, before, after, quantity):
    """Return the verdict on a ratio: the blog's is known as well as the digits it prints, ours as well as its interval."""
    if not (found and before and after):
        return "–"
    half = LAST_DIGIT[quantity] / 2
    least = (before["value"] - half) / (after["value"] + half)
    most = (before["value"] + half) / (after["value"] - half)
    if found.get("low", found["value"]) > most:
        return BEATEN
    return KEPT if found.get("high", found["value"]) >= least else MISSED


def _as_printed(measured, wrong):
    return "–" if not measured else FALSE if wrong else KEPT


def results(path):
    """Return README's results section as Markdown, from the ledger file `path`; '–' stands for what was not measured."""
    content = ledger.read(path)
    records = content["records"]
    rows = [[c.says, c.found, c.verdict, f"[{c.notebook}]({_address(c.notebook)})"] for c in claims(records)]
    lines = [
        Table(["the blog says", "measured here", "verdict", "shown in"], rows).markdown().replace("---:", "---"),
        "",
    ]
    rows = [[m, *[ledger.format_entry(records.get(m, {}).get(q)) for q in COLUMNS.values()]] for m in MODELS]
    lines += [Table(["ResNet18", *COLUMNS], rows).markdown(), ""]
    used = {records[m][q].get("machine") for m in MODELS for q in COLUMNS.values() if q in records.get(m, {})} - {None}
    for facts in (content["machines"][key] for key in sorted(used)):
        lines.append(
            f"Measured on {facts['cpu']} ({', '.join(facts['isa']) or 'no INT8 instructions known'}), {facts['threads']} "
            f"threads, {facts['memory_gib']} GiB, Python {facts['python']}, torch {facts['torch'].split('+')[0]}. "
        )
    lines.append(
        "Latency and speed-up: one image of 224 × 224 pixels, median of interleaved rounds, over eager FP32, 95 % bootstrap "
        "interval. Accuracy: Fashion-MNIST's 10,000 test images, 95 % Wilson interval. The blog's figures are from unnamed "
        "hardware, so only ratios are judged, as exactly as it prints them. "
    )
    tuned = records.get("PTQ INT8", {}).get("speed-up over tuned FP32")
    if tuned:
        lines.append(
            f"Against FP32 with batch norm folded and channels_last, INT8 is {ledger.format_entry(tuned)} as fast: that part "
            "is owed to eight bits alone. "
        )
    lines.append(
        "Fewer than 8 bits have no speeds here: no CPU library has a convolution kernel for them; the file is what shrinks."
    )
    lines += map(_fastest, report.stored().values())
    return "\n".join(line.rstrip() for line in lines)


def engines():
    """Return the section of docs/engines.md as Markdown: the first stored report, of every engine."""
    content = report.stored()[report.REFERENCE]
    machine, conditions = content["machine"], content["conditions"]
    return "\n".join(
        [
            f"One image of {conditions['size']} × {conditions['size']} pixels, on {machine['cpu']} "
            f"({', '.join(machine['isa'])}), {machine['threads']} threads, torch {machine['torch'].split('+')[0]}, "
            f"{content['date']}. Accuracy and predictions: {conditions['test_images']:,} test images.",
            "",
            report.table(content).markdown(),
        ]
    )


def _fastest(content):
    machine = content["machine"]
    best = max((r for r in content["ladder"] if r["precision"] == "int8"), key=lambda rung: rung["over_eager"]["value"])
    eager, own = report.times(best["over_eager"]), report.times(best["over_own_fp32"])
    return (
        f"\nOf [all engines]({ENGINES.as_posix()}), the fastest on {machine['cpu']} with {', '.join(machine['isa'])} is "
        f"{best['name']}: {eager} as fast as eager FP32, {own} as its own FP32."
    )


def _address(number):
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return path.relative_to(ROOT).as_posix()


def write_readme(readme=ROOT / "README.md", path=None):
    """Replace the section between the two result marks of `readme`, in one step; leave the file alone if nothing changed.

    Raises `ValueError` when the marks are missing.
    """
    _write_section(readme, results(path or files.data_dir() / "ledger.json"))


def _write_section(page, section):
    text = Path(page).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{Path(page).name} has lost the marks of its results section: {BEGIN} … {END}")
    new = f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"
    if new != text:
        files.write_text(page, new)


def lines():
    """Return what README's picture shows, validation accuracy of ResNet18: label → bits → `Proportion`, and that of FP32."""
    stored = {
        (r.repair, r.policy): r.comparison for r in ladder.read() if (r.model, r.split) == ("resnet18", "validation")
    }
    found = {
        label: {
            bits: stored[repair, policy].second
            for bits in range(8, 1, -1)
            if (repair, policy := Policy(weights=bits, **rest)) in stored
        }
        for label, (repair, rest) in LINES.items()
    }
    return found, stored["nearest", Policy()].first


def fingerprint(found, fp32):
    """Return a checksum of what `lines` returned, which the picture carries with it."""
    numbers = [[label, bits, p.successes, p.n] for label, by_bits in found.items() for bits, p in by_bits.items()]
    return hashlib.sha256(json.dumps([numbers, fp32.successes, fp32.n]).encode()).hexdigest()


def write_picture(path):
    """Draw `lines` into the PNG file `path`, in one step."""
    import matplotlib.pyplot as plt

    found, fp32 = lines()
    with plt.rc_context():
        plots.setup()
        figure = plots.ladder(found, title="ResNet18 on Fashion-MNIST: how few bits a weight can have", reference=fp32)
        with files.replacing(path) as partial:
            metadata = {"Software": None, "Source": fingerprint(found, fp32)}
            figure.savefig(partial, format="png", dpi=120, metadata=metadata)
        plt.close(figure)


def main():
    write_readme()
    _write_section(ROOT / ENGINES, engines())
    write_picture(ROOT / PICTURE)


if __name__ == "__main__":
    main()
