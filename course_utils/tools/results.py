"""Write the README's results from the ledger and the stored report: `make results`; a full `make run-all` does it at its end."""

from pathlib import Path

from course_utils import files, ledger, report
from course_utils.tables import Table

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = (
    "<!-- results: written by `make results` from data/ledger.json and data/reports -->",
    "<!-- end of results -->",
)
MODELS = (
    *("FP32", "PTQ INT8", "QAT INT8"),
    *("packed 4-bit weights, GPTQ", "packed 3-bit weights, GPTQ", "packed 2-bit weights, QAT"),
)
COLUMNS = {  # column title → quantity in the ledger
    "blog: size": "size, as the blog claims",
    "size": "size",
    "blog: latency": "latency, as the blog claims",
    "latency": "latency",
    "speed-up": "speed-up over FP32",
    "accuracy": "accuracy",
}


def results(path):
    """Return the results section as Markdown, from the ledger file `path`; '–' stands for what was not measured."""
    content = ledger.read(path)
    records = content["records"]
    rows = [[m, *[ledger.format_entry(records.get(m, {}).get(q)) for q in COLUMNS.values()]] for m in MODELS]
    lines = [Table(["ResNet18", *COLUMNS], rows).markdown().replace(" (cited)", ""), ""]
    used = {records[m][q].get("machine") for m in MODELS for q in COLUMNS.values() if q in records.get(m, {})} - {None}
    for facts in (content["machines"][key] for key in sorted(used)):
        lines.append(
            f"Measured on {facts['cpu']} ({', '.join(facts['isa']) or 'no INT8 instructions known'}), {facts['threads']} "
            f"threads, {facts['memory_gib']} GiB, Python {facts['python']}, torch {facts['torch'].split('+')[0]}. "
        )
    lines.append(
        "Latency and speed-up: one image of 224 × 224 pixels, median of interleaved rounds, over eager FP32, 95 % bootstrap "
        "interval. Accuracy: Fashion-MNIST's 10,000 test images, 95 % Wilson interval. The blog columns are its claims, on "
        "unnamed hardware, for ImageNet's 1,000 classes. "
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
    first, *others = report.stored().values()
    lines += ["", *_engines(first), *map(_fastest, others)]
    return "\n".join(line.rstrip() for line in lines)


def _engines(content):
    machine, conditions = content["machine"], content["conditions"]
    return [
        f"On every engine, one image of {conditions['size']} × {conditions['size']} pixels (notebook 06; `make report` on "
        f"{machine['cpu']}, {machine['threads']} threads, {content['date']}):",
        "",
        report.table(content).markdown(),
        "",
        "Each engine in a process of its own, its ways and eager FP32 in interleaved rounds. *Its own FP32* is the fastest FP32 of "
        "the same engine, so that INT8 is not credited with compilation. *The limit* is the machine's measured arithmetic and "
        f"bandwidth. Accuracy and predictions: {conditions['test_images']:,} test images.",
    ]


def _fastest(content):
    machine = content["machine"]
    best = min((r for r in content["ladder"] if r["precision"] == "int8"), key=lambda rung: rung["ms"]["median"])
    eager, own = report.times(best["over_eager"]), report.times(best["over_own_fp32"])
    return (
        f"\nOn {machine['cpu']} with {', '.join(machine['isa'])} only, the fastest is {best['name']}: {eager} as fast as eager "
        f"FP32, {own} as its own. `make compare` lays the two, and yours, side by side."
    )


def write_readme(readme=ROOT / "README.md", path=None):
    """Replace the section between the two result marks of `readme`, in one step; leave the file alone if nothing changed.

    Raises `ValueError` when the marks are missing.
    """
    text = Path(readme).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{Path(readme).name} has lost the marks of its results section: {BEGIN} … {END}")
    new = f"{before}{BEGIN}\n\n{results(path or files.data_dir() / 'ledger.json')}\n\n{END}{after}"
    if new != text:
        files.write_text(readme, new)


if __name__ == "__main__":
    write_readme()
